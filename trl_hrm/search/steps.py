r"""Where one step ends and the next begins: a rule that gives stop strings to an engine and cuts whole solutions."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..encoding import find_control_text
from ..grading import thinking_spans, visible_text, without_thinking_tags
from .engines.base import Tokenizer, continued_text


_CLOSING = "\"'”’»)]}*_$」』）】》"  # marks that may close a sentence after its full stop
_BLANK = " \t\r\n\f\v\u3000#-=~`>|" + _CLOSING  # a line of these alone, such as a rule, is not a step
_CODE = re.compile(r"^[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)", re.M | re.S)

# A line that begins with "# Step 2", with any number of "#" and any emphasis, or with "Step 2" and what sets a heading
# apart from a sentence: a colon, a full stop or parenthesis, a dash, or the end of the line.
_HEADER = (
    r"(?im)^[ \t]*[*_]*"
    r"(?:#+[ \t]*[*_]*step[ \t]*\d+(?:[*_]*[:：.)][*_]*)?"
    r"|step[ \t]*\d+[*_]*(?:[ \t]*[:：][*_]*|[.)][*_]*\s|[ \t]+[-–—]+[ \t]|[ \t\r]*\n))"
)
_SENTENCE = (
    rf"(?:[.?]|(?<!\\)!)[{re.escape(_CLOSING)}\\]*\s"  # "\!" is a space in LaTeX
    rf"|(?:[。｡！？]|．(?![\d０-９]))[{re.escape(_CLOSING)}]*"
)
_NO_SENTENCE_END = (
    # numbers of lists ("1. ", "- **2.** ", "a. ", "(ii). ") and headings ("Case 2. ") that begin a line or a sentence
    r"^\s*(?:[-+*>•][ \t]+)?[*_(]*(?:(?:(?:Step|Case|Part|Example|Claim|Lemma|Theorem|Rule|Question|Problem)[ \t]+)?\d{1,3}"
    r"|[a-z]|[ivx]{1,4})[*_)]*\.[*_)]*\s\Z"
    # abbreviations
    r"|(?<![\w.])(?:e\.g|i\.e|c\.f|cf|vs|viz|resp|approx|w\.r\.t|s\.t|Mr|Mrs|Ms|Dr|Prof|St|"
    r"[Ff]igs?|[Ee]qs?|[Ee]qns?|Secs?|Ch|Thm|Lem|Prop|Cor|Def|Ex|Ref|pp)\.[)*_]*\s\Z"
    r"|(?:[\d)}\]]|\b\w)!+[)$\\}\]]*\s\Z"  # factorials
)


class Boundary(NamedTuple):
    """
    Where a step ends.

    Args:
        end (`int`):
            Number of characters before the end of the step.
        stop (`int`):
            Number of characters before the end of `marker`: as many as it takes to see that the step has ended.
        marker (`str`):
            What ended the step, such as a blank line or the header of the next step.
    """

    end: int
    stop: int
    marker: str


@dataclass(frozen=True)
class StepRule:
    r"""
    Tells steps apart, in two ways: by stop strings while an engine writes, and by a pattern in a text.

    The pattern decides. Stop strings only save tokens: a sample that goes beyond the end of a step is cut there, and one that a
    stop string ended inside a step is continued. No step ends inside a model's thinking (see
    [`~grading.thinking_spans`]), which belongs to the step after it.

    Args:
        name (`str`):
            Name of the rule.
        pattern (`str`):
            Regular expression. A step ends where a match ends or, for rules with headers, where the match begins.
        stops (`tuple[str, ...]`):
            Strings that end a step, three at most: servers take four, and one ends the solution. `{k}` stands for the number
            of a step. Empty if steps cannot be sampled one at a time.
        header (`bool`, *optional*, defaults to `False`):
            Whether the pattern matches the header of the next step, as `# Step 2` is. A header inside a fenced code block is a
            comment of the code and does not count.
        unless (`str`, *optional*):
            Regular expression for exceptions, such as the number of a list. It is searched in the text from the start of the line
            (or of the step, if that is later) to the end of a match of `pattern`. Where it is found, no step ends.

    Raises:
        `ValueError`: If a pattern is not a valid regular expression.
    """

    name: str
    pattern: str
    stops: tuple[str, ...]
    header: bool = False
    unless: str | None = None

    def __post_init__(self):
        for pattern in filter(None, (self.pattern, self.unless)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"step pattern {pattern!r} is not a valid regular expression ({error}).") from error

    def stop_strings(self, header: str | None = None) -> tuple[str, ...]:
        """
        Stop strings of a step.

        Args:
            header (`str`, *optional*):
                The header that ended the step before. `None` for the first step, which begins with a header of its own.

        Returns:
            `tuple[str, ...]`: For rules with headers, headers like the given one with the number of this step once more, the
            next one, and the one after it: policies repeat numbers and skip them.
        """
        if not self.stops:
            raise ValueError(
                f"the rule {self.name!r} has no stop strings, so its steps cannot be sampled one at a time. Use a search that cuts "
                "whole solutions (rollouts or puct), or another rule."
            )
        if not self.header:
            return self.stops
        number = re.search(r"\d+", header or "")
        if number is None:
            return tuple(stop.format(k=2 + i) for stop in self.stops for i in range(3))
        before = header[: number.start()]
        before = before[max(before.rfind("#"), 0) :].lstrip()  # "# Step 3" is found in "### Step 3" too
        return tuple(f"{before}{int(number[0]) + i}" for i in range(3))

    def ends(self, text: str, start: int = 0) -> list[int]:
        """
        Where the steps of a solution end, in characters. The last is the length of the text; no step is blank.

        Args:
            text (`str`):
                The solution.
            start (`int`, *optional*, defaults to `0`):
                Where the first of the steps begins. What stands before it tells whether a line or a code block begins there.

        Example:

        ```python
        >>> RULES["blank_line"].ends("1 + 2 = 3.\\n\\n3 + 3 = 6.")
        [12, 22]
        ```
        """
        last = len(_masked(text).rstrip(_BLANK))
        return [*(found.end for found in self.boundaries(text, start) if found.end < last), len(text)]

    def last_end(self, text: str) -> int | None:
        """Where the last step of a text ends. `None` if more than the header of the next step follows."""
        found = list(self.boundaries(text))
        return found[-1].end if found and found[-1].stop == len(text) else None

    def boundaries(self, text: str, start: int = 0) -> Iterator["Boundary"]:
        """
        Where steps end in a text that may not be complete. More text does not move a boundary, with one exception: a closing tag
        of thinking whose opening tag is not in the text.
        """
        masked, thinking = _masked(text), thinking_spans(text)
        code = [match.span() for match in _CODE.finditer(masked)] if self.header else []
        for match in re.finditer(self.pattern, masked):
            end = match.start() if self.header else match.end()
            end = next((first for first, after in thinking if first < end < after), end)
            if end <= start or not masked[start:end].strip(_BLANK):
                continue
            if any(first <= end < after for first, after in code):
                continue
            line = masked.rfind("\n", 0, match.end() - 1) + 1
            if self.unless is not None and re.search(self.unless, masked[max(line, start) : match.end()]):
                continue
            yield Boundary(end, match.end(), match[0].strip() if self.header else match[0])
            start = end


RULES = {
    rule.name: rule
    for rule in (
        StepRule("step_header", _HEADER, ("# Step {k}",), header=True),
        StepRule("blank_line", r"(?<!# Answer)\n\s*\n", ("\n\n",)),
        StepRule("sentence", _SENTENCE, (". ", ".\n", "。"), unless=_NO_SENTENCE_END),
        # HRM, appendix A.1: a step ends with a displayed or inline formula that ends its paragraph
        StepRule("formula", r"(?:\\\]|\\\))\n\n", ("\\]\n\n", "\\)\n\n")),
    )
}


def cut_text(text: str, rule: StepRule, keep_thinking: bool = False) -> list[str]:
    """
    Cut a solution into steps, without the space around them, as exports of searched trees have them. Nothing but rules and
    marks such as `#` is not a step.

    Args:
        text (`str`):
            The solution.
        rule ([`StepRule`]):
            Tells where steps end.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether to keep a reasoning model's thinking. Its tags are always left out.
    """
    if keep_thinking:
        text = without_thinking_tags(text)
    ends = rule.ends(text)
    steps = [visible_text(text[start:end]).strip() for start, end in zip([0, *ends], ends, strict=False)]
    return [step for step in steps if step.strip(_BLANK)]


def visible_steps(steps: Sequence[str], keep_thinking: bool = False) -> list[str]:
    """
    Return the texts of consecutive steps without a reasoning model's thinking, which may span several steps. A step that is
    only thinking becomes blank.

    Args:
        steps (`Sequence[str]`):
            Texts of consecutive steps.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether only the tags are left out.
    """
    if keep_thinking:
        return [without_thinking_tags(step) for step in steps]
    visible, start, masked = [], 0, _masked("\n".join(steps), "\0")
    for step in steps:
        visible.append(masked[start : start + len(step)].replace("\0", ""))
        start += len(step) + 1
    return visible


def regex_rule(pattern: str) -> StepRule:
    """A rule for whole solutions: a step ends where a match of `pattern` ends."""
    return StepRule("regex", pattern, ())


class Cut(NamedTuple):
    """End of a step in a sampled solution: in tokens, in characters, and how many of these belong to the next step."""

    tokens: int
    characters: int
    tail: int


def cut_steps(
    rule: StepRule,
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
    text: str,
    before: str = "",
) -> list[Cut]:
    """
    Return where the steps of a sampled solution end. Cuts fall between tokens, at the first one at or after the end of a step:
    the ids remain the sampled ones.

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
        before (`str`, *optional*, defaults to `""`):
            What the policy had written before, up to the end of a step.

    Returns:
        `list[Cut]`: One per step. The last is the end of the solution. If the model never stops thinking, no character of the
        text belongs to its one step.
    """
    cuts: list[Cut] = []
    for end in rule.ends(before + text, len(before))[:-1]:
        cut = cut_at(tokenizer, prefix_ids, token_ids, text, end - len(before))
        if cut is not None and cut.tokens < len(token_ids) and (not cuts or cut.tokens > cuts[-1].tokens):
            cuts.append(cut)
    return [*cuts, Cut(len(token_ids), len(text), len(text) if only_thinks(before, text) else 0)]


def cut_prefix(
    rule: StepRule, tokenizer: Tokenizer, prompt_ids: Sequence[int], prefix: str
) -> tuple[list[int], list[Cut]]:
    """
    Return the token ids of a prefix, and where its steps end. A header at its end belongs to the step that comes next.

    Args:
        rule ([`StepRule`]):
            Tells where steps end.
        tokenizer:
            Tokenizer of the policy.
        prompt_ids (`Sequence[int]`):
            Token ids that the prefix follows.
        prefix (`str`):
            A prefix that ends with a step. See [`~search.step_search.StepSearch.prefix_fault`].

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
    end = rule.last_end(prefix)
    cuts = cut_steps(rule, tokenizer, prompt_ids, token_ids, prefix[:end])
    return token_ids, [*cuts[:-1], Cut(len(token_ids), len(prefix), len(prefix) - end)]


def cut_at(
    tokenizer: Tokenizer, prefix_ids: Sequence[int], token_ids: Sequence[int], text: str, end: int
) -> Cut | None:
    """
    Return the first cut between two tokens that has at least `end` characters of a text before it. `None` if there is no such
    cut, for example because all later tokens hold parts of characters.
    """

    def decoded(number: int) -> str:
        return continued_text(tokenizer, prefix_ids, token_ids[:number])

    first = len(token_ids)  # where a stop string ended the sample
    if decoded(first - 1)[:end] == text[:end]:
        first = bisect_left(range(first), True, key=lambda number: decoded(number)[:end] == text[:end])
    for number in range(first, len(token_ids) + 1):
        found = decoded(number)
        if len(found) >= end and text.startswith(found):
            return Cut(number, len(found), len(found) - end)
    return None


def only_thinks(before: str, text: str) -> bool:
    """Return whether all of a text is thinking, which may have begun in the text before it."""
    return any(start <= len(before) and end == len(before + text) for start, end in thinking_spans(before + text))


def _masked(text: str, mask: str = " ") -> str:
    """The text with another character in the place of each character of thinking."""
    for start, end in thinking_spans(text):
        text = text[:start] + mask * (end - start) + text[end:]
    return text
