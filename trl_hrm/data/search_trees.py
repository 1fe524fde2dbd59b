"""Searched trees as datasets: runs and files to rows, with the facts of the search on the card."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..search.compression import compress, count_moves
from ..search.manifest import MANIFEST
from ..search.nodes import read_totals, read_unreadable_references
from ..search.outcomes import describe_outcomes, reference_warnings
from ..search.prompts import Prompt
from ..search.run_folder import node_files, read_manifest, read_summary
from ..search.step_search import STRATEGIES
from ..search.tree import SearchTree
from ..step_tree import StepTree
from .build import Dropped, Recipe, build_dataset, count_labels
from .build_config import BuildConfig
from .export_config import ExportConfig
from .judged_trees import bin_of, judge, leave_out_copies, right_solutions, thin_labels
from .node_files import NodeFiles, run_warnings
from .openr import OpenrFiles
from .problems import problem_split
from .self_training import MESSAGES, asked, prompt_of


FORMATS = ("run", "openr")
EVIDENCE = (2, 4, 8, 16)  # numbers of answered leaves for which the card states how many labels rest on as many

ABOUT = {
    "title": "Step trees of a search",
    "description": "Problems whose solutions a policy wrote step by step, in trees, and whose steps are judged by the outcomes "
    "of what follows them. No human judged a step.",
    "source": "Made with trl_hrm. The terms of use are those of the problems and of the policy.",
    "citation": "",
}
ABOUT_OPENR = {
    "title": "openr math-aps step trees",
    "description": "MATH problems with the trees and values of openr's OmegaPRM search.",
    "language": "en",
    "source": "openr: https://github.com/openreasoner/openr. See there for its terms of use.",
    "citation": "",
}
COLUMNS = {
    "mc_correct": pa.list_(pa.int32()),
    "mc_total": pa.list_(pa.int32()),
    "mc_unresolved": pa.list_(pa.int32()),
    "node_ids": pa.list_(pa.string()),
    "label_weights": pa.list_(pa.float32()),
    "problem_id": pa.string(),
    "answer": pa.string(),
    "label_kind": pa.string(),
    "estimator": pa.string(),
    "eta": pa.float64(),
    "truncated": pa.string(),
    "source": pa.string(),
    "node_id": pa.string(),
}
SOLUTION_COLUMNS = COLUMNS | {"mc_correct": pa.int32(), "mc_total": pa.int32(), "problem": pa.string()}
SOLUTION_NOTES = ("solutions_found", "duplicate_solutions", "solutions_below_min_score")
BARE_PROMPTS = (
    "`prompt` is the bare problem in all rows, for {}. A policy that was asked otherwise learns another prompt."
)


def build_search_trees(inputs: Sequence[str], config: ExportConfig, format: str = "run") -> dict[str, Any]:
    """
    Build a dataset of judged steps from searched trees. No policy is asked, and it can be done again with other options.

    Args:
        inputs (`Sequence[str]`):
            Folders of runs of `trl-hrm annotate`, or Parquet files of nodes from them; with `format="openr"`, JSON Lines
            files of openr's trees.
        config ([`ExportConfig`]):
            What a label is, what a row is, and the options of all builders.
        format (`str`, *optional*, defaults to `"run"`):
            `"run"` or `"openr"`.

    Returns:
        `dict[str, Any]`: The build report.

    Raises:
        `FileNotFoundError`: If an input does not exist.
        `ValueError`: If an input is given twice, or holds something else than expected; if labels are to be made of a search that
        a reward model led; if runs of chat and plain prompts would stand in one dataset of solutions; if no row is left for
        training.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    inputs = [str(name) for name in inputs]
    recipe = _openr_recipe(inputs, config) if format == "openr" else _run_recipe(inputs, config)
    if config.balance:
        recipe = _balanced(recipe, config)
    return build_dataset(recipe, config)


def _run_recipe(inputs: list[str], config: ExportConfig) -> Recipe:
    if config.columns:
        raise ValueError(f"columns is {config.columns}, and runs have columns of their own. Leave it out.")
    folders = [name for name in inputs if Path(name).is_dir()]
    files = [str(file) for name in inputs for file in (node_files(name) if name in folders else [name])]
    _refuse_repeats(files)
    if config.view != "sft":
        _refuse_guided(files)
    source = NodeFiles(files)
    runs = {name: read_manifest(name) | read_summary(name) for name in folders}
    unreadable = read_unreadable_references([name for name in inputs if name not in folders])
    prompt, doubts = _asked(inputs, runs) if config.view == "sft" else (None, [])
    return Recipe(
        name="search-trees",
        source=source,
        inputs=inputs,
        parse=partial(parse_search_tree, config=config),
        columns=_columns(config, prompt),
        options=_options(config),
        about=ABOUT,
        command="export",
        warnings=run_warnings(runs) + reference_warnings(*unreadable) + doubts,
        warn=partial(_warnings, config=config),
        describe=partial(_describe, config=config, totals=read_totals(files), runs=runs),
        asked=prompt,
    )


def _asked(inputs: list[str], runs: dict[str, dict[str, Any]]) -> tuple[Prompt | None, list[str]]:
    """What the policy was asked in all inputs, or `None` and a warning that says why it is not known."""
    alone = [name for name in inputs if name not in runs]
    prompts = {name: prompt_of(run) for name, run in runs.items()}
    if alone:
        return None, [
            BARE_PROMPTS.format(f"{alone[0]} does not tell what the policy was asked, as a run's folder does")
        ]
    first, *others = prompts
    for name in others:
        if prompts[name].style != prompts[first].style:
            raise ValueError(
                f"{first} was asked in the prompt style {prompts[first].style}, {name} in the style {prompts[name].style}: "
                "rows with texts and rows with messages cannot stand in one dataset. Export them apart."
            )
    for name in others:
        if _rendered_from(prompts[name]) != _rendered_from(prompts[first]):
            return None, [
                BARE_PROMPTS.format(f"{first} and {name} were asked with different prompts; export them apart")
            ]
    return prompts[first], []


def _rendered_from(prompt: Prompt) -> tuple[Any, ...]:
    """What decides the text that a policy is asked."""
    return asked(prompt, ""), prompt.chat_template_kwargs, prompt.chat_template_date


def _columns(config: ExportConfig, prompt: Prompt | None) -> dict[str, pa.DataType]:
    if config.view != "sft":
        return COLUMNS
    is_chat = prompt is not None and prompt.style == "chat"
    return SOLUTION_COLUMNS | ({"prompt": MESSAGES, "completion": MESSAGES} if is_chat else {})


def _openr_recipe(inputs: list[str], config: ExportConfig) -> Recipe:
    for name in ("estimator", "truncated", "min_leaves"):
        if getattr(config, name) != getattr(ExportConfig, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, but openr's files hold values, not outcomes to estimate them from. "
                "Leave it out."
            )
    _refuse_repeats(inputs)
    return Recipe(
        name="search-trees",
        source=OpenrFiles(inputs, config.columns),
        inputs=inputs,
        parse=partial(parse_search_tree, config=config, estimator="recorded"),
        columns=_columns(config, None),
        options={"format": "openr"} | _options(config),
        about=ABOUT_OPENR,
        command="export",
        warnings=[BARE_PROMPTS.format("openr's files do not tell what the policy was asked")] * (config.view == "sft"),
        warn=partial(_warnings, config=config),
        describe=lambda report: {"labels": _describe_labels(config, "recorded")},
    )


def _refuse_repeats(files: list[str]) -> None:
    """Files named twice would double the weight of their problems."""
    named: dict[Path, str] = {}
    for file in files:
        path = Path(file).resolve()
        if path in named:
            raise ValueError(f"{file}: the inputs hold this file twice, first as {named[path]}. Name it once.")
        named[path] = file


def _refuse_guided(files: list[str]) -> None:
    """What follows a step that a reward model chose says little of what the policy alone would write."""
    for folder in dict.fromkeys(Path(file).parent for file in files):
        search = read_manifest(folder)["search"]["search"] if (folder / MANIFEST).is_file() else None
        if search in STRATEGIES:
            raise ValueError(
                f"{folder}: a run of --strategy {search}, in which a reward model chose where to go on: its MC scores would be "
                "those of the guided policy. Make labels of a run of trl-hrm annotate; of this one only --view sft."
            )


def _balanced(recipe: Recipe, config: ExportConfig) -> Recipe:
    """The recipe, with labels of full bins left out. The trees are read once more for it, so that memory stays flat."""
    counts = count_labels(recipe, config, partial(bin_of, num_bins=config.balance))
    bins = [counts[number] for number in range(config.balance)]
    least = min(filter(None, bins), default=0)
    chances = [least / count if count else 1.0 for count in bins]
    return replace(
        recipe,
        parse=partial(recipe.parse, chances=chances),
        describe=lambda report: recipe.describe(report) | {"balance": _describe_bins(bins, chances)},
    )


def parse_search_tree(
    tree: SearchTree,
    where: str,
    notes: Counter,
    config: ExportConfig,
    estimator: str | None = None,
    chances: Sequence[float] | None = None,
) -> list[StepTree]:
    """
    The step trees of a search tree: the tree itself and, for a training problem with `config.hnc`, its compressed view, for
    flat rows without the paths that are as in the tree; or, with `config.view="sft"`, its right solutions.

    Args:
        tree ([`SearchTree`]):
            The tree.
        where (`str`):
            Not used: a search tree was checked when it was read.
        notes (`Counter`):
            Counts of what was united or left out, and of labels by the leaves that they rest on.
        config ([`ExportConfig`]):
            What a label is.
        estimator (`str`, *optional*):
            What the rows call the estimator. By default `config.estimator`.
        chances (`Sequence[float]`, *optional*):
            Chance of a training label to stay, by bin. By default labels are not balanced.

    Raises:
        [`Dropped`]: If the search of this problem did not come to its end, as with `"always_solved"`; for `view="sft"`,
            if no solution is right, or none of the right ones reaches `config.min_score`.
    """
    if tree.status != "done":
        raise Dropped(tree.status)
    extra = {"problem_id": tree.problem.problem_id, "answer": tree.problem.answer}
    extra |= {"estimator": estimator or config.estimator, "truncated": None if estimator else config.truncated}
    extra |= {"label_kind": config.labels, "eta": config.eta}
    if config.view == "sft":
        solutions = right_solutions(tree, config, notes)
        if not solutions:
            found = {name: notes[name] for name in SOLUTION_NOTES}
            raise Dropped("no_solution_with_min_score" if found["solutions_found"] else "no_right_solution", found)
        return [replace(solution, extra=extra | solution.extra) for solution in solutions]
    is_train = problem_split(tree.problem.prompt, config.test_size, config.seed) == "train"
    judged = []
    for source, view in _views(tree, config.hnc and is_train, config, notes):
        step_tree, _ = judge(view, config, notes)
        step_tree.extra = extra | {"source": source}
        if source == "tree":
            _count_evidence(step_tree, notes)
        elif config.view in ("prm", "orm"):
            step_tree = leave_out_copies(step_tree, judged[0], notes)
        judged.append(step_tree)
    if chances is not None:
        for step_tree in judged:
            thin_labels(step_tree, chances if is_train else (), config.seed)
    return judged


def _views(tree: SearchTree, hnc: bool, config: ExportConfig, notes: Counter) -> Iterator[tuple[str, SearchTree]]:
    yield "tree", tree
    if not hnc:
        return
    view = compress(tree, config.hnc_seed, config.hnc_probability, config.hnc_min_children, config.hnc_passes)
    moves = count_moves(view)
    if moves:
        notes["hnc_moved_nodes"] += moves
        yield "hnc", view
    else:
        notes["hnc_trees_without_a_move"] += 1  # the view would be the tree once more


def _count_evidence(tree: StepTree, notes: Counter) -> None:
    leaves = [
        total for total, label in zip(tree.step_columns["mc_total"], tree.labels, strict=True) if label is not None
    ]
    notes["judged_steps"] += len(leaves)
    for least in EVIDENCE:
        notes[f"judged_steps_on_{least}_leaves"] += sum(total >= least for total in leaves)


def _options(config: ExportConfig) -> dict[str, Any]:
    """Options beyond those of all builders, where they are not the default: for the command that builds it again."""
    shared = {field.name for field in fields(BuildConfig)}
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in shared and getattr(config, field.name) != field.default
    }


def _describe(
    report: dict[str, Any], config: ExportConfig, totals: Counter, runs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    notes, tokens = report["notes"], totals["num_tokens"]
    leaves = totals["leaves_answered"] + totals["leaves_unresolved"] + totals["leaves_ungraded"]
    facts = {
        "labels": _describe_labels(config, config.estimator),
        "search": {
            "problems": totals["problems"],
            "nodes": totals["num_nodes"],
            "tokens_generated": tokens,
            "prefix_tokens_cached": totals["num_cached"],
            "leaves": leaves,
            "share_right": _ratio(totals["leaves_correct"], leaves),
            "share_unresolved": _ratio(totals["leaves_unresolved"], leaves),
            "share_ungraded": _ratio(totals["leaves_ungraded"], leaves),
        },
    }
    if config.view != "sft":
        names = {"labels_per_token": "judged_steps"}
        names |= {f"labels_on_{least}_leaves_per_token": f"judged_steps_on_{least}_leaves" for least in EVIDENCE}
        facts["yield"] = {name: _ratio(notes.get(note, 0), tokens) for name, note in names.items()}
    if runs:
        facts["outcomes"] = {name: describe_outcomes(run["solutions"]) for name, run in runs.items()}
    for run in runs.values():
        run["share_of_problems_with_errors"] = _ratio(run["problems"].get("error", 0), sum(run["problems"].values()))
    return facts | ({"run": next(iter(runs.values()))} if len(runs) == 1 else {"runs": runs} if runs else {})


def _describe_labels(config: ExportConfig, estimator: str) -> dict[str, Any]:
    if config.view == "sft":
        chosen = {"min_score": config.min_score, "top_k": config.top_k or "all"}
        return {"estimator": estimator, "truncated": config.truncated} | chosen
    names = ["eta"] * (config.labels == "entropy") + ["truncated", "min_leaves"] * (estimator != "recorded")
    hnc = ["hnc_probability", "hnc_min_children", "hnc_passes", "hnc_seed"] if config.hnc else []
    return {"kind": config.labels, "estimator": estimator} | {name: getattr(config, name) for name in names + hnc}


def _describe_bins(bins: list[int], chances: list[float]) -> dict[str, Any]:
    width = 1 / len(bins)
    return {
        f"labels from {i * width:.3g} to {(i + 1) * width:.3g}": {"before": count, "chance_to_stay": chance}
        for i, (count, chance) in enumerate(zip(bins, chances, strict=True))
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _warnings(report: dict[str, Any], config: ExportConfig) -> list[str]:
    """What the counts of an export of solutions say that its rows do not."""
    warnings = []
    unjudged, repeated = (report["notes"].get(name) for name in ("solutions_with_unjudged_steps", "repeated_problems"))
    if config.min_score > 0 and unjudged:
        warnings.append(
            f"{unjudged} of the solutions have steps without an MC score: min_score={config.min_score:g} asks for the others "
            "alone. A search whose rollouts judge every step has none."
        )
    if repeated:
        warnings.append(
            f"{repeated} problems come in several trees: top_k and duplicates go by tree, so that such a problem may have "
            "more rows than top_k, and equal ones."
        )
    return warnings
