"""Outcomes of the sampled solutions of a run, and warnings that suggest which option to change."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..grading import DEFAULT_EXTRACTORS, extract_answer, thinking_spans, visible_text
from ..terminal import one_line
from .open_tree import OpenTree


OUTCOMES = {
    "right": "correct",
    "wrong": "wrong",
    "cut_off_by_tokens": "at the maximum number of tokens",
    "cut_off_in_thinking": "while thinking",
    "cut_off_after_answer": "after an answer",
    "cut_off_by_context": "at the policy's context length",
    "cut_off_by_depth": "at the maximum depth",
    "cut_off_by_budget": "by the budget of the problem",
    "without_answer": "without an answer",
    "unreadable": "with an unreadable answer",
    "not_graded": "not graded in time",
}
CUT_OFF = tuple(name for name in OUTCOMES if name.startswith("cut_off"))
NUM_SHOWN = 5  # maximum number of problems in a message
# Some solutions without a grade are normal. If more than half have none, most of the samples were wasted.
MAX_WITHOUT_GRADE = 0.5
# Fewer solutions may be all wrong by chance: a policy that solves 10 % of the problems gets 50 wrong ones in 0.5 % of the runs
MIN_GRADED = 50
# A solution of one or two lines may be one step. If more than half of the longer ones are, the rule does not fit the policy.
MIN_LINES, MAX_UNSPLIT = 3, 0.5
# A policy that is certain of a step writes it several times, but not nearly always
MIN_REQUESTS, MAX_REPEATED = 10, 0.9


def count_outcomes(
    opened: OpenTree, search: Mapping[str, Any], extractors: Sequence[str] = DEFAULT_EXTRACTORS
) -> Counter:
    """
    Count the outcomes of the solutions of a problem.

    A solution is a rollout or, in a full tree, a leaf. The steps of a split rollout are not counted in addition to the rollout.

    Args:
        opened ([`OpenTree`]):
            Tree of a problem whose search has ended.
        search (`Mapping[str, Any]`):
            Settings of the search, as in the manifest. Without them, all solutions that end at a token limit count as
            `cut_off_by_tokens`.
        extractors (`Sequence[str]`, *optional*):
            Answer extractors of the run. They tell whether a solution that was cut off had continued after its answer.

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
            tail = opened.cuts[i][-1].tail if i in opened.cuts else node.tail
            if is_short:
                counts["cut_off_by_context"] += 1
            elif 0 < len(node.text) == tail:  # the prompt may contain the opening tag
                counts["cut_off_in_thinking"] += 1
            else:
                counts[_cut_off_by_tokens(opened.tree.text(i), extractors)] += 1
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


def _cut_off_by_tokens(text: str, extractors: Sequence[str]) -> str:
    """Return the outcome of a solution that has reached the maximum number of tokens. Its last line may be incomplete."""
    if any(end == len(text) for _, end in thinking_spans(text)):
        return "cut_off_in_thinking"
    stated = [name for name in extractors if name != "last_number"]  # nearly every unfinished solution has a number
    answered = extract_answer(text.rpartition("\n")[0], stated) is not None
    return "cut_off_after_answer" if answered else "cut_off_by_tokens"


def count_unsplit(opened: OpenTree, pattern: str) -> Counter:
    """
    Count the samples from the prompt with at least `MIN_LINES` lines (`"long"`), and those in which the step rule finds nothing
    (`"unsplit"`).

    Args:
        opened ([`OpenTree`]):
            Tree of a problem.
        pattern (`str`):
            Pattern of the [`~search.steps.StepRule`]: the header or the end of a step.
    """
    counts: Counter = Counter()
    for i in opened.brought.get((opened.root_id, 0), ()):
        node = opened.tree.nodes[i]
        keeps_thinking = opened.tree.thinking != "left_out"
        text = (opened.tree.step_text(i) if keeps_thinking else visible_text(node.text)).strip()
        if sum(bool(line.strip()) for line in text.splitlines()) >= MIN_LINES:
            counts["long"] += 1
            is_step = node.finish == "stop" and not node.is_final  # it ended with the end of a step
            is_split = len(opened.cuts[i]) > 1 if keeps_thinking else re.search(pattern, text) is not None
            counts["unsplit"] += not is_step and not is_split
    return counts


def step_warnings(unsplit: Mapping[str, int], settings: Mapping[str, Any]) -> list[str]:
    """
    Return a warning if the step rule finds no steps in most solutions, because scores and labels of steps need more than one step.

    Args:
        unsplit (`Mapping[str, int]`):
            See [`count_unsplit`].
        settings (`Mapping[str, Any]`):
            The manifest, with the step rule and the prompt. Without a prompt, the solutions were given and not sampled.
    """
    long, number = unsplit.get("long", 0), unsplit.get("unsplit", 0)
    if number <= MAX_UNSPLIT * long:
        return []
    rule, prompt = (_now((settings.get(name) or {}).get("name")) for name in ("steps", "prompt"))
    remedy = "such as --segmentation blank_line."
    if "prompt" in settings:
        remedy = f"such as blank_line, or a --prompt{prompt} that asks for such steps, in a new --output_dir."
    return [
        f"{number:,} of {long:,} solutions with several lines ({_percent(number, long)}) are a single step, because the rule "
        f"--segmentation{rule} finds no steps in them. Use a rule that fits the solutions, {remedy}"
    ]


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


def outcome_of(
    answer: str | None,
    correct: bool | None,
    finish: str | None,
    text: str = "",
    extractors: Sequence[str] = DEFAULT_EXTRACTORS,
) -> str:
    """
    Return the outcome of a whole solution. Unreadable answers are returned as `"not_graded"`, and solutions that fill the policy's
    context as if they had reached the maximum number of tokens.
    """
    if answer is not None or correct is not None:
        return _graded(correct, None)
    return _cut_off_by_tokens(text, extractors) if finish == "length" else "without_answer"


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
    share = {name: _percent(solutions.get(name, 0), total) for name in OUTCOMES}
    cut_off = f"{_percent(_num_cut_off(solutions), total)} cut off"
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
    Return warnings with the option to change if more than half of the solutions of a run have no grade, or if all grades are the
    same.

    Args:
        solutions (`Mapping[str, int]`):
            Number of solutions for each key of `OUTCOMES`.
        search (`Mapping[str, Any]`):
            Settings of the search, as in the manifest. Empty if the solutions were given and not sampled.
        settings (`Mapping[str, Any]`, *optional*):
            The manifest, with the current extractors, prompt and final stops.
    """
    total, settings = sum(solutions.values()), settings or {}
    prompt = settings.get("prompt") or {}
    now = {
        "extractors": _now(settings.get("extractors")),
        "final_stops": _now(prompt.get("final_stops")),
        "prompt": _now(prompt.get("name")),
        "grader_timeout": _now((settings.get("grader") or {}).get("timeout")),
    }
    longer = _longer(solutions, search, now["final_stops"])
    answers = (
        f"Check that --prompt{now['prompt']} asks for an answer, that --extractors{now['extractors']} match the answers of the policy, "
        f"and that --final_stops{now['final_stops']} end a solution only after its answer."
    )
    if not search:
        longer = "Sample solutions with a larger maximum number of tokens."
        answers = f"Check that --extractors{now['extractors']} match the solutions."
    causes = (
        (_num_cut_off(solutions), "cut off", longer),
        (solutions.get("without_answer", 0), OUTCOMES["without_answer"], answers),
        (
            solutions.get("unreadable", 0),
            OUTCOMES["unreadable"],
            f"Check that --extractors{now['extractors']} extract only the answer, and that the reference answers have the same "
            "format.",
        ),
        (solutions.get("not_graded", 0), OUTCOMES["not_graded"], f"Raise --grader_timeout{now['grader_timeout']}."),
    )
    warnings = []
    without_grade = sum(number for number, _, _ in causes)
    if without_grade > MAX_WITHOUT_GRADE * total:
        reasons = ", ".join(f"{number:,} {reason}" for number, reason, _ in causes if number)
        advice = max(causes, key=lambda cause: cause[0])[-1]
        warnings.append(
            f"{without_grade:,} of {total:,} solutions ({_percent(without_grade, total)}) have no grade: {reasons}. {advice}"
        )
    right, wrong = solutions.get("right", 0), solutions.get("wrong", 0)
    if right + wrong >= MIN_GRADED and not (right and wrong):
        problems = "harder problems or a weaker policy" if right else "easier problems or a stronger policy"
        check = (
            f"Check that the reference answers belong to the problems, and that --extractors{now['extractors']} extract the answers of "
            "the policy. Otherwise, use"
        )
        warnings.append(
            f"All {right + wrong:,} solutions with a grade are {'correct' if right else 'wrong'}, so they do not show which steps are "
            f"better. {'Use' if right else check} {problems}."
        )
    return warnings


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


def _longer(solutions: Mapping[str, int], search: Mapping[str, Any], final_stops: str) -> str:
    """Return advice for the most frequent reason why solutions are cut off."""
    cause = max(CUT_OFF, key=lambda name: solutions.get(name, 0))
    most = f"Most of them ({solutions.get(cause, 0):,}) are cut off {OUTCOMES[cause]}."
    length = "max_step_tokens" if "max_step_tokens" in search else "max_solution_tokens"
    length = f"--{length}{_now(search.get(length))}"
    if cause == "cut_off_by_context":
        return f"{most} Use a policy with a longer context, or start vLLM with a larger max_model_len."
    if cause == "cut_off_by_tokens":
        advice = f"Raise {length}"
    elif cause == "cut_off_in_thinking":
        advice = (
            f"Raise {length} to the length of the thinking, or turn thinking off, for many models with --chat_template_kwargs "
            """'{"enable_thinking": false}',"""
        )
    elif cause == "cut_off_after_answer":
        advice = f"Set --final_stops{final_stops} to a text that the policy writes after its answer"
    elif cause == "cut_off_by_depth":
        advice = f"Raise --max_depth{_now(search.get('max_depth'))}"
    else:
        names = ["max_sequences"] + ["max_tokens"] * (search.get("max_tokens") is not None)
        advice = "Raise " + " or ".join(f"--{name}{_now(search.get(name))}" for name in names)
    return f"{most} {advice} in a new --output_dir."


def _percent(number: int, total: int) -> str:
    return f"{100 * number / total:.1f} %"


def _now(value: Any) -> str:
    """Return the current value of an option, in parentheses."""
    if value is None:
        return ""
    shown = " ".join(map(repr, value)) if isinstance(value, (list, tuple)) else str(value)
    return f" (now {shown or 'none'})"
