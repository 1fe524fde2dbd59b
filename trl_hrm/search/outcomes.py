"""Outcomes of the sampled solutions of a run, and warnings that suggest which option to change."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..terminal import one_line
from .open_tree import OpenTree


OUTCOMES = {
    "right": "correct",
    "wrong": "wrong",
    "cut_off_by_tokens": "at the maximum number of tokens",
    "cut_off_by_context": "at the policy's context length",
    "cut_off_by_depth": "at the maximum depth",
    "cut_off_by_budget": "by the budget of the problem",
    "without_answer": "without an answer",
    "unreadable": "with an unreadable answer",
    "not_graded": "not graded in time",
}
CUT_OFF = tuple(name for name in OUTCOMES if name.startswith("cut_off"))
NUM_SHOWN = 5  # maximum number of problems in a message
# A policy that is certain of a step writes it several times, but not nearly always
MIN_REQUESTS, MAX_REPEATED = 10, 0.9


def count_outcomes(opened: OpenTree, search: Mapping[str, Any]) -> Counter:
    """
    Count the outcomes of the solutions of a problem.

    A solution is a rollout or, in a full tree, a leaf. The steps of a split rollout are not counted in addition to the rollout.

    Args:
        opened ([`OpenTree`]):
            Tree of a problem whose search has ended.
        search (`Mapping[str, Any]`):
            Settings of the search, as in the manifest. Without them, all solutions that end at a token limit count as
            `cut_off_by_tokens`.

    Returns:
        `Counter`: Number of solutions for each key of `OUTCOMES`.
    """
    nodes = opened.tree.nodes
    followed = {node.parent for node in nodes}
    thinned = {node.parent for node in nodes if node.weight > 1}
    no_room = {opened.index[above] for (above, _), brought in opened.brought.items() if not brought}
    counts: Counter = Counter()
    for i, node in enumerate(nodes):
        if node.role in ("segment", "given") or (node.role == "step" and i in followed):
            continue
        if node.answer is not None or node.correct is not None:
            counts[_graded(node.correct, opened.ungraded.get(i))] += 1
        elif node.finish == "length":
            is_filter = node.role != "step" and node.round < 0  # a sample of the root filter
            limits = (search.get("root_filter") or {}) if is_filter else search
            most = limits.get("max_step_tokens" if node.role == "step" else "max_solution_tokens")
            is_short = most is not None and len(node.token_ids) < most
            counts["cut_off_by_context" if is_short else "cut_off_by_tokens"] += 1
        elif node.role == "step" and not node.is_final and node.text.strip():
            reason = "context" if i in no_room else "budget" if node.parent in thinned else "depth"
            counts[f"cut_off_by_{reason}"] += 1
        else:
            counts["without_answer"] += 1
    return counts


def count_repeats(opened: OpenTree) -> Counter:
    """
    Count the requests of a problem for several samples (`"requests"`), and those whose samples are all the same (`"repeated"`).
    """
    counts: Counter = Counter()
    for brought in opened.brought.values():
        if len(brought) > 1:
            counts["requests"] += 1
            counts["repeated"] += len({tuple(opened.tree.nodes[i].token_ids) for i in brought}) == 1
    return counts


def repeat_warnings(repeats: Mapping[str, int], engine: Mapping[str, Any]) -> list[str]:
    """
    Return a warning if nearly all requests of a run returned the same sample several times, although the temperature is above 0.

    Args:
        repeats (`Mapping[str, int]`):
            See [`count_repeats`].
        engine (`Mapping[str, Any]`):
            Description of the engine, as in the manifest.
    """
    number, repeated = repeats.get("requests", 0), repeats.get("repeated", 0)
    if number < MIN_REQUESTS or repeated < MAX_REPEATED * number or not engine.get("temperature"):
        return []
    return [
        f"in {repeated:,} of {number:,} requests for several samples, all samples are the same, although the temperature is "
        f"{engine['temperature']:g}. Labels that are estimated from such samples are nearly all 0 or 1. Check that the engine "
        "respects `n` and `seed`, that nothing caches its responses, and that the policy can write different solutions."
    ]


def ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the nonzero counts in the order of `OUTCOMES`."""
    return {name: counts[name] for name in OUTCOMES if counts.get(name)}


def outcome_of(answer: str | None, correct: bool | None, finish: str | None) -> str:
    """Return the outcome of a whole solution. Unreadable answers are returned as `"not_graded"`."""
    if answer is not None:
        return _graded(correct, None)
    return "cut_off_by_tokens" if finish == "length" else "without_answer"


def describe_outcomes(solutions: Mapping[str, int]) -> str:
    """
    Return the percentages of the outcomes in one line.

    Args:
        solutions (`Mapping[str, int]`):
            Number of solutions for each key of `OUTCOMES`.

    Example:

    ```python
    >>> describe_outcomes({"right": 3, "wrong": 1, "cut_off_by_depth": 4})
    '8 solutions: 37.5 % correct, 12.5 % wrong, 50.0 % cut off (50.0 % at the maximum depth), 0.0 % without an answer, 0.0 % with an unreadable answer'
    ```
    """
    total = sum(solutions.values())
    if not total:
        return "0 solutions"
    share = {name: f"{100 * solutions.get(name, 0) / total:.1f} %" for name in OUTCOMES}
    cut_off = f"{100 * _num_cut_off(solutions) / total:.1f} % cut off"
    causes = ", ".join(f"{share[name]} {OUTCOMES[name]}" for name in CUT_OFF if solutions.get(name))
    parts = [f"{share[name]} {OUTCOMES[name]}" for name in OUTCOMES if name not in CUT_OFF]
    if not solutions.get("not_graded"):
        parts.pop()
    parts.insert(2, f"{cut_off} ({causes})" if causes else cut_off)
    return f"{total:,} solutions: {', '.join(parts)}"


def outcome_warnings(
    solutions: Mapping[str, int], search: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> list[str]:
    """
    Return a warning with the option to change if more than half of the solutions of a run are unusable.

    Args:
        solutions (`Mapping[str, int]`):
            Number of solutions for each key of `OUTCOMES`.
        search (`Mapping[str, Any]`):
            Settings of the search, as in the manifest.
        settings (`Mapping[str, Any]`, *optional*):
            The manifest, with the current extractors, prompt and final stops.

    Returns:
        `list[str]`: At most one warning.
    """
    total, settings = sum(solutions.values()), settings or {}
    prompt = settings.get("prompt") or {}
    now = {
        "extractors": _now(settings.get("extractors")),
        "final_stops": _now(prompt.get("final_stops")),
        "prompt": _now(prompt.get("name")),
        "grader_timeout": _now((settings.get("grader") or {}).get("timeout")),
    }
    for words, number, advice in (
        ("are cut off", _num_cut_off(solutions), _longer(solutions, search)),
        (
            "have no answer",
            solutions.get("without_answer", 0),
            f"Check that --extractors{now['extractors']} match the answers of the policy, that --final_stops{now['final_stops']} "
            f"end a solution only after its answer, and that --prompt{now['prompt']} asks for an answer.",
        ),
        (
            "have an unreadable answer",
            solutions.get("unreadable", 0),
            f"Check that --extractors{now['extractors']} extract only the answer, and that the reference answers have the same "
            "format.",
        ),
        ("were not graded in time", solutions.get("not_graded", 0), f"Raise --grader_timeout{now['grader_timeout']}."),
    ):
        if number > total / 2:
            return [f"{100 * number / total:.1f} % of the solutions {words}. {advice}"]
    return []


def reference_warnings(number: int, problems: Sequence[Mapping[str, str]]) -> list[str]:
    """
    Return a warning about problems with unreadable reference answers.

    Args:
        number (`int`):
            Number of these problems.
        problems (`Sequence[Mapping[str, str]]`):
            The first few of these problems, each with `problem_id` and `answer`.

    Returns:
        `list[str]`: At most one warning.
    """
    if not number:
        return []
    shown = [
        f"{one_line(problem['problem_id'], 200)} ({problem['answer'][:60]!r})" for problem in problems[:NUM_SHOWN]
    ]
    shown += [f"{number - len(shown):,} more"] * (number > len(shown))
    are = (
        "problem has an unreadable reference answer and was"
        if number == 1
        else "problems have unreadable reference answers and were"
    )
    return [f"{number:,} {are} skipped: {', '.join(shown)}. Correct the answers, or remove these problems."]


def _graded(correct: bool | None, status: str | None) -> str:
    if correct is not None:
        return "right" if correct else "wrong"
    return "unreadable" if status == "unparseable" else "not_graded"


def _num_cut_off(solutions: Mapping[str, int]) -> int:
    return sum(solutions.get(name, 0) for name in CUT_OFF)


def _longer(solutions: Mapping[str, int], search: Mapping[str, Any]) -> str:
    """Return advice for the most frequent reason why solutions are cut off."""
    cause = max(CUT_OFF, key=lambda name: solutions.get(name, 0))
    if cause == "cut_off_by_context":
        return (
            "Most of them reach the policy's context length. Use a policy with a longer context, or start vLLM with a larger "
            "max_model_len."
        )
    if cause == "cut_off_by_depth":
        names = ["max_depth"]
    elif cause == "cut_off_by_tokens":
        names = ["max_step_tokens"] if "max_step_tokens" in search else ["max_solution_tokens"]
    else:
        names = ["max_sequences"] + ["max_tokens"] * (search.get("max_tokens") is not None)
    options = " or ".join(f"--{name}{_now(search.get(name))}" for name in names)
    return f"Most of them are cut off {OUTCOMES[cause]}. Raise {options} in a new --output_dir."


def _now(value: Any) -> str:
    """Return the current value of an option, in parentheses."""
    if value is None:
        return ""
    shown = " ".join(map(repr, value)) if isinstance(value, (list, tuple)) else str(value)
    return f" (now {shown or 'none'})"
