"""The beginning of a solution that a search goes on from: whether it can, and where the steps in it end."""

import re
from collections.abc import Sequence
from typing import Any

from ..encoding import find_control_text
from ..grading import extract_answer
from .engine import continued_text
from .steps import Cut, StepRule, cut_steps


def prefix_fault(
    prefix: str, rule: StepRule, final_stops: Sequence[str], max_depth: int, ending: Sequence[str]
) -> str | None:
    """
    What keeps a step search from going on after a prefix.

    Args:
        prefix (`str`):
            The beginning of a solution, as the policy would have written it.
        rule ([`StepRule`]):
            Tells where steps end.
        final_stops (`Sequence[str]`):
            Strings that end a solution.
        max_depth (`int`):
            Most steps of a solution, those of the prefix included.
        ending (`Sequence[str]`):
            Extractors whose answers end a solution.

    Returns:
        `str` or `None`: What was found, what was expected, and the remedy. `None` if nothing is wrong.
    """
    stop = next((stop for stop in final_stops if stop in prefix), None)
    if stop is not None:
        return (
            f"the prefix holds {stop!r}, which ends a solution, expected one that goes on. Cut it before the answer."
        )
    end = _last_end(rule, prefix)
    answer = extract_answer(prefix[:end], ending)
    if answer is not None:
        return (
            f"the prefix states the answer {answer!r}, which ends a solution, expected one that goes on. Cut it before the "
            "answer."
        )
    if re.fullmatch(rule.pattern, prefix):
        return f"the prefix is {prefix!r}, expected a step before the end of it. Leave out what has no step."
    if end is None:
        stops = " or ".join(map(repr, rule.stop_strings()[:1] if rule.header else rule.stop_strings()))
        expected = f"the header of the next step, such as {stops}" if rule.header else stops
        return (
            f"the prefix ends with {prefix[-40:]!r}, expected the end of a step, which by the rule {rule.name!r} is "
            f"{expected}. Cut it there, or take another rule (--segmentation)."
        )
    num_steps = len(rule.ends(prefix[:end]))
    if num_steps >= max_depth:
        return (
            f"the prefix has {num_steps} steps, and max_depth, which counts them too, is {max_depth}: no step is left to sample. "
            "Raise it (--max_depth), or cut the prefix."
        )
    return None


def cut_prefix(rule: StepRule, tokenizer: Any, prompt_ids: Sequence[int], prefix: str) -> tuple[list[int], list[Cut]]:
    """
    Token ids of a prefix, and where its steps end. A header at its end belongs to the step that comes next.

    Args:
        rule ([`StepRule`]):
            Tells where steps end.
        tokenizer:
            Tokenizer of the policy.
        prompt_ids (`Sequence[int]`):
            Token ids that the prefix follows.
        prefix (`str`):
            A prefix in which [`prefix_fault`] finds nothing wrong.

    Raises:
        `ValueError`: If the tokenizer does not give the text back: steps would be cut in the wrong places. If the prefix holds
        control tokens, which would start another turn.
    """
    token_ids = list(tokenizer.encode(prefix, add_special_tokens=False))
    found = continued_text(tokenizer, prompt_ids, token_ids)
    if found != prefix:
        raise ValueError(
            f"the policy's tokenizer makes {found[:80]!r} of the prefix {prefix[:80]!r}, expected the same text. Searches from a "
            "prefix need a tokenizer that changes nothing, such as a byte-level one, and no special tokens in the prefix."
        )
    control = find_control_text(tokenizer, prefix, tags=False)
    if control:
        raise ValueError(
            f"the prefix {prefix[:80]!r} holds {control[0]!r}, a control token of the policy's tokenizer, expected text alone. "
            "Remove it."
        )
    end = _last_end(rule, prefix)
    cuts = cut_steps(rule, tokenizer, prompt_ids, token_ids, prefix[:end])
    return token_ids, [*cuts[:-1], Cut(len(token_ids), len(prefix), len(prefix) - end)]


def _last_end(rule: StepRule, text: str) -> int | None:
    """Where the last step ends. `None` if more than the header of the next one follows."""
    found = list(rule.boundaries(text))
    return found[-1].end if found and found[-1].stop == len(text) else None
