"""How solutions are searched step by step, for several N."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..grading import DEFAULT_EXTRACTORS
from ..scoring.aggregate import Aggregate, aggregate, aggregate_name
from ..search.prompts import Prompt
from ..search.step_search import STRATEGIES, BeamSearch, DiverseTreeSearch, GreedyStepSearch, StepSearch
from ..search.steps import StepRule


BRANCHING = 4


@dataclass(frozen=True)
class StepSearchConfig:
    """
    How solutions are searched.

    Args:
        output_dir (`str`):
            Folder of the results.
        n (`Sequence[int]`):
            N, the next steps that are sampled at a depth: a search for each.
        strategy (`str`, *optional*, defaults to `"step_search"`):
            `"step_search"`: N next steps of one path ([`GreedyStepSearch`]). `"beam_search"`: the best N / `branching` paths, with
            `branching` next steps each ([`BeamSearch`]). `"diverse_tree_search"`: N / `branching` trees, with `branching` next steps
            each ([`DiverseTreeSearch`]).
        branching (`int`, *optional*):
            Next steps of a path, for the latter two. By default 4. Where N is smaller, N; any other N must be a multiple of it.
        max_depth (`int`, *optional*, defaults to `40`):
            Most steps of a solution.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Most tokens of a step.
        aggregate (`str` or `Callable`, *optional*, defaults to `"last"`):
            How the scores of its steps become that of a path. See [`~scoring.aggregate.aggregate`].
        spans, combine:
            How steps are scored. See [`~scoring.paths.TreeScorer.score`].
        extractors (`Sequence[str]`, *optional*):
            How the answer is read from a solution. See [`extract_answer`].
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples.
        max_in_flight, max_open_problems:
            See [`SchedulerConfig`].

    Raises:
        `ValueError`: If there is no such strategy, an N is no number for it, or an option goes with another one.
    """

    output_dir: str
    n: Sequence[int]
    strategy: Literal["step_search", "beam_search", "diverse_tree_search"] = "step_search"
    branching: int | None = None
    max_depth: int = 40
    max_step_tokens: int = 512
    aggregate: Aggregate = "last"
    spans: Sequence[int] = (1,)
    combine: Literal["max", "mean"] = "max"
    extractors: Sequence[str] = DEFAULT_EXTRACTORS
    seed: int = 42
    max_in_flight: int = 256
    max_open_problems: int = 256

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}, expected one of {', '.join(STRATEGIES)}.")
        if self.strategy == "step_search" and self.branching is not None:
            raise ValueError(
                f"branching is {self.branching}, and step_search has one path with N next steps. Leave it out."
            )
        for name in ("branching", "max_depth", "max_step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")
        if not self.n or min(self.n) < 1:
            raise ValueError(f"n is {list(self.n)}, expected numbers of 1 or more.")
        for n in self.n:
            if n % self.branching_at(n):
                raise ValueError(
                    f"n is {list(self.n)}, and {n} is no multiple of the branching, {self.branching_at(n)}. Leave {n} out, or "
                    "give another branching."
                )

    def branching_at(self, n: int) -> int:
        """Next steps of a path where N is `n`."""
        return n if self.strategy == "step_search" else min(n, self.branching or BRANCHING)

    def searches(self, prompt: Prompt, rule: StepRule) -> dict[int, StepSearch]:
        """The search of each N, in their order."""
        return {n: self._search(n, prompt, rule) for n in sorted(set(self.n))}

    def describe(self) -> dict[str, Any]:
        """What decides the results, for manifests, beside the search of each N."""
        return {
            "aggregate": aggregate_name(self.aggregate),
            "spans": list(self.spans),
            "combine": self.combine,
            "extractors": list(self.extractors),
        }

    def _search(self, n: int, prompt: Prompt, rule: StepRule) -> StepSearch:
        limits = {
            "rule": rule,
            "final_stops": prompt.final_stops,
            "max_depth": self.max_depth,
            "max_step_tokens": self.max_step_tokens,
            "rank": partial(aggregate, name=self.aggregate),
        }
        branching = self.branching_at(n)
        if self.strategy == "step_search":
            return GreedyStepSearch(num_candidates=n, **limits)
        if self.strategy == "beam_search":
            return BeamSearch(width=n // branching, expansion=branching, **limits)
        return DiverseTreeSearch(num_trees=n // branching, width=branching, **limits)
