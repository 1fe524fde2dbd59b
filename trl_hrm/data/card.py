"""Dataset card of a build: description of the rows, counts, and the command to rebuild the dataset."""

import json
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData

from ..io import shell_word, shown
from ..pages.page import Table, code, markdown, resource
from ..pages.papers import HRM_PAPER
from ..terminal import printable
from .build_config import BuildConfig
from .build_report import report_lines
from .output import LOAD_FOLDER


COLUMNS = {
    "prompt": "the problem",
    "completions": "step texts, without separators",
    "labels": "probability that the step is correct, in [0, 1]; steps with null are context and are not trained on",
    "parents": "index of the step before each step, -1 for the prompt",
    "num_merged": "number of original steps in each text: 1 for a step, more for a merged step",
    "problem_id": "id of the problem, shared by its rows: the id in the source or, if it has none, a hash of the text that ignores "
    "whitespace",
    "answer": "the reference answer",
    "finish_reason": "why the annotator stopped, as in the source",
    "task": "the benchmark that the problem comes from, as in the source",
    "mc_correct": "number of leaves below each step with the correct answer",
    "mc_total": "number of leaves below each step with an answer, correct or wrong",
    "mc_unresolved": "number of leaves below each step without an answer",
    "node_ids": "search node of each step; for identical siblings, the first node; for a merged step, the node of its last step",
    "label_weights": "inverse of the probability that balancing keeps the label, 0 for steps without a label",
    "mc_scores": "MC score of each step, for the labels of merged steps",
    "prompt_mc_score": "MC score of the problem, before the first step",
    "label_kind": "type of label: the MC score (soft), whether it is above a threshold (hard), ER-PRM's label (entropy), or the MC "
    "score compared with the MC score before the step (progress, ratio)",
    "estimator": "estimator of the MC score: child_mean, leaf_share, or recorded by the source",
    "eta": "strength of the entropy regularisation",
    "truncated": "how a solution without an answer is counted: ignored (drop) or wrong",
    "source": "the original search tree (tree), or its view with node compression (hnc)",
    "completion": "a correct solution, as written by the policy",
    "mc_score": "the lowest MC score among the labelled steps of the solution",
    "node_id": "search node of the end of the solution",
}
SOLUTION_COLUMNS = {
    "prompt": "the prompt of the policy: text, or messages for its chat template",
    "problem": "the problem without instructions",
    "chat_template_kwargs": "variables of the chat template",
}
VIEW_COLUMNS = {
    "sft": SOLUTION_COLUMNS
    | {
        "mc_correct": "number of leaves with the correct answer below the first step with the lowest MC score",
        "mc_total": "number of leaves with an answer, correct or wrong, below that step",
        "source": "the tree with the higher score: the original search tree (tree), or its view with node compression (hnc)",
    },
    "prefixes": SOLUTION_COLUMNS
    | {
        "completion": "the text of the policy from the start to the end of a step",
        "mc_score": "the MC score of the step",
        "mc_correct": "number of leaves with the correct answer below the step",
        "mc_total": "number of leaves with an answer, correct or wrong, below the step",
        "is_complete": "whether the solution ends with the step; otherwise do not train on an end of sequence after it",
        "source": "the tree with the higher score: the original search tree (tree), or its view with node compression (hnc)",
        "node_id": "search node of the step",
    },
    "raft": SOLUTION_COLUMNS
    | {
        "completion": "the selected solution",
        "score": "the reward model's score of the solution: the aggregate of its step scores",
        "aggregate": "how the step scores are aggregated",
        "num_candidates": "number of candidates of the problem that it was selected from, including duplicates",
        "rank": "rank among the selected solutions of the problem, 1 for the best",
    },
}

LABEL_COLUMNS = {  # by kind of label
    "progress": "(1 + MC score of the step - MC score before it) / 2, in [0, 1], 0.5 for no change; steps with null are context and are "
    "not trained on",
    "ratio": "MC score of the step divided by the MC score before it, at most 1; steps with null are context and are not trained on",
}
AGREEMENT = (
    "share of the judge's readable votes that name the same first wrong step as the MC scores, as a mean over the solutions with this "
    "step, 0 for steps without a label"
)

VIEWS = {
    "tree": "Each row is one problem with its labelled steps as a tree.",
    "hrm": "Each row is one problem with its labelled steps as a tree. The original steps are followed by merged steps, with "
    "`num_merged` above 1. A merged step has the joined texts of consecutive steps and the label of the last one "
    "([HRM](https://huggingface.co/papers/2503.13551), Table 2).",
    "hrm_relative": "Each row is one problem with its labelled steps as a tree. The original steps are followed by merged steps, with "
    "`num_merged` above 1. A merged step has the joined texts of consecutive steps. Its label compares the MC score at its end with the "
    "MC score before its first step.",
    "prm": "Each row is one path of labelled steps, from the first step to a leaf of the tree, in TRL's stepwise supervision format. "
    "Steps that several paths share are repeated in each of them.",
    "orm": "Each row is one complete solution. Only its last step has a label.",
    "sft": "Each row is one correct solution.",
    "prefixes": "Each row is the text from the start of a solution to one of its steps, or a correct solution.",
    "raft": "Each row is one solution, selected among the candidates of its problem by the score of a reward model. The reference "
    "answer was not used.",
}


def build_command(command: str, inputs: list[str], options: dict[str, Any], config: BuildConfig) -> str:
    """Return the command that rebuilds the dataset, with every option that affects the result."""
    words = ["trl-hrm", command, *inputs, *_option("output_dir", config.output_dir)]
    if config.view != "raft":
        words += ["--view", config.view]
    if config.merges_steps:
        separator = config.merge_separator.replace("\n", "\\n").replace("\t", "\\t")
        words.append(f"--merge_separator={separator}")
    if config.view == "hrm":
        words += ["--max_merge", config.max_merge]
        if config.merge != "pairs":
            words += ["--merge", config.merge]
        if config.thinking_marks is not None:
            words += ["--thinking_marks", *config.thinking_marks]
    for option, value in options.items():
        if value is True:
            words.append(f"--{option}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{option}", *value]
        elif value is not None and value is not False:
            words += _option(option, value)
    words += ["--test_size", config.test_size, "--seed", config.seed]
    if config.columns:
        words += ["--columns", *(f"{name}={column}" for name, column in config.columns.items())]
    if config.strict:
        words.append("--strict")
    if config.exclude:
        words += ["--exclude", *config.exclude]
    return " ".join(map(shell_word, map(str, words)))


def _option(name: str, value: Any) -> list[str]:
    """Return the words of an option. A value that begins with a dash needs `=`, since it would be parsed as an option."""
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def build_card(
    about: dict[str, Any], report: dict[str, Any], schema: pa.Schema, example: dict[str, Any]
) -> DatasetCard:
    """
    Return the card of a built dataset.

    Args:
        about (`dict[str, Any]`):
            `title`, `description` and `citation` of the source, its `license` if known, and the meaning of `columns` that differs from
            the usual one.
        report (`dict[str, Any]`):
            Build report.
        schema (`pa.Schema`):
            Columns and types of the dataset.
        example (`dict[str, Any]`):
            First training row. It is shortened for the card.
    """
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in report["rows"]]
    # `load_dataset` caches a local directory under its name and this block. Without the digest, it would return cached rows of an
    # earlier build, or of another directory with the same name.
    config = {"config_name": "default", "description": f"content {report['content']}", "data_files": files}
    data = DatasetCardData(
        license=about.get("license"),
        language=about.get("language"),
        pretty_name=f"{about['title']} ({report['view']})",
        tags=[
            "trl",
            "trl_hrm",
            "stepwise-supervision" if "labels" in schema.names else "prompt-completion",
            report["view"],
        ],
        configs=[config],
    )
    rows = "prefixes" if "is_complete" in schema.names else report["view"]
    meanings = COLUMNS | VIEW_COLUMNS.get(rows, {}) | about.get("columns", {})
    facts = report.get("facts") or {}
    kind = facts.get("labels", {}).get("kind")
    if kind in LABEL_COLUMNS:
        meanings["labels"] = LABEL_COLUMNS[kind]
    if facts.get("consensus", {}).get("disagreement") == "weight":
        meanings["label_weights"] = AGREEMENT
    columns = [
        [
            code(field.name),
            markdown(f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type)),
            meanings.get(field.name, "as in the source"),
        ]
        for field in schema
    ]
    properties = _flatten(facts)
    counts = [[markdown(name), str(count)] for name, count in report_lines(report)]
    return DatasetCard.from_template(
        data,
        template_str=resource("templates/dataset_card.md.jinja"),
        title=about["title"],
        view=report["view"],
        description=about["description"],
        row=VIEWS["hrm_relative" if rows == "hrm" and kind in LABEL_COLUMNS else rows],
        columns=Table(["column", "type", "meaning"], columns).markdown(),
        example=printable(json.dumps(_shorten(example), indent=2, ensure_ascii=False, default=_text)),
        load=LOAD_FOLDER,
        facts=Table(["property", "value"], properties).markdown() if properties else "",
        picture=report.get("picture"),
        counts=Table(["name", "count"], counts).markdown(),
        command=report["command"],
        source=about["source"],
        citation=about["citation"],
        hrm_citation=HRM_PAPER["citation"] if report["view"] == "hrm" else "",
    )


def _flatten(value: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return a nested dictionary as rows of a Markdown table, one per innermost value."""
    rows = []
    for key, inner in value.items():
        path = (*above, str(key).replace("_", " "))
        if isinstance(inner, dict):
            rows += _flatten(inner, path)
            continue
        if isinstance(inner, float):
            text = f"{inner:.4g}"
        elif isinstance(inner, int) and not isinstance(inner, bool):
            text = f"{inner:,}"
        else:
            text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        rows.append((markdown(": ".join(path)), markdown(text)))
    return rows


def _text(value: Any) -> str:
    """Return a value that JSON does not have, such as a date, as text."""
    return shown(value, 120) if isinstance(value, bytes) else str(value)


def _shorten(value: Any) -> Any:
    if isinstance(value, str) and len(value) > 120:
        return value[:120] + " ..."
    if isinstance(value, list) and len(value) > 4:
        return [*map(_shorten, value[:4]), "..."]
    if isinstance(value, list):
        return [_shorten(item) for item in value]
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    return value
