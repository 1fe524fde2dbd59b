r"""
More rollouts for the labels of a finished run, where they are most uncertain.

The label of a step estimates \\(p\\), the probability that a continuation of the step ends with the right answer. Before any outcome is known,
\\(p\\) is uniform on [0, 1]. After \\(c\\) right and \\(w\\) wrong outcomes below the step, its posterior is Beta(1 + c, 1 + w). Rollouts
are given to the labels whose posterior variance they are expected to reduce most.

This is exact for a run of `rollouts` and `puct`, whose outcomes are independent. The leaves below a step of a full tree share steps, so they
contain less information than as many rollouts, and the posterior is too narrow.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..identity import digest_of_files
from ..io import replacing, shown
from .log import EventLog
from .open_tree import OpenTree, Request
from .run_folder import problem_shard, read_manifest, shard_name, unfinished_shards
from .step_search import STRATEGIES
from .tree import ROOT, Problem, make_id
from .values import LeafCounts, leaf_counts


WHERE = ("uncertain", "uniform")


def label_variance(counts: LeafCounts, more: int = 0) -> float:
    r"""
    Return the expected posterior variance of a label after more rollouts.

    Let \\(a = 1 + c\\), \\(b = 1 + w\\) and \\(s = a + b\\) for \\(c\\) right and \\(w\\) wrong outcomes. The variance now is
    \\(V = ab / (s^2 (s + 1))\\), and its expectation after \\(m\\) more outcomes is

    \\[V \frac{s}{s + m}\\]

    Some rollouts end without an answer, for example because they are too long. They do not change the label. A rollout is
    therefore expected to give \\((1 + c + w) / (1 + c + w + u)\\) outcomes, where \\(u\\) is the number of unresolved leaves so far.

    Args:
        counts ([`~search.values.LeafCounts`]):
            Leaves below the step.
        more (`int`, *optional*, defaults to `0`):
            Number of additional rollouts.

    Example:

    ```python
    >>> label_variance(LeafCounts(correct=0, answered=0, unresolved=0))  # uniform on [0, 1]: 1 / 12
    0.08333333333333333
    >>> label_variance(LeafCounts(correct=2, answered=4, unresolved=0), more=6)  # Beta(3, 3) has variance 1 / 28
    0.017857142857142856
    ```
    """
    right, wrong = 1 + counts.correct, 1 + counts.answered - counts.correct
    total = right + wrong
    answered_share = (1 + counts.answered) / (1 + counts.answered + counts.unresolved)
    return right * wrong / (total * (total + 1) * (total + answered_share * more))


def allocate(
    counts: Sequence[LeafCounts], keys: Sequence[str], num_units: int, unit: int, where: str = "uncertain"
) -> list[int]:
    """
    Distribute rollouts over labels.

    With `"uncertain"`, each unit goes to the label whose expected posterior variance it reduces most. Each further unit for the same
    label reduces its variance less. Therefore no other distribution has a smaller sum of expected variances.

    Args:
        counts (`Sequence[LeafCounts]`):
            Leaves below each of the N labels. At least one label.
        keys (`Sequence[str]`):
            N different keys that decide between equal labels. The smallest key comes first, so the order of the labels does not
            matter.
        num_units (`int`):
            Number of units to distribute.
        unit (`int`):
            Number of rollouts per unit.
        where (`str`, *optional*, defaults to `"uncertain"`):
            `"uncertain"`, or `"uniform"` for numbers of units that differ by at most one.

    Returns:
        `list[int]`: Number of units of each label.
    """

    def place(i: int, given: int) -> tuple[float, str, int]:
        """Return the place in the queue of a label that has been given some units."""
        if where == "uniform":
            return given, keys[i], i
        gain = label_variance(counts[i], given * unit) - label_variance(counts[i], (given + 1) * unit)
        return -gain, keys[i], i

    units = [0] * len(counts)
    queue = [place(i, 0) for i in range(len(counts))]
    heapq.heapify(queue)
    for _ in range(num_units):
        i = queue[0][-1]
        units[i] += 1
        heapq.heapreplace(queue, place(i, units[i]))
    return units


class OpenStep(NamedTuple):
    """
    A node whose continuation can be sampled.

    Args:
        node_id (`str`):
            Id of the node.
        num_outcomes (`int`):
            Number of leaves below it.
        round (`int`):
            First round that the node has no request of.
    """

    node_id: str
    num_outcomes: int
    round: int


class OpenLabel(NamedTuple):
    """
    A label that more rollouts can change.

    Args:
        problem_id (`str`):
            Id of the problem.
        counts ([`~search.values.LeafCounts`]):
            Leaves below all nodes of the step.
        tokens (`float`, *optional*):
            Expected number of tokens of a rollout: the mean number of tokens after the step in the tree. `None` if nothing was sampled
            after it.
        steps (`tuple[OpenStep, ...]`):
            Nodes of the step to sample from. Siblings with the same text are one step with one label, as in an export.
    """

    problem_id: str
    counts: LeafCounts
    tokens: float | None
    steps: tuple[OpenStep, ...]


def open_labels(opened: OpenTree) -> list[OpenLabel]:
    """
    Return the labels of a tree that more rollouts can change, in depth-first order.

    Steps that end a solution are excluded, because their labels come from the answers. So are steps that were cut off, steps whose
    siblings were continued instead to keep a budget, and steps after which the policy's context is full.
    """
    tree = opened.tree.canonical()
    counts = leaf_counts(tree)
    rounds: dict[str, int] = {}
    for above, round in opened.brought:
        rounds[above] = max(rounds.get(above, -1), round)
    no_room = {above for (above, _), brought in opened.brought.items() if not brought}
    thinned = {node.parent for node in tree.nodes if node.weight > 1}
    children = tree.children()
    tokens = [0.0] * len(tree.nodes)  # after each node, on average
    for i in range(len(tree.nodes) - 1, -1, -1):
        if children[i]:
            tokens[i] = sum(len(tree.nodes[k].token_ids) + tokens[k] for k in children[i]) / len(children[i])
    step_of = {ROOT: ROOT}
    members: dict[tuple[int, str], list[int]] = {}
    for i, node in enumerate(tree.nodes):
        text = "" if node.role in ("rollout", "given") else tree.step_text(i)
        if text and node.parent in step_of:
            members.setdefault((step_of[node.parent], text), []).append(i)
            step_of[i] = members[step_of[node.parent], text][0]

    def is_open(i: int) -> bool:
        node = tree.nodes[i]
        is_dropped = node.weight == 1 and node.parent in thinned and not children[i]
        return node.finish == "stop" and not node.is_final and not is_dropped and node.node_id not in no_room

    found = []
    for nodes in members.values():
        steps = [
            OpenStep(
                tree.nodes[i].node_id,
                counts[i].answered + counts[i].unresolved,
                rounds.get(tree.nodes[i].node_id, -1) + 1,
            )
            for i in nodes
            if is_open(i)
        ]
        if steps:
            united = LeafCounts(*map(sum, zip(*(counts[i] for i in nodes), strict=True)))
            after = [tokens[i] for i in nodes if children[i]]
            expected = sum(after) / len(after) if after else None
            found.append(OpenLabel(tree.problem.problem_id, united, expected, tuple(steps)))
    return found


@dataclass(frozen=True)
class MoreRollouts:
    """
    Search that adds rollouts to the trees of a finished run. See [`FinishedRun.plan`].

    Args:
        searched (`dict[str, Any]`):
            Settings of the search that made the trees.
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        max_solution_tokens (`int`):
            Maximum number of tokens per rollout.
        num_completions (`int`):
            Number of rollouts per request.
        rounds (`Mapping[str, Mapping[str, range]]`):
            Rounds of the requests for each node, by problem and node id.
    """

    searched: dict[str, Any]
    stop: tuple[str, ...]
    max_solution_tokens: int
    num_completions: int
    rounds: Mapping[str, Mapping[str, range]]

    @property
    def max_samples(self) -> int:
        return self.num_completions

    def start(self, opened: OpenTree) -> list[Request]:
        return [
            Request(
                opened.index[node_id],
                self.num_completions,
                "rollout",
                self.stop,
                self.max_solution_tokens,
                round=round,
                weight=opened.tree.nodes[opened.index[node_id]].weight,
            )
            for node_id, rounds in self.rounds[opened.tree.problem.problem_id].items()
            for round in rounds
        ]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        return []

    def describe(self) -> dict[str, Any]:
        """Return the settings of the first search, so that the run is read like the run that it continues."""
        return self.searched | {"max_solution_tokens": self.max_solution_tokens}

    def num_missing(self, log: EventLog) -> int:
        """Return the number of rollouts that were requested and not sampled, because the policy's context is full."""
        missing = 0
        for problem_id in self.rounds.keys() & log.problems.keys():
            if log.problems[problem_id].status == "done":
                opened = log.read(problem_id)
                missing += sum(
                    self.num_completions - len(opened.brought[node_id, round])
                    for node_id, rounds in self.rounds[problem_id].items()
                    for round in rounds
                )
        return missing


class FinishedRun:
    """
    A finished run that another run continues with more rollouts. It is only read.

    Args:
        folder (`str` or `Path`):
            Folder of the run.

    Attributes:
        manifest (`dict[str, Any]`):
            Manifest of the run.
        labels (`list[OpenLabel]`):
            Labels that more rollouts can change, of the problems with the status `"done"`, in order of the problems.
        identity (`dict[str, Any]`):
            What identifies the content of the run: `digest` of the logs, number of `problems` by status, and numbers of `samples` and
            `tokens`.

    Raises:
        `FileNotFoundError`: If the folder contains no run.
        `ValueError`: If the run has not finished, is guided by a reward model, has no label that more rollouts can change, or is
            damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        needed = ["search", "engine", "prompt", "steps", "extractors", "grader", "num_shards"]
        self.manifest = read_manifest(folder, needed)
        search = self.manifest["search"]["search"]
        if search in STRATEGIES:
            raise ValueError(
                f"{folder}: the run is a step search ({search}), which is guided by a reward model. Rollouts can be added to runs of "
                "`trl-hrm annotate`."
            )
        if shards := unfinished_shards(folder):
            raise ValueError(
                f"{folder}: shards {', '.join(map(str, shards))} have not finished. Run the same command that started them again first."
            )
        number = self.manifest["num_shards"]
        paths = [self.folder / shard_name("log", shard, number, "jsonl") for shard in range(number)]
        self._logs = list(map(EventLog, paths))
        known = Counter(problem_id for log in self._logs for problem_id in log.problems)
        if repeated := [name for name, count in known.items() if count > 1]:
            raise ValueError(f"{folder}: problem {shown(repeated[0])} is in several logs, expected in one.")
        self.labels: list[OpenLabel] = []
        samples = tokens = 0
        for log, problem_id in self._problems():
            opened = log.read(problem_id)
            sampled = [node for node in opened.tree.nodes if node.role in ("step", "rollout")]
            samples += len(sampled)
            tokens += sum(len(node.token_ids) for node in sampled)
            if log.problems[problem_id].status == "done":
                self.labels += open_labels(opened)
        statuses = Counter(problem.status for log in self._logs for problem in log.problems.values())
        self.identity = {
            "digest": digest_of_files(paths),
            "problems": dict(sorted(statuses.items())),
            "samples": samples,
            "tokens": tokens,
        }
        if not self.labels:
            raise ValueError(
                f"{folder}: no step can get more rollouts. {statuses['done']:,} problems have the status done, and their steps all end "
                "a solution or were cut off."
            )
        known = [label.tokens for label in self.labels if label.tokens is not None]
        usual = sum(known) / len(known) if known else 0.0
        self.labels = [label._replace(tokens=usual) if label.tokens is None else label for label in self.labels]

    @property
    def num_failed(self) -> int:
        """Number of problems with failed requests, which a continued run leaves out."""
        return self.identity["problems"].get("error", 0)

    def plan(self, num_samples: int, unit: int, where: str, seed: int) -> list[int]:
        """
        Return the number of requests for each label in `labels`. Together they have at most `num_samples` rollouts.

        Args:
            num_samples (`int`):
                Maximum number of rollouts.
            unit (`int`):
                Number of rollouts per request.
            where (`str`):
                `"uncertain"` or `"uniform"`. See [`allocate`].
            seed (`int`):
                Random seed that decides between equal labels.
        """
        counts = [label.counts for label in self.labels]
        keys = [make_id("more", seed, self.identity["samples"], label.steps[0].node_id) for label in self.labels]
        return allocate(counts, keys, num_samples // unit, unit, where)

    def rounds(self, units: Sequence[int], unit: int) -> dict[str, dict[str, range]]:
        """
        Return the rounds of the requests for each node, by problem and node id. A label whose step was sampled several times gets its
        requests where there are fewest outcomes so far, because it is the mean of the scores of its nodes.
        """
        found: dict[str, dict[str, range]] = {}
        for label, number in zip(self.labels, units, strict=True):
            given = [0] * len(label.steps)
            for _ in range(number):
                place = min(range(len(given)), key=lambda k: label.steps[k].num_outcomes + given[k] * unit)
                given[place] += 1
            for step, times in zip(label.steps, given, strict=True):
                if times:
                    found.setdefault(label.problem_id, {})[step.node_id] = range(step.round, step.round + times)
        return found

    def problems(self, index: int, count: int) -> list[tuple[int, Problem]]:
        """Return the problems of a shard, each with its position, without problems that have failed requests."""
        return [
            (log.problems[problem_id].position, log.problem(problem_id))
            for log, problem_id in self._problems()
            if problem_shard(problem_id, count) == index
        ]

    def copy(self, path: Path, problems: Sequence[tuple[int, Problem]], reopened: Mapping[str, Any]) -> None:
        """
        Write the log of a shard with the events of some problems. The file is written completely or not at all.

        Args:
            path (`Path`):
                Log to write.
            problems (`Sequence[tuple[int, Problem]]`):
                Problems to copy.
            reopened (`Mapping[str, Any]`):
                Ids of the problems whose search continues. The event that closed them is not copied.
        """
        log_of = {problem_id: log for log, problem_id in self._problems()}
        with replacing(path, "wb") as file:
            for _, problem in problems:
                file.writelines(log_of[problem.problem_id].lines(problem.problem_id, problem.problem_id in reopened))

    def _problems(self) -> list[tuple[EventLog, str]]:
        """Return the problems without failed requests, each with its log, in order of their positions."""
        found = [
            (problem.position, problem_id, log)
            for log in self._logs
            for problem_id, problem in log.problems.items()
            if problem.status != "error"
        ]
        return [(log, problem_id) for _, problem_id, log in sorted(found, key=lambda one: one[:2])]


def describe_plan(run: FinishedRun, units: Sequence[int], unit: int, num_samples: int) -> str:
    """Return a text with the number of labels, requests and rollouts of a plan, and its expected effect."""
    total = sum(units) * unit
    tokens = sum(label.tokens * number * unit for label, number in zip(run.labels, units, strict=True))
    problems = {label.problem_id for label, number in zip(run.labels, units, strict=True) if number}
    now = sum(label_variance(label.counts) for label in run.labels) / len(run.labels)
    then = sum(
        label_variance(label.counts, number * unit) for label, number in zip(run.labels, units, strict=True)
    ) / len(run.labels)
    lines = [
        f"{run.folder}: {run.identity['samples']:,} samples, {len(run.labels):,} labels that more rollouts can change.",
        f"{total:,} of {num_samples:,} rollouts, in {sum(units):,} requests of {unit:,}, for "
        f"{sum(map(bool, units)):,} labels of {len(problems):,} problems. About {tokens:,.0f} tokens are expected.",
        f"Posterior standard deviation of a label (root mean square): {now**0.5:.4f} now, {then**0.5:.4f} expected.",
    ]
    if run.num_failed:
        lines.append(
            f"warning: {run.num_failed:,} problems of {run.folder} have failed requests and are left out. To include them, run its "
            "command again first."
        )
    return "\n".join(lines)


def histogram(run: FinishedRun, units: Sequence[int], unit: int) -> str:
    """Return a table with the number of labels and of new rollouts by the share of right outcomes so far."""
    names = ["no outcome", *(f"{k / 5:.1f} to {(k + 1) / 5:.1f}" for k in range(5))]
    labels, rollouts = Counter(), Counter()
    for label, number in zip(run.labels, units, strict=True):
        correct, answered, _ = label.counts
        name = names[1 + min(5 * correct // answered, 4)] if answered else names[0]
        labels[name] += 1
        rollouts[name] += number * unit
    rows = [f"{name:>12}  {labels[name]:>10,}  {rollouts[name]:>13,}" for name in names if labels[name]]
    return "\n".join([f"{'right so far':>12}  {'labels':>10}  {'new rollouts':>13}", *rows])
