"""Searched trees as datasets: runs and files to rows, with the facts of the search on the card."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..search.compression import compress, count_moves
from ..search.nodes import read_totals, read_unreadable_references
from ..search.outcomes import describe_outcomes, reference_warnings
from ..search.prompts import Prompt
from ..search.run_folder import MANIFEST, node_files, read_manifest, read_summary
from ..search.step_search import STRATEGIES
from ..search.tree import SearchTree
from ..step_tree import StepTree
from .build import Dropped, Recipe, build_dataset, count_labels
from .build_config import BuildConfig
from .build_report import BuildReport
from .export_config import ExportConfig
from .problems import problem_split
from .self_training import MESSAGES, asked, prompt_of
from .step_labels import bin_of, label_steps, leave_out_copies, right_solutions, thin_labels
from .tree_files import NodeFiles, OpenrFiles, run_warnings


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


def export(config: ExportConfig) -> BuildReport:
    """
    Build a dataset of judged steps, or of correct solutions, from searched trees. No policy is needed, so an export can be repeated
    with other options.

    Args:
        config ([`ExportConfig`]):
            What to read, what a label is, and what a row is.

    Returns:
        [`BuildReport`]: What was read, written and dropped.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `FileNotFoundError`: If an input does not exist.
        `ValueError`: If an input is given twice, or holds something else than expected; if labels are to be made of a search that
            a reward model led; if runs of chat and plain prompts would be in one dataset of solutions; if no row is left for
            training.
    """
    recipe = _openr_recipe(config) if config.format == "openr" else _run_recipe(config)
    if config.balance:
        # The trees are read once more for the counts, so that memory stays flat
        counts = count_labels(recipe, config, partial(bin_of, num_bins=config.balance))
        bins = [counts[number] for number in range(config.balance)]
        least = min(filter(None, bins), default=0)
        chances = [least / count if count else 1.0 for count in bins]
        edges = [f"labels from {i / len(bins):.3g} to {(i + 1) / len(bins):.3g}" for i in range(len(bins))]
        balance = {
            edge: {"before": count, "chance_to_stay": chance}
            for edge, count, chance in zip(edges, bins, chances, strict=True)
        }
        describe = recipe.describe
        recipe = replace(
            recipe,
            parse=partial(recipe.parse, chances=chances),
            describe=lambda report: describe(report) | {"balance": balance},
        )
    return build_dataset(recipe, config)


def _run_recipe(config: ExportConfig) -> Recipe:
    if config.columns:
        raise ValueError(f"columns is {config.columns}, and runs have columns of their own. Leave it out.")
    folders = [name for name in config.inputs if Path(name).is_dir()]
    files = [str(file) for name in config.inputs for file in (node_files(name) if name in folders else [name])]
    _refuse_repeats(files)
    for folder in dict.fromkeys(Path(file).parent for file in files if config.view != "sft"):
        # What follows a step that a reward model chose says little of what the policy alone would write
        search = read_manifest(folder)["search"]["search"] if (folder / MANIFEST).is_file() else None
        if search in STRATEGIES:
            raise ValueError(
                f"{folder}: a run of --strategy {search}, in which a reward model chose where to go on: its MC scores would be "
                "those of the guided policy. Make labels of a run of trl-hrm annotate; of this one only --view sft."
            )
    source = NodeFiles(files)
    runs = {name: read_manifest(name) | read_summary(name) for name in folders}
    unreadable = read_unreadable_references([name for name in config.inputs if name not in folders])
    prompt, doubts = _common_prompt(config.inputs, runs) if config.view == "sft" else (None, [])
    return Recipe(
        name="search-trees",
        source=source,
        inputs=config.inputs,
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


def _common_prompt(inputs: list[str], runs: dict[str, dict[str, Any]]) -> tuple[Prompt | None, list[str]]:
    """What the policy was asked in all inputs, or `None` and a warning that says why it is not known."""
    alone = [name for name in inputs if name not in runs]
    if alone:
        return None, [
            BARE_PROMPTS.format(f"{alone[0]} does not tell what the policy was asked, as a run's folder does")
        ]
    prompts = {name: prompt_of(run) for name, run in runs.items()}
    rendered = {  # what decides the text that a policy is asked
        name: (asked(prompt, ""), prompt.chat_template_kwargs, prompt.chat_template_date)
        for name, prompt in prompts.items()
    }
    first, *others = prompts
    for name in others:
        if prompts[name].style != prompts[first].style:
            raise ValueError(
                f"{first} was asked in the prompt style {prompts[first].style}, {name} in the style {prompts[name].style}: "
                "rows with texts and rows with messages cannot stand in one dataset. Export them apart."
            )
    for name in others:
        if rendered[name] != rendered[first]:
            return None, [
                BARE_PROMPTS.format(f"{first} and {name} were asked with different prompts; export them apart")
            ]
    return prompts[first], []


def _columns(config: ExportConfig, prompt: Prompt | None) -> dict[str, pa.DataType]:
    if config.view != "sft":
        return COLUMNS
    is_chat = prompt is not None and prompt.style == "chat"
    return SOLUTION_COLUMNS | ({"prompt": MESSAGES, "completion": MESSAGES} if is_chat else {})


def _openr_recipe(config: ExportConfig) -> Recipe:
    for name in ("estimator", "truncated", "min_leaves"):
        if getattr(config, name) != getattr(ExportConfig, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, but openr's files hold values, not outcomes to estimate them from. "
                "Leave it out."
            )
    _refuse_repeats(config.inputs)
    return Recipe(
        name="search-trees",
        source=OpenrFiles(config.inputs, config.columns),
        inputs=config.inputs,
        parse=partial(parse_search_tree, config=config, estimator="recorded"),
        columns=_columns(config, None),
        options=_options(config),
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
            if no solution is right, or none of the right ones reaches `config.min_mc_score`.
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
    views = [("tree", tree)]
    if config.hnc and is_train:
        view = compress(tree, config.hnc_seed, config.hnc_probability, config.hnc_min_children, config.hnc_passes)
        moves = count_moves(view)
        if moves:
            notes["hnc_moved_nodes"] += moves
            views.append(("hnc", view))
        else:
            notes["hnc_trees_without_a_move"] += 1  # the view would be the tree once more
    labelled = []
    for source, view in views:
        step_tree, _ = label_steps(view, config, notes)
        step_tree.extra = extra | {"source": source}
        if source == "tree":
            totals = zip(step_tree.step_columns["mc_total"], step_tree.labels, strict=True)
            leaves = [total for total, label in totals if label is not None]
            notes["judged_steps"] += len(leaves)
            for least in EVIDENCE:
                notes[f"judged_steps_on_{least}_leaves"] += sum(total >= least for total in leaves)
        elif config.view in ("prm", "orm"):
            step_tree = leave_out_copies(step_tree, labelled[0], notes)
        labelled.append(step_tree)
    if chances is not None:
        for step_tree in labelled:
            thin_labels(step_tree, chances if is_train else (), config.seed)
    return labelled


def _options(config: ExportConfig) -> dict[str, Any]:
    """Options beyond those of all builders, where they are not the default: for the command that builds it again."""
    shared = {"inputs", *(field.name for field in fields(BuildConfig))}
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
        chosen = {"min_mc_score": config.min_mc_score, "max_solutions": config.max_solutions or "all"}
        return {"estimator": estimator, "truncated": config.truncated} | chosen
    names = ["eta"] * (config.labels == "entropy") + ["truncated", "min_leaves"] * (estimator != "recorded")
    hnc = ["hnc_probability", "hnc_min_children", "hnc_passes", "hnc_seed"] if config.hnc else []
    return {"kind": config.labels, "estimator": estimator} | {name: getattr(config, name) for name in names + hnc}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _warnings(report: dict[str, Any], config: ExportConfig) -> list[str]:
    """What the counts of an export of solutions say that its rows do not."""
    warnings = []
    unjudged, repeated = (report["notes"].get(name) for name in ("solutions_with_unjudged_steps", "repeated_problems"))
    if config.min_mc_score > 0 and unjudged:
        warnings.append(
            f"{unjudged} of the solutions have steps without an MC score: min_mc_score={config.min_mc_score:g} asks for the others "
            "alone. A search whose rollouts judge every step has none."
        )
    if repeated:
        warnings.append(
            f"{repeated} problems come in several trees: max_solutions and duplicates go by tree, so that such a problem may have "
            "more rows than max_solutions, and equal ones."
        )
    return warnings
