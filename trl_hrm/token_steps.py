"""Align the tokens of a completion with its steps, for credit assignment per step."""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .io import shown
from .rewards import ScoredCompletion


_WINDOW = 8  # tokens that are decoded as context of the next ones


def token_steps(
    tokenizer: Any, ids: Sequence[int], scored: ScoredCompletion, tool_mask: Sequence[int] | None = None
) -> list[int]:
    r"""
    Return the index of the step of every token of a completion.

    A token belongs to the step of its first character that is inside a step. A character whose bytes are split over several tokens
    belongs to each of them. A token without such a character, such as a separator, the end of the sequence or a tool call, belongs to
    the step before it. Tokens before the first step belong to the first step. In a completion with several messages, all tokens of a
    message before its first step, such as its thinking, belong to this step. Results of tools belong to the step before them.

    The ids are decoded, not encoded again, so the alignment is exact for every tokenizer and sampled sequence of tokens. The reward
    model can have another tokenizer. A step has no tokens if one token contains the whole step and the end of the step before it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        ids (`Sequence[int]`):
            L token ids of the completion. They may end with EOS and padding, if padding is a special token.
        scored ([`~rewards.ScoredCompletion`]):
            Steps of the completion.
        tool_mask (`Sequence[int]`, *optional*):
            L values, 0 for tokens that the policy did not generate, such as results of tools.

    Returns:
        `list[int]`: L indices of steps, which never decrease. All 0 if a guard rejected the completion, or it has no steps.

    Raises:
        `ValueError`: If the texts of the completion are not in the decoded ids, or `tool_mask` has another length.

    Example:

    ```python
    >>> ids = tokenizer.encode("1 + 2 = 3.\n\n3 + 3 = 6.")  # 1, +, 2, =, 3, .\n\n, 3, +, 3, =, 6, .
    >>> token_steps(tokenizer, ids, scored)
    [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    ```
    """
    ids = list(ids)
    if tool_mask is not None and len(tool_mask) != len(ids):
        raise ValueError(
            f"`tool_mask` has {len(tool_mask)} values for {len(ids)} token ids. It must have one per token."
        )
    if scored.scores is None or not any(scored.spans):
        return [0] * len(ids)
    found: list[int] = []
    num_steps = 0
    for number, (start, end) in enumerate(_turns(tokenizer, ids, scored, tool_mask)):
        spans = scored.spans[number]
        found += [max(num_steps - 1, 0)] * (start - len(found))
        if not spans:
            continue
        text = scored.texts[number]
        thinking = scored.thinking[number] if scored.thinking else ""
        # TRL decodes texts without special tokens. Its parser of responses keeps them.
        for skip in (True, False):
            decoded = tokenizer.decode(ids[start:end], skip_special_tokens=skip)
            offset = _find(decoded, text, thinking)
            if offset is not None:
                break
        else:
            raise ValueError(
                f"The text of a completion is {shown(text)}{f' after the thinking {shown(thinking)}' if thinking else ''}, but its token "
                f"ids are decoded as {shown(decoded)}. The ids must contain the text. Pass the tokenizer of the policy, and the completion "
                "ids that the text was decoded from."
            )
        step = 0
        for first, last in _token_spans(tokenizer, ids[start:end], decoded, skip):
            while step < len(spans) and spans[step][1] + offset <= first:
                step += 1
            inside = step < len(spans) and spans[step][0] + offset < last
            found.append(num_steps + step if inside or step == 0 else num_steps + step - 1)
        num_steps += len(spans)
    return found + [max(num_steps - 1, 0)] * (len(ids) - len(found))


def _turns(
    tokenizer: Any, ids: list[int], scored: ScoredCompletion, tool_mask: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Return the start and end of the tokens of each text."""
    turns, end = [], 0
    for mask, run in groupby([1] * len(ids) if tool_mask is None else tool_mask, bool):
        start, end = end, end + len(list(run))
        turns += [(start, end)] if mask else []
    if len(scored.texts) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == scored.texts[0]:
        turns = [(0, len(ids))]  # TRL decodes what a rollout function adds together with what the policy generates
    if len(turns) != len(scored.texts):
        raise ValueError(
            f"A completion has {len(scored.texts)} assistant messages, but `tool_mask` has {len(turns)} runs of generated tokens. Each "
            "message must be one run, with tokens of a tool or environment between two messages."
        )
    return turns


def _find(decoded: str, text: str, thinking: str) -> int | None:
    """
    Return where a text starts in the decoded tokens of its message. Thinking comes before it, or after it if it does not end, and tool
    calls after it.
    """
    if decoded.endswith(text):
        return len(decoded) - len(text)
    if thinking not in decoded:
        return None
    found = decoded.find(text, decoded.index(thinking) + len(thinking))
    if found < 0:
        found = decoded.rfind(text, 0, decoded.rindex(thinking))
    return None if found < 0 else found


def _token_spans(tokenizer: Any, ids: list[int], text: str, skip_special_tokens: bool) -> list[tuple[int, int]]:
    """
    Return the start and end of each token in the decoded text, in characters. Spans of tokens that share a character overlap.

    The first n tokens have the characters that the text and the first n decoded tokens have in common at their beginning. Decoding all
    prefixes takes quadratic time, so only a few tokens before the n-th are decoded with it, whose place in the text is known. If this
    does not give the whole text, the text of a token depends on tokens far before it, and all prefixes are decoded.
    """
    for window in (_WINDOW, len(ids) + 1):
        context, first, last = "", 0, 0  # the decoded ids[first:last]
        known = reached = 0  # characters before ids[last], and before the current token
        spans: list[tuple[int, int]] = []
        for end in range(1, len(ids) + 1):
            decoded = tokenizer.decode(ids[first:end], skip_special_tokens=skip_special_tokens)
            expected = context + text[known : known + len(decoded)]
            matched = len(os.path.commonprefix([decoded, expected]))
            start, reached = reached, max(reached, known + matched - len(context))
            is_partial = matched < len(decoded)  # the rest are bytes of the next character
            spans.append((start, reached + is_partial))
            if reached == len(text):
                return spans + [(reached, reached)] * (len(ids) - end)
            if end - last >= window and not is_partial:
                context = tokenizer.decode(ids[last:end], skip_special_tokens=skip_special_tokens)
                first, last, known = last, end, reached
    raise AssertionError("the ids decode to the text")
