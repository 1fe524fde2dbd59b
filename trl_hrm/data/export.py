"""Build datasets from search trees, with statistics of the search on the dataset card."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..io import shown
from ..search.compression import count_moves
from ..search.nodes import read_totals, read_unreadable_references
from ..search.outcomes import describe_outcomes, reference_warnings
from ..search.prompts import Prompt
from ..search.run_folder import MANIFEST, node_files, read_manifest, read_summary
from ..search.step_search import STRATEGIES
from ..search.thinking import MARKS
from ..search.tree import SearchTree
from ..step_tree import StepTree
from .build import Dropped, Recipe, build_dataset, count_labels
from .build_config import BuildConfig
from .build_report import BuildReport
from .consensus import (
    CONFUSION,
    JudgedNodeFiles,
    JudgedTree,
    compare_solutions,
    describe_consensus,
    keep_solutions,
    read_judges,
)
from .export_config import ExportConfig
from .output import claimed_output
from .problems import problem_split
from .self_training import MESSAGES, asked, prompt_of
from .step_labels import (
    Cell,
    compressed,
    keep_chances,
    label_cells,
    label_steps,
    leave_out_copies,
    sft_kind,
    sft_rows,
    thin_labels,
)
from .tree_files import NodeFiles, OpenrFiles, run_warnings


EVIDENCE = (2, 4, 8, 16)  # the card has the number of labels that are estimated from at least this many leaves

ABOUT = {
    "title": "Step trees of a search",
    "description": "Problems with trees of solution steps sampled from a policy. The label of a step is estimated from the outcomes of "
    "the solutions that continue it, without human annotation.",
    "source": "Made with trl_hrm. The terms of use of the problems and of the policy apply.",
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
    "mc_scores": pa.list_(pa.float64()),
    "prompt_mc_score": pa.float64(),
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
BARE_PROMPTS = (
    "`prompt` is the bare problem in all rows, because {}. If the policy was given a different prompt, training uses another prompt "
    "than sampling."
)
DIFFERENT_JUDGES = (
    "the runs were judged by different models or with different templates, so the agreement mixes them. Export the runs separately to "
    "compare the judges."
)


def export(config: ExportConfig) -> BuildReport:
    """
    Build a dataset of labelled steps, or of correct solutions, from search trees. This does not need the policy, so an export can
    be repeated with other options.

    Args:
        config ([`ExportConfig`]):
            Inputs and options of the export.

    Returns:
        [`BuildReport`]: Report of what was read, written and dropped.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `FileNotFoundError`: If an input does not exist.
        `ValueError`: If an input is given twice or is invalid, if labels are requested for a search that was guided by a reward
            model, if `view="sft"` would mix chat and plain prompts, or if no row is left for training.
    """
    with claimed_output(config, config.inputs) as output:
        recipe = _openr_recipe(config) if config.format == "openr" else _run_recipe(config)
        if config.balance:
            # Count in a separate pass over the trees, since holding all labels in memory would not scale
            cells = partial(label_cells, num_bins=config.balance, by=config.balance_by)
            counts = count_labels(recipe, config, cells)
            chances = keep_chances(counts)
            balance = {}
            for depth in sorted({cell[:-1] for cell in counts}):
                for number in range(config.balance):
                    edges = f"labels from {number / config.balance:.3g} to {(number + 1) / config.balance:.3g}"
                    cell = (*depth, number)
                    balance["".join(f"depth {i}, " for i in depth) + edges] = {
                        "before": counts[cell],
                        "chance_to_stay": chances.get(cell, 1.0),
                    }
            describe = recipe.describe
            recipe = replace(
                recipe,
                parse=partial(recipe.parse, chances=chances),
                describe=lambda report: describe(report) | {"balance": balance},
            )
        return build_dataset(recipe, config, output)


def _run_recipe(config: ExportConfig) -> Recipe:
    if config.columns:
        raise ValueError(f"`columns` is {config.columns}, but `format='run'` does not support it. Remove `columns`.")
    folders = [name for name in config.inputs if Path(name).is_dir()]
    run_of = [
        (str(file), name) for name in config.inputs for file in (node_files(name) if name in folders else [name])
    ]
    files = [file for file, _ in run_of]
    _refuse_repeats(files)
    parents = dict.fromkeys(Path(file).parent for file in files)
    uneven = []
    for folder in parents:
        needed = [] if config.view == "sft" else ["search"]
        manifest = read_manifest(folder, needed) if (folder / MANIFEST).is_file() else {}
        search = manifest.get("search", {}).get("search")
        if search in STRATEGIES and config.view != "sft":
            # Labels must estimate what the policy alone writes after a step, not what a reward model selects
            raise ValueError(
                f"{folder}: the run used --strategy {search}, in which a reward model selects the steps, so its MC scores would not "
                "estimate the policy alone. Export it with --view sft, or make labels from a run of trl-hrm annotate."
            )
        if search == "full_tree" and "more_from" in manifest and config.estimator == "leaf_share":
            uneven.append(
                f"{folder}: the run is a full tree with more rollouts (--more_from). With leaf_share, a step with more rollouts counts more "
                "often in the scores of the steps before it. Use --estimator child_mean."
            )
    if config.merge == "thoughts":
        for folder in parents:
            steps = read_manifest(folder).get("steps", {}) if (folder / MANIFEST).is_file() else {}
            if "marks" in steps and set(steps["marks"]) != set(config.thinking_marks or MARKS):
                raise ValueError(
                    f"{folder}: the run split thinking at other marks than those of the merged thoughts: {shown(steps['marks'], 200)}. Set "
                    "`thinking_marks` to the marks of the run."
                )
    if config.consensus:
        for name in config.inputs:
            if name not in folders:
                raise ValueError(
                    f"{name} is not the folder of a run, so it has no verdicts for `consensus`. Give the folder that `trl-hrm judge` has "
                    "judged, or remove `consensus`."
                )
        source = JudgedNodeFiles(dict(run_of), config.judge_name)
    else:
        source = NodeFiles(files)
    needed = ["prompt"] if config.view == "sft" else []
    runs = {name: read_manifest(name, needed) | read_summary(name) for name in folders}
    for name, run in runs.items():
        if config.consensus and not run["shards_missing"]:
            source.check_problems(name)
    judges = read_judges(list(runs), config.judge_name) if config.consensus else {}
    different = {json.dumps([one.get("identity"), one.get("template")], sort_keys=True) for one in judges.values()}
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
        warnings=run_warnings(runs)
        + uneven
        + reference_warnings(*unreadable)
        + doubts
        + [DIFFERENT_JUDGES] * (len(different) > 1),
        warn=partial(_warnings, config=config),
        describe=partial(_describe, config=config, totals=read_totals(files), runs=runs, judges=judges),
        asked=prompt,
    )


def _common_prompt(inputs: list[str], runs: dict[str, dict[str, Any]]) -> tuple[Prompt | None, list[str]]:
    """Return the prompt that the policy was given in all inputs, or `None` and a warning why it is unknown."""
    alone = [name for name in inputs if name not in runs]
    if alone:
        return None, [
            BARE_PROMPTS.format(
                f"{alone[0]} does not record the prompt of the policy, unlike a folder of `trl-hrm annotate`"
            )
        ]
    prompts = {name: prompt_of(run) for name, run in runs.items()}
    rendered = {  # everything that determines the prompt, except the problem
        name: (asked(prompt, ""), prompt.chat_template_kwargs, prompt.chat_template_date)
        for name, prompt in prompts.items()
    }
    first, *others = prompts
    for name in others:
        if prompts[name].style != prompts[first].style:
            raise ValueError(
                f"{first} has the prompt style {prompts[first].style}, but {name} has {prompts[name].style}. A dataset cannot mix "
                "plain and chat prompts. Export them separately."
            )
    for name in others:
        if rendered[name] != rendered[first]:
            return None, [
                BARE_PROMPTS.format(
                    f"{first} and {name} used different prompts (export them separately to keep these)"
                )
            ]
    return prompts[first], []


def _columns(config: ExportConfig, prompt: Prompt | None) -> dict[str, pa.DataType]:
    if config.view != "sft":
        return COLUMNS
    is_chat = prompt is not None and prompt.style == "chat"
    complete = {"is_complete": pa.bool_()} if config.prefixes else {}
    return SOLUTION_COLUMNS | complete | ({"prompt": MESSAGES, "completion": MESSAGES} if is_chat else {})


def _openr_recipe(config: ExportConfig) -> Recipe:
    for name in ("estimator", "truncated", "min_leaves"):
        if getattr(config, name) != getattr(ExportConfig, name):
            raise ValueError(
                f"`{name}` is {shown(getattr(config, name))}, but openr files contain values, not outcomes to estimate them from. Remove "
                f"`{name}`."
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
        warnings=[BARE_PROMPTS.format("openr files do not record the prompt of the policy")] * (config.view == "sft"),
        warn=partial(_warnings, config=config),
        describe=lambda report: {"labels": _describe_labels(config, "recorded")},
    )


def _refuse_repeats(files: list[str]) -> None:
    """Raise an error if a file is given twice, since this would double the weight of its problems."""
    named: dict[Path, str] = {}
    for file in files:
        path = Path(file).resolve()
        if path in named:
            raise ValueError(f"{file}: this file is already in the inputs, as {named[path]}. Give it once.")
        named[path] = file


def parse_search_tree(
    record: SearchTree | JudgedTree,
    where: str,
    notes: Counter,
    config: ExportConfig,
    estimator: str | None = None,
    chances: Mapping[Cell, float] | None = None,
) -> list[StepTree]:
    """
    Return the step trees of a search tree.

    These are the labelled tree itself and, for a training problem with `config.hnc`, its compressed view. In the flat views, the
    compressed view has only the paths that differ from the tree. With `config.view="sft"`, each tree is one row of [`sft_rows`]. With
    `config.consensus`, the tree is reduced to the solutions that [`compare_solutions`] compares and that are kept.

    Args:
        record ([`SearchTree`] or [`JudgedTree`]):
            Search tree of a problem. With `config.consensus`, with the verdicts on its solutions.
        where (`str`):
            File and problem, for error messages.
        notes (`Counter`):
            Counter of merged and dropped nodes, and of labels by the number of leaves they are estimated from. It is updated in
            place.
        config ([`ExportConfig`]):
            Options of the export.
        estimator (`str`, *optional*):
            Name of the estimator to write to the rows. Defaults to `config.estimator`.
        chances (`Mapping[Cell, float]`, *optional*):
            Probability of keeping a training label, per cell. By default, labels are not balanced.

    Raises:
        [`Dropped`]: If the search of this problem did not finish, as with the status `"always_solved"`. For `view="sft"`, if no
            solution is correct, or no correct solution, or no prefix, reaches `config.min_mc_score`. With `config.consensus`, if no
            solution is kept.
        `ValueError`: With `config.consensus`, if a verdict matches no solution of the tree.
    """
    tree, verdicts = record if isinstance(record, JudgedTree) else (record, None)
    if tree.status != "done":
        raise Dropped(tree.status)
    extra = {"problem_id": tree.problem.problem_id, "answer": tree.problem.answer}
    extra |= {"estimator": estimator or config.estimator, "truncated": None if estimator else config.truncated}
    extra |= {"label_kind": config.labels, "eta": config.eta}
    is_train = problem_split(tree.problem.prompt, config.test_size, config.seed) == "train"
    views = [("tree", tree)]
    if config.hnc and is_train:
        view = compressed(tree, config)
        if count_moves(view):
            views.append(("hnc", view))
            # A moved blank node, such as the end after a last step, gives no merged step
            moved = [
                i for i, node in enumerate(view.nodes) if node.merged_from is not None and all(view.step_pieces(i))
            ]
            notes["hnc_moved_nodes"] += len(moved)
        else:
            notes["hnc_trees_without_a_move"] += 1  # the view is identical to the tree
    if config.view == "sft":
        rows = sft_rows(tree, config, notes, dict(views).get("hnc"))
        if not rows:
            kind = sft_kind(config)
            found = {name: notes[name] for name in (f"{kind}_found", f"duplicate_{kind}", f"{kind}_below_min_score")}
            is_below = config.prefixes or found["solutions_found"]
            raise Dropped(
                f"no_{'prefix' if config.prefixes else 'solution'}_with_min_score"
                if is_below
                else "no_right_solution",
                found,
            )
        return [replace(row, extra=extra | row.extra) for row in rows]
    kept = None
    if verdicts is not None:
        compared = compare_solutions(tree, verdicts, config, where, notes)
        kept = [solution for solution in compared if config.disagreement == "weight" or solution.is_agreed]
        if not kept:
            raise Dropped("no_agreed_solution" if compared else "no_compared_solution", notes)
    labelled = []
    for source, view in views:
        step_tree, members = label_steps(view, config, notes)
        if kept is not None:
            step_tree = keep_solutions(step_tree, members, kept, config, notes)
            if all(label is None for label in step_tree.labels):
                raise Dropped("no_labelled_step", notes)
        step_tree.extra |= extra | {"source": source}
        if source == "tree":
            totals = zip(step_tree.step_columns["mc_total"], step_tree.labels, strict=True)
            leaves = [total for total, label in totals if label is not None]
            notes["labelled_steps_of_trees"] += len(leaves)
            for least in EVIDENCE:
                notes[f"labelled_steps_of_trees_on_{least}_leaves"] += sum(total >= least for total in leaves)
        else:
            same = labelled[0].completions, labelled[0].parents, labelled[0].labels
            if (step_tree.completions, step_tree.parents, step_tree.labels) == same:  # only blank nodes moved
                notes["hnc_trees_without_a_move"] += 1
                continue
            if config.view in ("prm", "orm"):
                step_tree = leave_out_copies(step_tree, labelled[0], notes)
        labelled.append(step_tree)
    if chances is not None:
        for step_tree in labelled:
            cells = label_cells(step_tree, config.balance, config.balance_by)
            thin_labels(step_tree, cells, chances if is_train else {}, config.seed)
    return labelled


def _options(config: ExportConfig) -> dict[str, Any]:
    """Return the options that are not in [`BuildConfig`] and differ from their defaults, for the rebuild command."""
    shared = {"inputs", *(field.name for field in fields(BuildConfig))}
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in shared and getattr(config, field.name) != field.default
    }


def _describe(
    report: dict[str, Any],
    config: ExportConfig,
    totals: Counter,
    runs: dict[str, dict[str, Any]],
    judges: dict[str, dict[str, Any]],
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
    if config.consensus:
        facts["consensus"] = describe_consensus(notes, config, judges)
    if config.view != "sft":
        names = {"labels_per_token": "labelled_steps_of_trees"}
        names |= {
            f"labels_on_{least}_leaves_per_token": f"labelled_steps_of_trees_on_{least}_leaves" for least in EVIDENCE
        }
        facts["yield"] = {name: _ratio(notes.get(note, 0), tokens) for name, note in names.items()}
    if runs:
        facts["outcomes"] = {name: describe_outcomes(run["solutions"]) for name, run in runs.items()}
    for run in runs.values():
        run["share_of_problems_with_errors"] = _ratio(run["problems"].get("error", 0), sum(run["problems"].values()))
    return facts | ({"run": next(iter(runs.values()))} if len(runs) == 1 else {"runs": runs} if runs else {})


def _describe_labels(config: ExportConfig, estimator: str) -> dict[str, Any]:
    hnc = ["hnc_rule", "hnc_probability", "hnc_min_children", "hnc_passes", "hnc_seed"] if config.hnc else []
    hnc = {name: getattr(config, name) for name in hnc}
    if config.view == "sft":
        chosen = {"min_mc_score": config.min_mc_score, "max_solutions": config.max_solutions or "all"}
        rows = {"rows": "prefixes" if config.prefixes else "correct solutions"}
        return {"estimator": estimator, "truncated": config.truncated} | rows | chosen | hnc
    names = (
        ["eta"] * (config.labels == "entropy")
        + ["threshold"] * (config.labels == "hard")
        + ["truncated", "min_leaves"] * (estimator != "recorded")
    )
    return {"kind": config.labels, "estimator": estimator} | {name: getattr(config, name) for name in names} | hnc


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _warnings(report: dict[str, Any], config: ExportConfig) -> list[str]:
    """Return warnings about node compression, solutions or a consensus, based on the counts of the export."""
    warnings = []
    notes = report["notes"]
    if config.hnc and not notes.get("hnc_moved_nodes"):
        warnings.append(
            "`hnc` is set, but no step was merged. In the trees of the training problems, a node can lose a child with "
            f"hnc_probability={config.hnc_probability:g} if it has hnc_min_children={config.hnc_min_children} or more sampled next steps, "
            "and the budget dropped none of them. Lower `hnc_min_children`, or use a run of trl-hrm annotate --search full_tree with more "
            "--num_children or a larger budget (--max_sequences)."
        )
    unlabelled, repeated = (notes.get(name) for name in ("solutions_with_unlabelled_steps", "repeated_problems"))
    if config.min_mc_score > 0 and unlabelled:
        warnings.append(
            f"{unlabelled} of the solutions have steps without an MC score. min_mc_score={config.min_mc_score:g} is only applied to their "
            "other steps. To have MC scores for all steps, use a search with rollouts from every step."
        )
    unfinished = sum(report["rows"].values()) - notes.get("complete_solutions", 0) if config.prefixes else 0
    if unfinished:
        warnings.append(
            f"{unfinished} of {sum(report['rows'].values())} rows end before the end of the solution (is_complete is false). "
            "Train on them with trl-hrm kl-self, which does not train on an end of sequence there (--kl_coef 0 for plain "
            "fine-tuning). TRL's SFTTrainer would teach the policy to stop in the middle of a solution."
        )
    if repeated:
        warnings.append(
            f"{repeated} problems have several trees. max_solutions and the removal of duplicates apply per tree, so these problems may "
            "have duplicate rows and more rows than max_solutions."
        )
    confusion = {name: notes.get(f"consensus_{name}", 0) for name in CONFUSION}
    missed, compared = confusion["mc_none_judge_error"] + confusion["mc_error_judge_earlier"], sum(confusion.values())
    if 4 * missed > compared:
        warnings.append(
            f"in {missed:,} of {compared:,} compared solutions, the judge names a wrong step whose MC score is above threshold="
            f"{config.threshold:g}. Policies reach the right answer from wrong steps that they correct. If these steps should count as "
            "wrong, raise --threshold, such as to 0.5. Otherwise, check some verdicts of the judge."
        )
    return warnings
