"""One score per candidate solution, for many problems: a block of them at a time, so that memory does not grow with the data."""

from collections.abc import Sequence
from itertools import accumulate, compress
from typing import Literal

from tqdm.auto import tqdm

from ..step_tree import StepTree
from .aggregate import aggregate
from .paths import TreeScorer


BLOCK = 64  # problems that are encoded at a time, and that move the progress bar


def score_candidates(
    scorer: TreeScorer,
    problems: Sequence[str],
    candidates: Sequence[Sequence[Sequence[str]]],
    name: str,
    spans: Sequence[int] = (1,),
    combine: Literal["max", "mean"] = "max",
    progress: bool = False,
) -> list[list[float | None]]:
    """
    Score candidate solutions with a step reward model.

    Args:
        scorer ([`TreeScorer`]):
            The reward model.
        problems (`Sequence[str]`):
            B problems.
        candidates (`Sequence[Sequence[Sequence[str]]]`):
            For each problem N candidates, each a list of S step texts.
        name (`str`):
            How the scores of the steps become one. See [`aggregate`].
        spans, combine:
            How steps are scored. See [`TreeScorer.score`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[list[float | None]]`: Scores in `[0, 1]`, problems × candidates. `None` for a candidate that has more tokens
        than the model has positions.
    """
    scores: list[list[float | None]] = []
    with tqdm(total=len(problems), desc="Scoring", unit="problem", disable=not progress) as bar:
        for start in range(0, len(problems), BLOCK):
            block = slice(start, start + BLOCK)
            asked, solutions = problems[block], candidates[block]
            fitting = [
                [fits(scorer, problem, steps, spans) for steps in group]
                for problem, group in zip(asked, solutions, strict=True)
            ]
            judged = [list(compress(*pair)) for pair in zip(solutions, fitting, strict=True)]
            some = [i for i, group in enumerate(judged) if group]
            found = scorer.score([asked[i] for i in some], [judged[i] for i in some], spans=spans, combine=combine)
            found = dict(zip(some, found, strict=True))
            for i, flags in enumerate(fitting):
                values = iter(found.get(i, ()))
                scores.append([aggregate(next(values), name) if flag else None for flag in flags])
            bar.update(len(asked))
    return scores


def solution_lengths(
    scorer: TreeScorer, problem: str, steps: Sequence[str], spans: Sequence[int] = (1,)
) -> tuple[int, int]:
    """Tokens of a problem with its solution, and of the longest path to the end of a judged step, merged ones included."""
    runs = [range(end - span, end) for span in spans if span > 1 for end in range(span, len(steps) + 1)]
    merged = [scorer.step_format.merge(steps[run.start : run.stop]) for run in runs]
    prompt_ids, step_ids = scorer.step_format.encode(scorer.tokenizer, problem, [*steps, *merged])
    before = list(accumulate(map(len, step_ids[: len(steps)]), initial=len(prompt_ids)))
    ends = [before[run.start] + len(ids) for run, ids in zip(runs, step_ids[len(steps) :], strict=True)]
    return before[-1], max(before + ends)


def fits(scorer: TreeScorer, problem: str, steps: Sequence[str], spans: Sequence[int] = (1,)) -> bool:
    """Whether every judged step, merged ones included, ends within the positions of the model."""
    return scorer.max_positions is None or solution_lengths(scorer, problem, steps, spans)[1] <= scorer.max_positions


def tree_fits(scorer: TreeScorer, tree: StepTree, spans: Sequence[int] = (1,)) -> bool:
    """Whether [`fits`] holds for every path of a tree."""
    return all(
        fits(scorer, tree.prompt, [tree.completions[i] for i in tree.path(leaf)], spans) for leaf in tree.leaves()
    )
