r"""
Consensus of Monte Carlo and a judge: compare the first wrong step of each solution, and keep the solutions in which both agree
([Qwen](https://huggingface.co/papers/2501.07301)).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..identity import digest_of_files
from ..intervals import wilson_interval
from ..io import read_json, shown
from ..search.nodes import open_nodes
from ..search.run_folder import MANIFEST
from ..search.tree import SearchTree
from ..search.values import leaf_counts
from ..step_tree import StepTree
from .export_config import ExportConfig
from .sources import Address
from .step_labels import score_steps, solution_ends, unite_steps
from .tree_files import NodeFiles
from .verdicts import JUDGES, NO_ERROR, VERDICTS, Verdict, read_verdicts


# Verdicts of a problem by the ids of the steps of its solutions
Verdicts = Mapping[tuple[str, ...], Verdict]

# Why a solution cannot be compared
NOT_COMPARED = (
    "without_verdict",  # the judge has not judged it
    "unreadable_votes",  # no vote of the judge is readable
    "tied_votes",  # several steps have the most votes
    "unknown_mc_score",  # the first wrong step is unknown, because a step at or before it has no MC score
    "wrong_answer_without_error",  # all MC scores are above the threshold, but the answer is wrong
)
# First wrong step by Monte Carlo and by the judge
CONFUSION = (
    "mc_none_judge_none",
    "mc_none_judge_error",
    "mc_error_judge_none",
    "mc_error_judge_earlier",
    "mc_error_judge_same",
    "mc_error_judge_later",
)
AGREED = ("mc_none_judge_none", "mc_error_judge_same")


class JudgedTree(NamedTuple):
    """A search tree with the verdicts on its solutions."""

    tree: SearchTree
    verdicts: Verdicts


class JudgedNodeFiles(NodeFiles):
    """
    Reader of search trees with the verdicts of a judge. A record is a [`JudgedTree`].

    Args:
        files (`Mapping[str, str]`):
            Folder of the run of each file of nodes.
        judge_name (`str`):
            Name of the judge, whose verdicts are read from each run.

    Raises:
        `FileNotFoundError`: If a run has not been judged.
        `ValueError`: If a run has no verdicts, or two verdicts for the same solution.
    """

    def __init__(self, files: Mapping[str, str], judge_name: str):
        super().__init__(list(files))
        runs = dict.fromkeys(files.values())
        self.verdicts: dict[str, dict[str, dict[tuple[str, ...], Verdict]]] = {}  # by run and problem
        for run in runs:
            where = Path(run, JUDGES, judge_name, VERDICTS)
            found: dict[str, dict[tuple[str, ...], Verdict]] = defaultdict(dict)
            for verdict in read_verdicts(run, judge_name):
                if verdict.node_ids in found[verdict.problem_id]:
                    raise ValueError(
                        f"{where}: found two verdicts for the same solution of problem {shown(verdict.problem_id)}, expected one. "
                        f"Run `trl-hrm judge {run}` again to write the file."
                    )
                found[verdict.problem_id][verdict.node_ids] = verdict
            if not found:
                raise ValueError(f"{where} has no verdicts. Run `trl-hrm judge {run}` to the end.")
            self.verdicts[run] = dict(found)
        self.run_of = list(files.values())

    def check_problems(self, run: str) -> None:
        """Raise `ValueError` if a verdict is about a problem that is not in the files of the run."""
        known = set()
        for file, of_run in zip(self.files, self.run_of, strict=True):
            if of_run == run:
                with open_nodes(file) as opened:
                    known.update(opened.read(["problem_id"])["problem_id"].to_pylist())
        unknown = [name for name in self.verdicts[run] if name not in known]
        if unknown:
            raise ValueError(_stale(f"{run}: problem {shown(unknown[0])} has verdicts, but is not in the run"))

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, JudgedTree]]:
        verdicts = self.verdicts[self.run_of[chunk["file"]]]
        for where, address, tree in super().read(chunk):
            yield where, address, JudgedTree(tree, verdicts.get(tree.problem.problem_id, {}))


class ComparedSolution(NamedTuple):
    """
    A solution whose first wrong step is known from the MC scores, with the votes of a judge on it.

    Args:
        end (`int`):
            United step that ends the solution.
        nodes (`Sequence[int]`):
            Nodes that end the solution.
        first_error (`int`):
            Index of the first wrong step by the MC scores, from 0. `-1` (`NO_ERROR`): all steps are right.
        agreement (`float`):
            Share of the readable votes of the judge that name the same step.
        is_agreed (`bool`):
            Whether the judge, by the most frequent vote, names the same step.
    """

    end: int
    nodes: Sequence[int]
    first_error: int
    agreement: float
    is_agreed: bool


def compare_solutions(
    tree: SearchTree, verdicts: Verdicts, config: ExportConfig, where: str, notes: Counter
) -> list[ComparedSolution]:
    """
    Compare the first wrong step of each complete solution of a search tree by its MC scores and by the verdict of a judge.

    By the MC scores, the first wrong step is the first step whose score in the whole tree is not above `config.threshold`. With the
    default of 0, a step is right if any rollout after it is right, as in Math-Shepherd and Qwen's report.

    A solution is not compared, but counted, if

    - it has no verdict, no vote is readable, or several steps have the most votes. In the last case, it is still returned with
      `config.disagreement="weight"`, because its votes have a weight,
    - a step at or before its first wrong step has no MC score, or one from fewer than `config.min_leaves` leaves. The step that ends
      the solution needs only its own leaf,
    - all MC scores are above the threshold, but the answer is wrong. This can only happen where the last step also continues in the
      tree. If the answer is unknown, the first wrong step is unknown, too.

    A correct solution may have a wrong step by the MC scores, for example if all other rollouts from this step are wrong. Such a
    solution is compared and counted.

    Args:
        tree ([`SearchTree`]):
            Search tree of a problem.
        verdicts (`Mapping[tuple[str, ...], Verdict]`):
            Verdicts on its solutions, by the ids of their steps.
        config ([`ExportConfig`]):
            Options of the export.
        where (`str`):
            File and problem, for error messages.
        notes (`Counter`):
            Counter of the solutions by the result of the comparison. It is updated in place.

    Raises:
        `ValueError`: If a verdict matches no solution of the tree.
    """
    steps = unite_steps(tree, Counter(), config.merge_separator)
    scores, are_enough = score_steps(tree, steps.members, leaf_counts(tree), config)
    unmatched = dict(verdicts)
    compared = []
    for end, nodes in solution_ends(tree, steps).items():
        notes["consensus_solutions"] += 1
        path = steps.path(end)
        verdict = unmatched.pop(tuple(tree.nodes[steps.members[step][0]].node_id for step in path), None)
        if verdict is None:
            notes["consensus_without_verdict"] += 1
            continue
        judged = verdict.first_error
        if not verdict.readable:
            notes["consensus_unreadable_votes"] += 1
            continue
        if judged is None and config.disagreement == "drop":
            notes["consensus_tied_votes"] += 1
            continue
        found: int | None = NO_ERROR
        for place, step in enumerate(path):
            if scores[step] is None or not (are_enough[step] or step == end):
                found = None
                break
            if scores[step] <= config.threshold:
                found = place
                break
        outcomes = {tree.nodes[i].correct for i in nodes} - {None}
        if found is None or (found == NO_ERROR and not outcomes):
            notes["consensus_unknown_mc_score"] += 1
            continue
        if found == NO_ERROR and False in outcomes:
            notes["consensus_wrong_answer_without_error"] += 1
            continue
        if judged is None:
            cell = "tied_votes"
        elif found == NO_ERROR:
            cell = f"mc_none_judge_{'none' if judged == NO_ERROR else 'error'}"
        elif judged == NO_ERROR:
            cell = "mc_error_judge_none"
        else:
            cell = f"mc_error_judge_{'same' if judged == found else 'earlier' if judged < found else 'later'}"
        notes[f"consensus_{cell}"] += 1
        if judged is not None and found != NO_ERROR and outcomes == {True}:
            notes["consensus_right_answer_with_error"] += 1
        compared.append(ComparedSolution(end, nodes, found, verdict.agreement(found), cell in AGREED))
    if unmatched:
        node_ids = list(next(iter(unmatched)))
        raise ValueError(_stale(f"{where}: the verdict on the steps {shown(node_ids, 200)} matches no solution"))
    return compared


def keep_solutions(
    labelled: StepTree,
    members: list[list[int]],
    solutions: Sequence[ComparedSolution],
    config: ExportConfig,
    notes: Counter,
) -> StepTree:
    """
    Return the union of some solutions of a labelled tree.

    With `config.after_first_error="context"`, steps after the first wrong step lose their label. Whether a step is after a wrong
    step depends only on the scores of the steps before it, so it is the same in all solutions that share the step.

    With `config.disagreement="weight"`, the column `label_weights` is added. The weight of a label is the share of the readable
    votes that name the same first wrong step as the MC scores, as a mean over the solutions that share the step. Steps without a
    label have the weight 0.

    Args:
        labelled ([`StepTree`]):
            Labelled tree, from [`label_steps`].
        members (`list[list[int]]`):
            For each of its steps, the nodes that form it.
        solutions (`Sequence[ComparedSolution]`):
            Solutions to keep.
        config ([`ExportConfig`]):
            Options of the export.
        notes (`Counter`):
            Counter of dropped steps and labels. It is updated in place.
    """
    if config.view == "orm":  # here a step that ends a solution is apart from a step with the same text that continues
        ended = {i: solution for solution in solutions for i in solution.nodes}
        ends = {step: ended[i] for step, group in enumerate(members) for i in group if i in ended}
    else:
        ends = {solution.end: solution for solution in solutions}
    agreements: dict[int, list[float]] = defaultdict(list)
    labels = list(labelled.labels)
    for end, solution in ends.items():
        for place, step in enumerate(labelled.path(end)):
            agreements[step].append(solution.agreement)
            is_after = solution.first_error != NO_ERROR and place > solution.first_error
            if (
                is_after
                and config.after_first_error == "context"
                and config.view != "orm"
                and labels[step] is not None
            ):
                labels[step] = None
                notes["consensus_labels_after_first_error"] += 1
    notes["consensus_steps_dropped"] += len(labels) - len(agreements)
    columns = dict(labelled.step_columns)
    if config.disagreement == "weight":
        columns["label_weights"] = [
            0.0 if label is None or step not in agreements else fmean(agreements[step])
            for step, label in enumerate(labels)
        ]
    return replace(labelled, labels=labels, step_columns=columns).keep(sorted(agreements))


def read_judges(runs: Sequence[str], judge_name: str) -> dict[str, dict[str, Any]]:
    """
    Return the digest of the verdicts on each run and, if the folder of the judge has a manifest, the identity, the engine and the
    name of the template of the judge.

    Args:
        runs (`Sequence[str]`):
            Folders of the runs.
        judge_name (`str`):
            Name of the judge.
    """
    judges = {}
    for run in runs:
        folder = Path(run, JUDGES, judge_name)
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
        judges[run] = {"verdicts": digest_of_files([folder / VERDICTS])}
        judges[run] |= {name: manifest[name] for name in ("identity", "engine") if name in manifest}
        if "template" in manifest:
            judges[run]["template"] = manifest["template"]["name"]
    return judges


def describe_consensus(notes: Mapping[str, int], config: ExportConfig, judges: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the agreement of Monte Carlo and the judge, for the report and the dataset card.

    Args:
        notes (`Mapping[str, int]`):
            Counts of [`compare_solutions`] and [`keep_solutions`].
        config ([`ExportConfig`]):
            Options of the export.
        judges (`Mapping[str, Any]`):
            Judge of each run, from [`read_judges`].

    Returns:
        `dict[str, Any]`: The judge and the options, the number of solutions by why they are not compared, the table of first wrong
        steps, the share of compared solutions that agree with Wilson's 95 % interval, and Cohen's kappa of whether a solution has a
        wrong step. `None` where nothing is compared, or kappa is undefined.
    """
    confusion = {name: notes.get(f"consensus_{name}", 0) for name in CONFUSION}
    compared, agreed = sum(confusion.values()), sum(confusion[name] for name in AGREED)
    low, high = wilson_interval(agreed, compared) if compared else (None, None)
    kappa = None
    if compared:
        both_none, mc_none, judge_none = (
            sum(confusion[name] for name in names)
            for names in (CONFUSION[:1], CONFUSION[:2], ("mc_none_judge_none", "mc_error_judge_none"))
        )
        observed = (compared - mc_none - judge_none + 2 * both_none) / compared
        expected = (mc_none * judge_none + (compared - mc_none) * (compared - judge_none)) / compared**2
        kappa = (observed - expected) / (1 - expected) if expected < 1 else None
    return {
        "judge": config.judge_name,
        "judges": dict(judges),
        "threshold": config.threshold,
        "disagreement": config.disagreement,
        **({"after_first_error": config.after_first_error} if config.view != "orm" else {}),
        "solutions": notes.get("consensus_solutions", 0),
        "not_compared": {name: notes.get(f"consensus_{name}", 0) for name in NOT_COMPARED},
        "compared": compared,
        "agreed": agreed,
        "agreement": agreed / compared if compared else None,
        "agreement_low": low,
        "agreement_high": high,
        "kappa_any_error": kappa,
        "first_wrong_step": confusion,
        "right_answer_with_error": notes.get("consensus_right_answer_with_error", 0),
        "labels_after_first_error": notes.get("consensus_labels_after_first_error", 0),
        "steps_dropped": notes.get("consensus_steps_dropped", 0),
    }


def _stale(what: str) -> str:
    return (
        f"{what}. The run has changed since it was judged, or the verdicts are from another run. Run `trl-hrm judge` again. It "
        "samples only what is new."
    )
