"""The dataset card: what the rows are, how many, and how to make them again."""

import json
import shlex
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData

from ..pages.page import Table, resource
from ..pages.papers import HRM_PAPER
from .build_config import BuildConfig
from .build_report import report_lines


COLUMNS = {
    "prompt": "the problem",
    "completions": "step texts, without separators",
    "labels": "probability that the step is correct, in [0, 1]; null is context only and never trained on",
    "parents": "index of the step before each step, -1 for the prompt",
    "num_merged": "number of original steps in each text: 1 for a step, 2 for a merged pair",
    "problem_id": "the same for rows of one problem: a hash of its text without differences of whitespace, "
    "unless the source has its own",
    "answer": "the reference answer",
    "finish_reason": "why the annotator stopped, as in the source",
    "task": "the benchmark that the problem comes from, as in the source",
    "mc_correct": "leaves with the right answer below each step",
    "mc_total": "leaves with an answer, right or wrong, below each step",
    "mc_unresolved": "leaves without an answer below each step",
    "node_ids": "the node of the search that each step comes from, the first one of equal siblings; a merged step has that "
    "of its last step",
    "label_weights": "inverse of the chance of each label to stay when the labels were balanced, 0 where there is none",
    "label_kind": "what a label is: the MC score (soft), whether it is above 0 (hard), ER-PRM's map of it (entropy)",
    "estimator": "how the MC score is estimated: child_mean, leaf_share, or recorded by the source",
    "eta": "strength of the entropy regularisation",
    "truncated": "what a solution without an answer is: unknown (drop) or wrong",
    "source": "the tree as it was searched (tree), or a view of it with merged nodes (hnc)",
    "completion": "a right solution, as the policy wrote it",
    "mc_score": "the lowest MC score among the judged steps of the solution",
    "node_id": "the node of the search that the solution ends with",
}
SOLUTION_COLUMNS = {
    "prompt": "what the policy is asked: text, or messages for its chat template",
    "problem": "the problem alone",
    "chat_template_kwargs": "variables for the chat template, with which the policy is asked",
}
VIEW_COLUMNS = {
    "sft": SOLUTION_COLUMNS
    | {
        "mc_correct": "leaves with the right answer below the first step of the solution with the lowest MC score",
        "mc_total": "leaves with an answer, right or wrong, below that step",
    },
    "raft": SOLUTION_COLUMNS
    | {
        "completion": "the chosen solution",
        "score": "the reward model's score of the solution: the aggregate of its step scores",
        "aggregate": "how step scores become one score",
        "num_candidates": "number of candidates of the problem, equal ones included, that it was chosen from",
        "rank": "place among the chosen solutions of the problem, 1 for the best",
    },
}

VIEWS = {
    "tree": "One row is one problem with its judged steps, arranged as a tree.",
    "hrm": "One row is one problem with its judged steps, arranged as a tree. Merged steps, `num_merged` above 1, follow "
    "the original ones: the texts of consecutive steps, labelled as the last of them "
    "([HRM](https://huggingface.co/papers/2503.13551), Table 2).",
    "prm": "One row is one sequence of judged steps, from the first step to one that no other follows, in TRL's "
    "stepwise-supervision format. A step that several sequences share stands in each.",
    "orm": "One row is one complete sequence of steps. Only its last step has a label.",
    "sft": "One row is one right solution.",
    "raft": "One row is one solution, chosen among the candidates of its problem for its score by a reward model. The "
    "reference answer had no say in it.",
}
LOAD_FOLDER = 'load_dataset("path/to/this/directory")  # or the name of the repository on the Hub'


def build_command(command: str, inputs: list[str], options: dict[str, Any], config: BuildConfig) -> str:
    """The command that builds the dataset again, with every option that decides the result."""
    words = ["trl-hrm", command, *inputs, *_option("output_dir", config.output_dir)]
    if config.view != "raft":
        words += ["--view", config.view]
    if config.view == "hrm" or options.get("hnc"):
        separator = config.merge_separator.replace("\n", "\\n").replace("\t", "\\t")
        words.append(f"--merge_separator={separator}")
    if config.view == "hrm":
        words += ["--max_merge", config.max_merge]
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
    return shlex.join(str(word) for word in words)


def _option(name: str, value: Any) -> list[str]:
    """The words of an option. A value that begins with a dash would be taken for another option."""
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def build_card(
    about: dict[str, Any], report: dict[str, Any], schema: pa.Schema, example: dict[str, Any]
) -> DatasetCard:
    """
    The card of a dataset just built.

    Args:
        about (`dict[str, Any]`):
            `title`, `description` and `citation` of the source, and its `license` if it has a known one.
        report (`dict[str, Any]`):
            The build report.
        schema (`pa.Schema`):
            Columns and types.
        example (`dict[str, Any]`):
            The first training row. It is shown shortened.
    """
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in report["rows"]]
    # `load_dataset` names its cache of a local directory by the directory's last name and this block alone. Without the
    # digest it would go on serving the rows of an earlier build, or of another directory of the same name.
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
    meanings = COLUMNS | VIEW_COLUMNS.get(report["view"], {})
    columns = [
        [
            f"`{field.name}`",
            f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type),
            meanings.get(field.name, "as in the source"),
        ]
        for field in schema
    ]
    facts = _flatten(report.get("facts") or {})
    counts = [[name, str(count)] for name, count in report_lines(report)]
    return DatasetCard.from_template(
        data,
        template_str=resource("templates/dataset_card.md.jinja"),
        title=about["title"],
        view=report["view"],
        description=about["description"],
        row=VIEWS[report["view"]],
        columns=Table(["column", "type", "meaning"], columns).markdown(),
        example=json.dumps(_shorten(example), indent=2, ensure_ascii=False),
        load=LOAD_FOLDER,
        facts=Table(["what", ""], facts).markdown() if facts else "",
        picture=report.get("picture"),
        counts=Table(["what", "count"], counts).markdown(),
        command=report["command"],
        source=about["source"],
        citation=about["citation"],
        hrm_citation=HRM_PAPER["citation"] if report["view"] == "hrm" else "",
    )


def _flatten(value: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """A nested dictionary as table rows, one per innermost value."""
    rows = []
    for key, inner in value.items():
        path = (*above, str(key).replace("_", " "))
        if isinstance(inner, dict):
            rows += _flatten(inner, path)
        elif isinstance(inner, float):
            rows.append((": ".join(path), f"{inner:.4g}"))
        elif isinstance(inner, int) and not isinstance(inner, bool):
            rows.append((": ".join(path), f"{inner:,}"))
        else:
            text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
            rows.append((": ".join(path), json.dumps(text, ensure_ascii=False)[1:-1]))
    return rows


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
