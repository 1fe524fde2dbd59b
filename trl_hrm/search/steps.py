r"""Step rules: they provide stop strings to an engine and split whole solutions into steps."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..encoding import find_control_text
from ..grading import thinking_spans, visible_text, without_thinking_tags
from ..grading.extraction import THINKING_TAG, untagged_parts
from ..io import shown
from .engines.base import Tokenizer, continued_text


CLOSING = "\"'”’»)]}*_$」』）】》"  # marks that may follow the full stop of a sentence
_SPACES = " \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
BLANK = _SPACES + "#-=~`>|" + CLOSING  # lines with only these characters, such as horizontal rules, are not steps
CODE = re.compile(r"^[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)", re.M | re.S)

# A line that starts with "# Step 2", with any number of "#" and any emphasis, or with "Step 2" followed by a mark of headings:
# a colon, a full stop or parenthesis, a dash, or the end of the line.
HEADER = (
    r"(?im)^[ \t]*[*_]*"
    r"(?:#+[ \t]*[*_]*step[ \t]*\d+(?:[*_]*[:：.)][*_]*)?"
    r"|step[ \t]*\d+[*_]*(?:[ \t]*[:：][*_]*|[.)][*_]*\s|[ \t]+[-–—]+[ \t]|[ \t\r]*\n))"
)
SENTENCE = (
    rf"(?:[.?]|(?<!\\)!)[{re.escape(CLOSING)}\\]*\s"  # "\!" is a space in LaTeX
    rf"|(?:[。｡！？]|．(?![\d０-９]))[{re.escape(CLOSING)}]*"
)
NO_SENTENCE_END = (
    # list numbers ("1. ", "- **2.** ", "a. ", "(ii). ") and headings ("Case 2. ") at the start of a line or sentence
    r"^\s*(?:[-+*>•][ \t]+)?[*_(]*(?:(?:(?:Step|Case|Part|Example|Claim|Lemma|Theorem|Rule|Question|Problem)[ \t]+)?\d{1,3}"
    r"|[a-z]|[ivx]{1,4})[*_)]*\.[*_)]*\s\Z"
    # abbreviations
    r"|(?<![\w.])(?:e\.g|i\.e|c\.f|cf|vs|viz|resp|approx|w\.r\.t|s\.t|Mr|Mrs|Ms|Dr|Prof|St|"
    r"[Ff]igs?|[Ee]qs?|[Ee]qns?|Secs?|Ch|Thm|Lem|Prop|Cor|Def|Ex|Ref|pp)\.[)*_]*\s\Z"
    r"|(?:[\d)}\]]|\b\w)!+[)$\\}\]]*\s\Z"  # factorials
)


class Boundary(NamedTuple):
    """
    End of a step in a text.

    Args:
        end (`int`):
            Number of characters before the end of the step.
        stop (`int`):
            Number of characters before the end of `marker`.
        marker (`str`):
            Text that marks the end of the step, such as a blank line or the header of the next step.
    """

    end: int
    stop: int
    marker: str


@dataclass(frozen=True)
class StepRule:
    r"""
    Rule that decides where steps end: a pattern to split a text, and stop strings for generation.

    The pattern decides. Stop strings only save tokens: a sample that continues past the end of a step is cut there, and a sample
    that a stop string ended inside a step is continued. A step never ends inside a model's thinking (see
    [`~grading.thinking_spans`]), except with a [`ThinkingRule`]. Thinking belongs to the step after it.

    Args:
        name (`str`):
            Name of the rule.
        pattern (`str`):
            Regular expression. A step ends at the end of a match or, for rules with headers, at the start of a match.
        stops (`tuple[str, ...]`):
            At most three strings that end a step. (Servers accept four, and one ends the solution.) `{k}` is replaced by the
            number of a step. Empty if steps cannot be sampled one at a time.
        header (`bool`, *optional*, defaults to `False`):
            Whether the pattern matches the header of the next step, such as `# Step 2`. Matches inside fenced code blocks are
            ignored.
        unless (`str`, *optional*):
            Regular expression for exceptions, such as list numbers. It is searched in the text from the start of the line (or of
            the step, if later) to the end of a match of `pattern`. If it is found, the step does not end there.

    Raises:
        `ValueError`: If a pattern is not a valid regular expression.
    """

    name: str
    pattern: str
    stops: tuple[str, ...]
    header: bool = False
    unless: str | None = None

    keeps_thinking: ClassVar[bool] = False  # whether thinking has steps of its own. See `ThinkingRule`

    def __post_init__(self):
        for pattern in filter(None, (self.pattern, self.unless)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"The step pattern {shown(pattern)} is not a valid regular expression ({error})."
                ) from error

    def stop_strings(self, header: str | None = None) -> tuple[str, ...]:
        """
        Return the stop strings of a step.

        Args:
            header (`str`, *optional*):
                Header of the step, which ended the previous step. `None` for the first step, which generates its own header.

        Returns:
            `tuple[str, ...]`: Stop strings. For rules with headers, three headers in the format of the given one, with the number
            of this step and the next two numbers, because policies repeat and skip numbers.
        """
        if not self.stops:
            raise ValueError(
                f"The step rule {shown(self.name)} has no stop strings, so steps cannot be sampled one at a time. Use a search that "
                "samples whole solutions (rollouts or puct), or another rule."
            )
        if not self.header:
            return self.stops
        number = re.search(r"\d+", header or "")
        if number is None:
            return tuple(stop.format(k=2 + i) for stop in self.stops for i in range(3))
        before = header[: number.start()]
        before = before[max(before.rfind("#"), 0) :].lstrip()  # "# Step 3" also matches "### Step 3"
        return tuple(f"{before}{int(number[0]) + i}" for i in range(3))

    def ends(self, text: str, start: int = 0) -> list[int]:
        """
        Return the end of each step of a solution, in characters. The last end is the length of the text. No step is blank.

        Args:
            text (`str`):
                The solution.
            start (`int`, *optional*, defaults to `0`):
                Start of the first step. The text before it is only used as context, for example for open code blocks.

        Example:

        ```python
        >>> RULES["blank_line"].ends("1 + 2 = 3.\\n\\n3 + 3 = 6.")
        [12, 22]
        ```
        """
        last = len(_masked(text).rstrip(BLANK))
        return [*(found.end for found in self.boundaries(text, start) if found.end < last), len(text)]

    def last_end(self, text: str) -> int | None:
        """Return the end of the last step of a text, or `None` if more than the header of the next step follows."""
        found = list(self.boundaries(text))
        return found[-1].end if found and found[-1].stop == len(text) else None

    def boundaries(self, text: str, start: int = 0) -> Iterator["Boundary"]:
        """
        Yield the ends of steps in a text that may be incomplete. More text does not change them, with one exception: a closing
        thinking tag without an opening tag in the text.
        """
        masked, thinking = _masked(text), thinking_spans(text)
        code = [match.span() for match in CODE.finditer(masked)] if self.header else []
        for match in re.finditer(self.pattern, masked):
            end = match.start() if self.header else match.end()
            end = next((first for first, after in thinking if first < end < after), end)
            if end <= start or not masked[start:end].strip(BLANK):
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
        StepRule("step_header", HEADER, ("# Step {k}",), header=True),
        StepRule("blank_line", r"(?<!# Answer)\n\s*\n", ("\n\n",)),
        StepRule("sentence", SENTENCE, (". ", ".\n", "。"), unless=NO_SENTENCE_END),
        # HRM, appendix A.1: a step ends with a displayed or inline formula that ends its paragraph
        StepRule("formula", r"(?:\\\]|\\\))\n\n", ("\\]\n\n", "\\)\n\n")),
    )
}


def cut_text(text: str, rule: StepRule, keep_thinking: bool = False) -> list[str]:
    """
    Split a solution into steps without surrounding whitespace, as in exports of search trees. Text with only marks, such as
    `#` or horizontal rules, is not a step.

    Args:
        text (`str`):
            The solution.
        rule ([`StepRule`]):
            Rule that decides where steps end.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether to keep the thinking of a reasoning model. Its tags are always removed.
    """
    return [read_text(text[start:end], keep_thinking) for start, end in step_spans(text, rule, keep_thinking)]


def step_spans(text: str, rule: StepRule, keep_thinking: bool = False) -> list[tuple[int, int]]:
    r"""
    Return the start and end of each step of [`cut_text`] in the text, in characters.

    A span starts and ends with characters of the step. It contains thinking, or tags if thinking is kept, only between two parts of
    the same step: the step is `read_text(text[start:end], keep_thinking)`.

    Args:
        text (`str`):
            The solution.
        rule ([`StepRule`]):
            Rule that decides where steps end.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether to keep the thinking of a reasoning model. Its tags are always removed.

    Example:

    ```python
    >>> step_spans("<think>Hm.</think>1 + 2 = 3.\n\n3 + 3 = 6.\n", RULES["blank_line"])
    [(18, 28), (30, 40)]
    ```
    """
    if rule.keeps_thinking:
        ends, spans = rule.ends(text), []
        for start, end in zip([0, *ends], ends, strict=False):
            for first, last, _ in untagged_parts(text[start:end]):
                part = text[start + first : start + last]
                if part.strip(BLANK):
                    first += start + len(part) - len(part.lstrip())
                    spans.append((first, first + len(part.strip())))
        return spans
    place: Sequence[int] = range(len(text))  # of each character that is read
    if keep_thinking:
        place = sorted(set(place).difference(*(range(*tag.span()) for tag in THINKING_TAG.finditer(text))))
        text = without_thinking_tags(text)
    masked, ends, spans = _masked(text), rule.ends(text), []
    for start, end in zip([0, *ends], ends, strict=False):
        piece = masked[start:end].rstrip()
        if piece.strip().strip(BLANK):
            first = start + len(piece) - len(piece.lstrip())
            spans.append((place[first], place[start + len(piece) - 1] + 1))
    return spans


def read_text(text: str, keep_thinking: bool = False) -> str:
    """Return a text as the reward model reads it: without thinking, or only without its tags if thinking is kept."""
    return visible_text(without_thinking_tags(text) if keep_thinking else text)


def visible_steps(steps: Sequence[str], keep_thinking: bool = False) -> list[str]:
    """
    Return the texts of consecutive steps without the thinking of a reasoning model, which may span several steps. A step with
    only thinking becomes blank.

    Args:
        steps (`Sequence[str]`):
            Texts of consecutive steps.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether to keep the thinking and remove only its tags.
    """
    if keep_thinking:
        return [without_thinking_tags(step) for step in steps]
    visible, start, masked = [], 0, _masked("\n".join(steps), "\0")
    for step in steps:
        visible.append(masked[start : start + len(step)].replace("\0", ""))
        start += len(step) + 1
    return visible


def regex_rule(pattern: str) -> StepRule:
    """
    Return a rule for whole solutions in which a step ends at the end of a match of `pattern`.

    Raises:
        `ValueError`: If the pattern is not a valid regular expression, or matches an empty text.
    """
    rule = StepRule("regex", pattern, ())
    if re.search(pattern, ""):
        raise ValueError(f"The step pattern {shown(pattern)} matches an empty text, so steps would end anywhere.")
    return rule


class Cut(NamedTuple):
    """End of a step in a sampled solution, in tokens and characters, and how many of its last characters belong to the next step."""

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
    Return the ends of the steps in a sampled solution. Each cut is at the first token boundary at or after the end of a step, so
    the token ids do not change.

    Args:
        rule ([`StepRule`]):
            Rule that decides where steps end.
        tokenizer:
            Tokenizer of the policy.
        prefix_ids (`Sequence[int]`):
            Token ids before the solution.
        token_ids (`Sequence[int]`):
            Token ids of the solution.
        text (`str`):
            Text of the solution.
        before (`str`, *optional*, defaults to `""`):
            Text that the policy generated before the solution, up to the end of a step.

    Returns:
        `list[Cut]`: One cut per step. The last is the end of the solution. If the model never stops thinking, and the rule has no
        steps in thinking, there is one cut whose tail is the whole text.
    """
    cuts: list[Cut] = []
    first = begin = 0  # of the last cut
    for end in rule.ends(before + text, len(before))[:-1]:
        end -= len(before)
        # Decoding only what follows the last cut takes linear time. If it does not give the text, all tokens are decoded
        read = [*prefix_ids[-8:], *token_ids[max(first - 8, 0) : first]]
        cut = cut_at(tokenizer, read, token_ids[first:], text[begin:], end - begin)
        if cut is not None:
            cut = Cut(first + cut.tokens, begin + cut.characters, cut.tail)
        elif first:
            cut = cut_at(tokenizer, prefix_ids, token_ids, text, end)
        if cut is not None and cut.tokens < len(token_ids) and (not cuts or cut.tokens > cuts[-1].tokens):
            cuts.append(cut)
            first, begin = cut.tokens, cut.characters
    has_no_step = not rule.keeps_thinking and only_thinks(before, text)
    return [*cuts, Cut(len(token_ids), len(text), len(text) if has_no_step else 0)]


def cut_prefix(
    rule: StepRule, tokenizer: Tokenizer, prompt_ids: Sequence[int], prefix: str
) -> tuple[list[int], list[Cut]]:
    """
    Return the token ids of a prefix, and the ends of its steps. A header at the end belongs to the next step.

    Args:
        rule ([`StepRule`]):
            Rule that decides where steps end.
        tokenizer:
            Tokenizer of the policy.
        prompt_ids (`Sequence[int]`):
            Token ids before the prefix.
        prefix (`str`):
            Prefix that ends with a step. See [`~search.step_search.StepSearch.prefix_fault`].

    Raises:
        `ValueError`: If the tokenizer does not reproduce the text, because steps would be cut in the wrong places, or if the
        prefix contains control tokens, which would start another turn.
    """
    token_ids = list(tokenizer.encode(prefix, add_special_tokens=False))
    found = continued_text(tokenizer, prompt_ids, token_ids)
    if found != prefix:
        raise ValueError(
            f"The policy's tokenizer decodes the prefix {prefix[:80]!r} as {found[:80]!r}. It must reproduce the text exactly. Use a "
            "policy with another tokenizer, such as a byte-level one, and remove special tokens from the prefix."
        )
    control = find_control_text(tokenizer, prefix, tags=False)
    if control:
        raise ValueError(
            f"The prefix {prefix[:80]!r} contains {shown(control[0])}, a control token of the policy's tokenizer. Remove it."
        )
    end = rule.last_end(prefix)
    cuts = cut_steps(rule, tokenizer, prompt_ids, token_ids, prefix[:end])
    return token_ids, [*cuts[:-1], Cut(len(token_ids), len(prefix), len(prefix) - end)]


def cut_at(
    tokenizer: Tokenizer, prefix_ids: Sequence[int], token_ids: Sequence[int], text: str, end: int
) -> Cut | None:
    """
    Return the first token boundary with at least `end` characters of a text before it, or `None`, for example if all later tokens
    are parts of characters.
    """

    def decoded(number: int) -> str:
        return continued_text(tokenizer, prefix_ids, token_ids[:number])

    def is_enough(number: int) -> bool:
        return decoded(number)[:end] == text[:end]

    high = min(64, len(token_ids))
    while high < len(token_ids) and not is_enough(high):
        high = min(2 * high, len(token_ids))
    first = bisect_left(range(high), True, key=is_enough)
    for number in range(first, len(token_ids) + 1):
        found = decoded(number)
        if len(found) >= end and text.startswith(found):
            return Cut(number, len(found), len(found) - end)
    return None


def only_thinks(before: str, text: str) -> bool:
    """Return whether a text is only thinking, which may have started in the text before it."""
    return any(start <= len(before) and end == len(before + text) for start, end in thinking_spans(before + text))


def _masked(text: str, mask: str = " ") -> str:
    """Return the text with each character of thinking replaced by `mask`."""
    for start, end in thinking_spans(text):
        text = text[:start] + mask * (end - start) + text[end:]
    return text
