r"""Where one step ends and the next begins: a rule that gives stop strings to an engine and cuts whole solutions."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .engine import continued_text


@dataclass(frozen=True)
class StepRule:
    r"""
    Tells steps apart, in two ways: by stop strings while an engine writes, and by a pattern in a finished solution.

    Args:
        name (`str`):
            Name of the rule.
        pattern (`str`):
            Regular expression. A step ends where a match ends, so that a header is matched by a lookahead.
        stops (`tuple[str, ...]`):
            Strings that end a step, three at most: servers take four, and one ends the solution. `{k}` stands for the number
            of a step. Empty if no stop strings say what the pattern says; then steps cannot be
            sampled one at a time.
        header (`bool`, *optional*, defaults to `False`):
            Whether the stop string opens the next step, as `# Step 2` does.

    Raises:
        `ValueError`: If the pattern is no regular expression.
    """

    name: str
    pattern: str
    stops: tuple[str, ...]
    header: bool = False

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"step pattern {self.pattern!r} is no regular expression ({error}).") from error

    def stop_strings(self, header: str | None = None) -> tuple[str, ...]:
        """
        Stop strings of a step.

        Args:
            header (`str`, *optional*):
                The stop string that ended the step before. `None` for the first step, which begins with a header of its own.

        Returns:
            `tuple[str, ...]`: For rules with headers, those with the number of this step once more, the next one, and the
            one after it: policies repeat numbers and skip them.
        """
        if not self.stops:
            raise ValueError(
                f"the steps of the rule {self.name!r} cannot be told by stop strings, so they cannot be sampled one at a "
                "time. Use a search that cuts whole solutions (rollouts or puct), or another rule."
            )
        if not self.header:
            return self.stops
        number = 2 if header is None else int(re.search(r"\d+", header)[0])
        return tuple(stop.format(k=number + i) for stop in self.stops for i in range(3))

    def tail(self, text: str, stop_reason: str | None) -> int:
        """Number of characters at the end of `text`, stopped by `stop_reason`, that belong to the next step."""
        if not self.header or stop_reason is None or not re.match(self.pattern, stop_reason):
            return 0
        return len(text) - text.rfind(stop_reason)

    def ends(self, text: str) -> list[int]:
        """
        Where the steps of a solution end, in characters. The last is the length of the text; no step is blank.

        Example:

        ```python
        >>> RULES["blank_line"].ends("1 + 2 = 3.\\n\\n3 + 3 = 6.")
        [12, 22]
        ```
        """
        ends: list[int] = []
        for match in re.finditer(self.pattern, text):
            start = ends[-1] if ends else 0
            if text[start : match.end()].strip() and text[match.end() :].strip():
                ends.append(match.end())
        return [*ends, len(text)]


RULES = {
    rule.name: rule
    for rule in (
        StepRule("step_header", r"(?=# Step \d)", ("# Step {k}",), header=True),
        StepRule("blank_line", r"(?<!# Answer)\n\s*\n", ("\n\n",)),
        StepRule("sentence", r"\. |\.\n|\? ", (". ", ".\n", "? ")),
        # HRM, appendix A.1: a step ends with a displayed or inline formula that ends its paragraph
        StepRule("formula", r"(?:\\\]|\\\))\n\n", ("\\]\n\n", "\\)\n\n")),
    )
}


def regex_rule(pattern: str) -> StepRule:
    """A rule for whole solutions: a step ends where a match of `pattern` ends."""
    return StepRule("regex", pattern, ())


class Cut(NamedTuple):
    """End of a step in a sampled solution: in tokens, in characters, and how many of these belong to the next step."""

    tokens: int
    characters: int
    tail: int


def cut_steps(
    rule: StepRule, tokenizer: Any, prefix_ids: Sequence[int], token_ids: Sequence[int], text: str
) -> list[Cut]:
    """
    Where the steps of a sampled solution end. Cuts fall between tokens, at the first one at or after the end of a step:
    the ids stay as they were sampled.

    Args:
        rule ([`StepRule`]):
            Tells where steps end.
        tokenizer:
            Tokenizer of the policy.
        prefix_ids (`Sequence[int]`):
            Token ids that the solution continues.
        token_ids (`Sequence[int]`):
            Token ids of the solution.
        text (`str`):
            Text of the solution.

    Returns:
        `list[Cut]`: One per step. The last is the end of the solution.
    """

    def length(number: int) -> int:
        return len(continued_text(tokenizer, prefix_ids, token_ids[:number]))

    cuts: list[Cut] = []
    for end in rule.ends(text)[:-1]:
        number = bisect_left(range(len(token_ids)), end, key=length)
        characters = length(number)
        if number < len(token_ids) and characters < len(text) and (not cuts or number > cuts[-1].tokens):
            cuts.append(Cut(number, characters, characters - end))
    return [*cuts, Cut(len(token_ids), len(text), 0)]
