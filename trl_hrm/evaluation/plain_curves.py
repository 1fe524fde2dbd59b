"""Accuracy over N from plain lists of scores, for those who have them already."""

from collections.abc import Sequence

from .curves import Curves, JudgedProblem, make_curves


NAME = "score"


def plain_curves(
    scores: Sequence[Sequence[float | None]],
    correct: Sequence[Sequence[bool | None]],
    texts: Sequence[Sequence[str]],
    n: Sequence[int] | None = None,
    num_draws: int | None = None,
    seed: int = 42,
) -> Curves:
    """
    Curves of choosing among solutions by their scores.

    Args:
        scores (`Sequence[Sequence[float | None]]`):
            For each of P problems the scores of its M solutions, in `[0, 1]`. `None` for one that could not be scored, which is
            chosen last.
        correct (`Sequence[Sequence[bool | None]]`):
            Whether each is right. `None` for one that could not be graded: where it is chosen, the problem does not count.
        texts (`Sequence[Sequence[str]]`):
            What each says. Of equal scores the smallest text wins, so that the order does not matter.
        n (`Sequence[int]`, *optional*):
            How many solutions are chosen from. By default the powers of two up to the number that every problem has, and that.
        num_draws, seed:
            See [`make_curves`].

    Returns:
        [`Curves`]: With the name `"score"`: `best_of_n/score` and so on. Nothing is known of answers, so the votes are void.

    Raises:
        `ValueError`: If there is no problem, the lists do not match, a score is not in `[0, 1]`, an N is larger than the
            number of solutions of a problem, or there are to be no draws.
    """
    if not len(scores):
        raise ValueError("there is no problem, expected one at least.")
    problems = [_problem(i, *parts) for i, parts in enumerate(zip(scores, correct, texts, strict=True))]
    fewest = min(range(len(problems)), key=lambda i: len(scores[i]))
    most = len(scores[fewest])
    if n is None:
        n = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
    if not n or min(n) < 1 or max(n) > most:
        raise ValueError(
            f"n is {list(n)}, expected numbers from 1 to {most}, the solutions of problem {fewest}. Give it more solutions, or "
            "ask for a smaller N."
        )
    if num_draws is not None and num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}, expected 1 or more, or None for the first N solutions.")
    return make_curves(problems, n, num_draws, seed)


def _problem(
    number: int, scores: Sequence[float | None], correct: Sequence[bool | None], texts: Sequence[str]
) -> JudgedProblem:
    if not len(scores) or not len(scores) == len(correct) == len(texts):
        raise ValueError(
            f"problem {number}: got {len(scores)} scores, {len(correct)} judgements and {len(texts)} texts, expected one of each "
            "for one solution at least."
        )
    if not all(score is None or 0 <= score <= 1 for score in scores):
        raise ValueError(f"problem {number}: the scores are {list(scores)}, expected numbers from 0 to 1, or None.")
    places = {text: place for place, text in enumerate(sorted(set(texts)))}
    ranks = [places[text] for text in texts]
    return JudgedProblem(str(number), [None] * len(scores), list(correct), {NAME: list(scores)}, ranks)
