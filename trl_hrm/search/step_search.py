"""
Search led by the scores of steps: greedily, by a beam, or in independent trees.

A beam holds `width` paths. At each depth `expansion` next steps of each open path are sampled and scored, and the best `width`
paths stay. The three searches differ in how many beams there are, how wide, and how much they sample; N is the most next steps
that are sampled at one depth. Nothing here samples or scores: a search is asked what it wants next and told what came of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from .open_tree import OpenTree, Request
from .prefixes import prefix_fault
from .steps import StepRule
from .tree import ROOT


STRATEGIES = ("step_search", "beam_search", "diverse_tree_search")  # names of the searches in manifests and results


def last(scores: Sequence[float]) -> float:
    """The score of the last step."""
    return scores[-1]


class Shape(NamedTuple):
    """Number of beams, paths in each, and next steps of a path."""

    num_beams: int
    width: int
    expansion: int


@dataclass(frozen=True)
class Beam:
    """
    Where a beam stands. It never changes: [`StepSearch.advance`] gives the next one.

    Args:
        live (`tuple[int, ...]`):
            Last nodes of the open paths, best first. That which the search begins at, before anything is sampled.
        finals (`tuple[int, ...]`, *optional*, defaults to `()`):
            Last nodes of the finished paths.
        requests (`tuple[Request, ...]`, *optional*, defaults to `()`):
            What is to be sampled next, one request per open path. None when the beam has ended.
        reason (`str`, *optional*):
            Why the open paths of a beam that has ended go no further: `"max_depth"` or `"dead_end"`.
    """

    live: tuple[int, ...]
    finals: tuple[int, ...] = ()
    requests: tuple[Request, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Ending:
    """
    How a path ended.

    Args:
        node (`int`):
            Its last node; that which the search begins at, if nothing was sampled.
        reason (`str`):
            `"final"`: a solution. `"max_depth"`: as many steps as are allowed. `"dead_end"`: no next step can be used.
        scores (`list[float]`):
            Scores of its steps, but for given ones.
    """

    node: int
    reason: str
    scores: list[float]


@dataclass(frozen=True, kw_only=True)
class StepSearch:
    """
    What the three searches have in common.

    A next step can be used if it was not cut off by `max_step_tokens`, is not blank, and has a score. Of paths with equal
    scores the one with the smallest text comes first; paths of one text are one.

    Args:
        rule ([`StepRule`]):
            Gives the strings that end a step.
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution.
        max_depth (`int`, *optional*, defaults to `40`):
            Most steps of a solution, given ones included.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Most tokens of a step.
        rank (`Callable[[Sequence[float]], float]`, *optional*):
            The score of a path from those of its steps. By default that of its last step.

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
                raise ValueError(f"{name} is {value}, expected 1 or more.")

    @property
    def shape(self) -> Shape:
        """How many beams there are, how wide, and how much they sample."""
        raise NotImplementedError

    @property
    def n(self) -> int:
        """Most next steps that are sampled at one depth."""
        return self.shape.num_beams * self.max_samples

    @property
    def max_samples(self) -> int:
        """Most samples of a request."""
        return self.shape.width * self.shape.expansion

    def start(self, opened: OpenTree) -> list[Beam]:
        """The beams of a problem, before anything is sampled. Each asks for first steps of its own."""
        requests = [
            self._request(opened, opened.start, self.max_samples, number) for number in range(self.shape.num_beams)
        ]
        return [Beam((opened.start,), requests=(request,)) for request in requests]

    def prefix_fault(self, prefix: str, ending: Sequence[str]) -> str | None:
        """What keeps this search from going on after a prefix. See [`~search.prefixes.prefix_fault`]."""
        return prefix_fault(prefix, self.rule, self.final_stops, self.max_depth, ending)

    def advance(self, opened: OpenTree, beam: Beam) -> Beam:
        """The beam as far as the scores in the tree take it."""
        while beam.requests and all(_is_scored(opened, request) for request in beam.requests):
            beam = self._next(opened, beam)
        return beam

    def endings(self, opened: OpenTree) -> list[Ending]:
        """
        How the paths of a search that has ended did end: solutions first, the best first, so that the first solution is the
        one that the search has chosen.
        """
        found = []
        for beam in self.start(opened):
            beam = self.advance(opened, beam)
            assert not beam.requests, "the search has not ended"
            found += [(node, "final") for node in beam.finals] + [(node, beam.reason) for node in beam.live]
        endings = [Ending(node, reason, path_scores(opened, node)) for node, reason in found]
        return sorted(endings, key=lambda ending: (ending.reason != "final", self._order(opened, ending)))

    def describe(self) -> dict[str, Any]:
        """Settings, for the manifest, which has the rule and the rank by themselves."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("rule", "rank")}

    def _next(self, opened: OpenTree, beam: Beam) -> Beam:
        """The beam one depth on."""
        nodes = opened.tree.nodes
        kept = self._usable(opened, beam)[: self.shape.width - len(beam.finals)]
        if not kept:
            return Beam(beam.live, beam.finals, reason="dead_end")
        finals = beam.finals + tuple(i for i in kept if nodes[i].is_final)
        live = tuple(i for i in kept if not nodes[i].is_final)
        if opened.tree.depth(kept[0]) == self.max_depth:
            return Beam(live, finals, reason="max_depth")
        return Beam(live, finals, tuple(self._request(opened, i, self.shape.expansion) for i in live))

    def _usable(self, opened: OpenTree, beam: Beam) -> list[int]:
        """The next steps that can be used, those of the best paths first, one of each text."""
        brought = [i for request in beam.requests for i in opened.brought[opened.node_id(request), request.round]]
        ranked = sorted(
            (-self.rank(path_scores(opened, i)), opened.tree.text(i), i) for i in brought if _is_usable(opened, i)
        )
        distinct: dict[str, int] = {}
        for _, text, i in ranked:
            distinct.setdefault(text, i)
        return list(distinct.values())

    def _order(self, opened: OpenTree, ending: Ending) -> tuple[float, str]:
        score = self.rank(ending.scores) if ending.scores else float("-inf")
        return -score, opened.tree.text(ending.node)

    def _request(self, opened: OpenTree, node: int, n: int, round: int = 0) -> Request:
        header = None if node == ROOT else opened.tree.nodes[node].stop_reason
        stop = self.rule.stop_strings(header) + self.final_stops
        return Request(node, n, "step", stop, self.max_step_tokens, round)


@dataclass(frozen=True, kw_only=True)
class GreedyStepSearch(StepSearch):
    """
    N next steps are sampled, the best of them is kept, and so on to the end of the solution: what the
    [HRM](https://huggingface.co/papers/2503.13551) paper (section 4.1) calls best-of-N for PRM and HRM.

    Args:
        num_candidates (`int`):
            N, the next steps to choose from.
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
    The best `width` of all paths are kept at each depth, and `expansion` next steps are sampled of each. N is
    `width * expansion`, and so many first steps are sampled. A finished path keeps its place: as many fewer go on.

    Args:
        width (`int`):
            Paths in the beam, and most solutions that come of it.
        expansion (`int`):
            Next steps of a path.
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
    `num_trees` greedy searches that know nothing of each other, each with `width` next steps: diverse verifier tree search
    ([Beeching et al., 2024](https://huggingface.co/spaces/HuggingFaceH4/blogpost-scaling-test-time-compute)). N is
    `num_trees * width`.

    Args:
        num_trees (`int`):
            Trees, and most solutions that come of them.
        width (`int`):
            Next steps in a tree.
        **kwargs:
            See [`StepSearch`].
    """

    num_trees: int
    width: int

    @property
    def shape(self) -> Shape:
        return Shape(self.num_trees, 1, self.width)


def is_step(opened: OpenTree, node: int) -> bool:
    """Whether a node is a whole step with a text of its own, so that a reward model can judge it."""
    return opened.tree.nodes[node].finish != "length" and bool(opened.tree.step_text(node))


def path_scores(opened: OpenTree, node: int) -> list[float]:
    """
    Scores of the steps on the path to a node. Given steps have none, nor do nodes that end a solution without a word of theirs.
    """
    scores = (opened.scores[i] for i in opened.tree.path(node))
    return [score for score in scores if score is not None]


def _is_usable(opened: OpenTree, node: int) -> bool:
    if opened.scores[node] is not None:
        return True
    found = opened.tree.nodes[node]
    ends_here = found.is_final and found.parent != opened.start
    return ends_here and not opened.tree.step_text(
        node
    )  # the end of the sequence alone: the step before it was the last


def _is_scored(opened: OpenTree, request: Request) -> bool:
    brought = opened.brought.get((opened.node_id(request), request.round))
    return brought is not None and all(i in opened.scores for i in brought)
