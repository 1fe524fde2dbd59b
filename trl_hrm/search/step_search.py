"""
Searches guided by step scores of a reward model: greedy search, beam search, and diverse verifier tree search.

A beam holds `width` paths. At each depth, the search samples and scores `expansion` next steps of each unfinished path, and keeps
the best `width` paths. The three searches differ in the number of beams, their width, and the number of samples. N is the maximum
number of next steps sampled at one depth.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..grading import extract_answer
from ..io import shown
from ..step_tree import StepTree
from .open_tree import OpenTree, Request
from .steps import StepRule
from .tree import ROOT, Problem


STRATEGIES = ("step_search", "beam_search", "diverse_tree_search")  # names in manifests and results


Score = Callable[[list[StepTree]], list[list[float | None]]]  # a reward model: one score per step of each tree


def last(scores: Sequence[float]) -> float:
    """Return the score of the last step."""
    return scores[-1]


def ending_extractors(extractors: Sequence[str]) -> tuple[str, ...]:
    """
    Return the extractors whose answer ends a solution. The others also match text in the middle of a solution: `####` starts a
    heading, and a step may say "the answer is" before it checks the answer.
    """
    return tuple(name for name in extractors if name in ("marker", "tag", "boxed"))


class Shape(NamedTuple):
    """Number of beams, paths per beam, and next steps per path."""

    num_beams: int
    width: int
    expansion: int


@dataclass(frozen=True)
class Beam:
    """
    Paths of a beam at one depth. [`StepSearch.advance`] returns the beam at the next depth.

    Args:
        live (`tuple[int, ...]`):
            Last nodes of the unfinished paths, best first. Initially, the node where the search starts.
        finals (`tuple[int, ...]`, *optional*, defaults to `()`):
            Last nodes of the finished paths.
        requests (`tuple[Request, ...]`, *optional*, defaults to `()`):
            Next requests, one per unfinished path. Empty when the beam has ended.
        reason (`str`, *optional*):
            Why the unfinished paths of an ended beam stopped: `"max_depth"` or `"dead_end"`.
    """

    live: tuple[int, ...]
    finals: tuple[int, ...] = ()
    requests: tuple[Request, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Ending:
    """
    Why a path stopped.

    Args:
        node (`int`):
            Last node of the path. If nothing was sampled, the node where the search starts.
        reason (`str`):
            `"final"`: the solution is finished. `"max_depth"`: maximum number of steps reached. `"dead_end"`: no usable next step.
        scores (`list[float]`):
            Scores of the sampled steps on the path.
    """

    node: int
    reason: str
    scores: list[float]


@dataclass(frozen=True, kw_only=True)
class StepSearch:
    """
    Base class of the three searches.

    A next step is usable if it was not cut off by `max_step_tokens`, is not blank, and has a score. Paths with equal scores are
    ordered by their text. Of paths with the same text, only the best is kept.

    Args:
        rule ([`StepRule`]):
            Rule that decides where steps end.
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution.
        max_depth (`int`, *optional*, defaults to `40`):
            Maximum number of steps per solution, including the steps of a given prefix.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens per step.
        rank (`Callable[[Sequence[float]], float]`, *optional*):
            Function that computes the score of a path from its step scores. Defaults to the score of the last step.

    Raises:
        `ValueError`: If a number is out of range, or if the rule has no stop strings.
    """

    rule: StepRule
    final_stops: tuple[str, ...] = ()
    max_depth: int = 40
    max_step_tokens: int = 512
    rank: Callable[[Sequence[float]], float] = last

    def __post_init__(self):
        self.rule.stop_strings()  # raises if steps cannot be sampled one at a time
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")

    @property
    def shape(self) -> Shape:
        """Number of beams, paths per beam, and next steps per path."""
        raise NotImplementedError

    @property
    def n(self) -> int:
        """N, the maximum number of next steps sampled at one depth."""
        return self.shape.num_beams * self.max_samples

    @property
    def max_samples(self) -> int:
        return self.shape.width * self.shape.expansion

    def start(self, opened: OpenTree) -> list[Request]:
        opened.beams = self.beams(opened)
        return [request for beam in opened.beams for request in beam.requests]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        for number, beam in enumerate(opened.beams):
            if request in beam.requests:
                opened.beams[number] = next_beam = self.advance(opened, beam)
                return list(next_beam.requests) if next_beam != beam else []  # other steps are not scored yet
        return []  # its beam has already advanced

    def beams(self, opened: OpenTree) -> list[Beam]:
        """Return the initial beams of a problem. Each requests its own first steps."""
        requests = [
            self._request(opened, opened.start, self.max_samples, number) for number in range(self.shape.num_beams)
        ]
        return [Beam((opened.start,), requests=(request,)) for request in requests]

    def advance(self, opened: OpenTree, beam: Beam) -> Beam:
        """Return the beam at the greatest depth for which the tree has all scores."""
        nodes = opened.tree.nodes
        while beam.requests:
            brought = [opened.brought.get((opened.node_id(request), request.round)) for request in beam.requests]
            if any(found is None or any(i not in opened.scores for i in found) for found in brought):
                break
            usable = [
                i
                for found in brought
                for i in found
                if opened.scores[i] is not None
                # only an end-of-sequence token: the previous step was the last one
                or (nodes[i].is_final and nodes[i].parent != opened.start and not opened.tree.step_text(i))
            ]
            ranked = sorted((-self.rank(path_scores(opened, i)), opened.tree.text(i), i) for i in usable)
            distinct: dict[str, int] = {}  # best node per text
            for _, text, i in ranked:
                distinct.setdefault(text, i)
            kept = list(distinct.values())[: self.shape.width - len(beam.finals)]
            if not kept:
                return Beam(beam.live, beam.finals, reason="dead_end")
            finals = beam.finals + tuple(i for i in kept if nodes[i].is_final)
            live = tuple(i for i in kept if not nodes[i].is_final)
            if opened.tree.depth(kept[0]) == self.max_depth:
                return Beam(live, finals, reason="max_depth")
            beam = Beam(live, finals, tuple(self._request(opened, i, self.shape.expansion) for i in live))
        return beam

    def endings(self, opened: OpenTree) -> list[Ending]:
        """
        Return why each path of an ended search stopped. Finished solutions come first, best first, so the first one is the result
        of the search.
        """
        found = []
        for beam in self.beams(opened):
            beam = self.advance(opened, beam)
            if beam.requests:
                raise ValueError("the search has not ended, but the log says so.")
            found += [(node, "final") for node in beam.finals] + [(node, beam.reason) for node in beam.live]

        def order(ending: Ending) -> tuple[bool, float, str]:
            score = self.rank(ending.scores) if ending.scores else -math.inf
            return ending.reason != "final", -score, opened.tree.text(ending.node)

        return sorted((Ending(node, reason, path_scores(opened, node)) for node, reason in found), key=order)

    def prefix_fault(self, prefix: str, ending: Sequence[str]) -> str | None:
        """
        Return an error message if this search cannot continue from a prefix, otherwise `None`.

        Args:
            prefix (`str`):
                Beginning of a solution, as the policy would write it.
            ending (`Sequence[str]`):
                Extractors whose answers end a solution. See [`ending_extractors`].
        """
        stop = next((stop for stop in self.final_stops if stop in prefix), None)
        if stop is not None:
            return f"the prefix contains {shown(stop)}, which ends a solution. It must be unfinished. Cut it before the answer."
        end = self.rule.last_end(prefix)
        answer = extract_answer(prefix[:end], ending)
        if answer is not None:
            return f"the prefix states the answer {shown(answer)}, which ends a solution. It must be unfinished. Cut it before the answer."
        if re.fullmatch(self.rule.pattern, prefix):
            return f"the prefix is {shown(prefix)}. It must contain at least one step. Add a step, or use an empty prefix."
        if end is None:
            stops = self.rule.stop_strings()
            if self.rule.header:
                expected = f"the header of the next step, such as {shown(stops[0])}"
            else:
                expected = " or ".join(map(repr, stops))
            return (
                f"the prefix ends with {prefix[-40:]!r}. It must end at the end of a step, which for the rule {shown(self.rule.name)} is "
                f"{expected}. Cut it there, or use another rule (--segmentation)."
            )
        num_steps = len(self.rule.ends(prefix[:end]))
        if num_steps >= self.max_depth:
            return (
                f"the prefix has {num_steps} steps and max_depth is {self.max_depth}, which includes them, so no step can be "
                "sampled. Raise --max_depth, or shorten the prefix."
            )
        return None

    def describe(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("rule", "rank")}

    def _request(self, opened: OpenTree, node: int, n: int, round: int = 0) -> Request:
        header = None if node == ROOT else opened.tree.nodes[node].stop_reason
        stop = self.rule.stop_strings(header) + self.final_stops
        return Request(node, n, "step", stop, self.max_step_tokens, round)


@dataclass(frozen=True, kw_only=True)
class GreedyStepSearch(StepSearch):
    """
    At each depth, samples N next steps and keeps the best one. The [HRM](https://huggingface.co/papers/2503.13551) paper (section
    4.1) calls this best-of-N for PRM and HRM.

    Args:
        num_candidates (`int`):
            N, the number of next steps sampled at each depth.
        **kwargs:
            See [`StepSearch`].
    """

    num_candidates: int

    @property
    def shape(self) -> Shape:
        return Shape(1, 1, self.num_candidates)


@dataclass(frozen=True, kw_only=True)
class BeamSearch(StepSearch):
    """
    At each depth, samples `expansion` next steps of each path and keeps the best `width` paths. N is `width * expansion`, which is
    also the number of first steps. Finished paths stay in the beam.

    Args:
        width (`int`):
            Number of paths in the beam, and maximum number of solutions.
        expansion (`int`):
            Number of next steps sampled per path.
        **kwargs:
            See [`StepSearch`].
    """

    width: int
    expansion: int

    @property
    def shape(self) -> Shape:
        return Shape(1, self.width, self.expansion)


@dataclass(frozen=True, kw_only=True)
class DiverseTreeSearch(StepSearch):
    """
    Diverse verifier tree search: runs `num_trees` independent greedy searches with `width` next steps each
    ([Beeching et al., 2024](https://huggingface.co/spaces/HuggingFaceH4/blogpost-scaling-test-time-compute)). N is
    `num_trees * width`.

    Args:
        num_trees (`int`):
            Number of trees, and maximum number of solutions.
        width (`int`):
            Number of next steps sampled at each depth of a tree.
        **kwargs:
            See [`StepSearch`].
    """

    num_trees: int
    width: int

    @property
    def shape(self) -> Shape:
        return Shape(self.num_trees, 1, self.width)


def is_step(opened: OpenTree, node: int) -> bool:
    """Return whether a node is a complete, non-blank step that a reward model can score."""
    return opened.tree.nodes[node].finish != "length" and bool(opened.tree.step_text(node))


def path_scores(opened: OpenTree, node: int) -> list[float]:
    """
    Return the scores of the steps on the path to a node. Given steps, and final nodes without text, have no score.
    """
    scores = (opened.scores[i] for i in opened.tree.path(node))
    return [score for score in scores if score is not None]


def step_tree(opened: OpenTree, nodes: list[int]) -> tuple[StepTree, dict[int, int]]:
    """Return the paths to some nodes as a tree of step texts, and the index of each node in it."""
    places: dict[int, int] = {ROOT: -1}
    parents = []
    for node in nodes:
        for i in opened.tree.path(node):
            if i not in places:
                places[i] = len(parents)
                parents.append(places[opened.tree.nodes[i].parent])
    texts = [opened.tree.step_text(i) for i in places if i != ROOT]
    return StepTree(opened.tree.problem.prompt, texts, [None] * len(texts), parents), places


def check_scores(scores: list[float | None], tree: StepTree, problem: Problem) -> None:
    """Raise `ValueError` unless there is one score per step of a tree, a number from 0 to 1 or `None`."""
    if len(scores) != len(tree.completions):
        raise ValueError(
            f"problem {shown(problem.problem_id)}: the reward model returned {len(scores)} scores for {len(tree.completions)} steps. "
            "It must return one per step."
        )
    for text, score in zip(tree.completions, scores, strict=True):
        if score is not None and not 0 <= score <= 1:
            raise ValueError(
                f"problem {shown(problem.problem_id)}: the reward model scored the step {text[:80]!r} as {score}. Scores must be "
                "from 0 to 1. Check the checkpoint and its dtype."
            )
