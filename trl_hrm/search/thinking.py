r"""
Steps of thinking models: segments of the text between `<think>` and `</think>`, and thoughts, which are runs of segments.

A *mark* is a phrase with which a model starts to correct or check itself, such as "Wait" or "Alternatively". A *thought* is the text
from one mark to the next. It has one or several segments.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from ..grading.extraction import untagged_parts
from ..io import shown
from .engines.base import Tokenizer
from .steps import BLANK, CLOSING, CODE, NO_SENTENCE_END, RULES, SENTENCE, Boundary, StepRule


MARKS = (
    *(
        "Wait",
        "But wait",
        "Oh wait",
        "Oh, wait",
        "No wait",
        "No, wait",
        "Hold on",
        "Actually",
        "Oops",
        "Hm",
        "Hmm",
        "Hmmm",
    ),
    *("Alternatively", "On second thought", "Another way", "Another approach", "Let me try", "Let's try another"),
    *(
        "Let me check",
        "Let me double-check",
        "Let me double check",
        "Let me recheck",
        "Let me re-check",
        "Let me verify",
    ),
    *("Let me reconsider", "Let me rethink", "Let me think again", "Let me start over", "Let's check", "Let's verify"),
    *("That's not right", "That can't be right", "That is not right", "That doesn't seem right", "I made a mistake"),
    *(
        "等等",
        "等一下",
        "不对，",
        "不对。",
        "不对,",
        "让我检查",
        "让我再检查",
        "让我验证",
        "让我重新",
        "换个思路",
        "换一种",
        "另一种方法",
    ),
    *("Attends", "Attendez", "Moment mal", "Warte", "Espera", "Подожди", "Подождите", "待って", "ちょっと待", "잠깐"),
)

_LEAD = " \t*_#>-+•\"'“‘(「"  # formatting before a mark
_BEFORE_MARK = re.compile(
    rf"(?:\A\s*|\n|(?:[.?!…][{re.escape(CLOSING)}]*[ \t])|[。！？…][{re.escape(CLOSING)}]*)[ \t]*(?P<lead>[{re.escape(_LEAD)}]*)\Z"
)
_FORMULA = re.compile(
    r"\\\[.*?\\\]|\\begin\{(?P<name>[^{}\n]*)\}.*?\\end\{(?P=name)\}|^[ \t]*\$\$[ \t]*\n.*?^[ \t]*\$\$[ \t]*$"
    r"|\$\$(?:(?!\n[ \t]*\n).)+?\$\$",
    re.MULTILINE | re.DOTALL,
)
_LINE, _SPACE = re.compile(r"\n"), re.compile(r"\s")
_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(SENTENCE)
_NO_SENTENCE_END = re.compile(NO_SENTENCE_END)


@dataclass(frozen=True)
class ThinkingRule(StepRule):
    r"""
    Rule that splits the thinking of a reasoning model into segments, and the answer after it with another rule.

    In thinking, a step ends at a blank line, and before a mark of backtracking at the start of a paragraph, line or sentence. Steps
    shorter than `min_characters` are joined to the next one, but never across a mark or a tag. Longer steps than `max_characters`
    are split at the last end of a sentence in the second half of the allowed length or, without one, at white space. Steps end
    inside a fenced code block or a displayed formula only if it is longer than `max_characters`.

    Tags such as `</think>` belong to no step, so no step contains both thinking and answer. Thinking is never removed with this
    rule. Text without tags is an answer. The rule is for whole solutions: it has no stop strings.

    Args:
        marks (`tuple[str, ...]`, *optional*):
            Marks of backtracking. Case is ignored. Defaults to `MARKS`, a list of English and some other phrases.
        min_characters (`int`, *optional*, defaults to `80`):
            Minimum number of characters of a step in thinking.
        max_characters (`int`, *optional*, defaults to `2000`):
            Maximum number of characters of a step in thinking.
        answer (`str`, *optional*, defaults to `"blank_line"`):
            Name of the [`StepRule`] that splits the answer.

    Raises:
        `ValueError`: If a mark is blank, `answer` is unknown, or the numbers are not `1 <= min_characters <= max_characters`.

    Example:

    ```python
    >>> text = "<think>\n2 + 3 * 4 is 20. Wait, 3 * 4 comes first. So it is 14.\n</think>\n\nIt is 14."
    >>> cut_text(text, ThinkingRule())
    ['2 + 3 * 4 is 20.', 'Wait, 3 * 4 comes first. So it is 14.', 'It is 14.']
    ```
    """

    name: str = "thinking"
    pattern: str = r"\n\s*\n"
    stops: tuple[str, ...] = ()
    marks: tuple[str, ...] = MARKS
    min_characters: int = 80
    max_characters: int = 2000
    answer: str = "blank_line"

    keeps_thinking: ClassVar[bool] = True  # and its steps are never removed

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "stops", tuple(self.stops))  # lists in JSON
        object.__setattr__(self, "marks", tuple(self.marks))
        mark_pattern(self.marks)
        if not 1 <= self.min_characters <= self.max_characters:
            raise ValueError(
                f"The minimum length of a step in thinking is {self.min_characters} characters and the maximum {self.max_characters}. "
                "They must be at least 1, and the minimum at most the maximum."
            )
        if self.answer not in RULES:
            raise ValueError(
                f"The step rule of the answer is {shown(self.answer)}. It must be one of {', '.join(RULES)}."
            )

    def ends(self, text: str, start: int = 0) -> list[int]:
        parts = [(first, text[first:end].rstrip(BLANK)) for first, end, _ in untagged_parts(text)]
        last = max((first + len(part) for first, part in parts if part), default=0)
        return [*(found.end for found in self.boundaries(text, start) if found.end < last), len(text)]

    def boundaries(self, text: str, start: int = 0) -> Iterator[Boundary]:
        for first, end, thinks in untagged_parts(text):
            position = max(first, start)
            if position >= end:
                continue
            split = self._split_thinking if thinks else self._split_answer
            for place in split(text[first:end], position - first):
                position = first + place
                yield Boundary(position, position, "")
            if end < len(text) and text[position:end].strip(BLANK):
                yield Boundary(end, end, "")

    def _split_answer(self, text: str, start: int) -> Iterator[int]:
        """Yield the end of each step of an answer except the last."""
        for found in RULES[self.answer].boundaries(text, start):
            if text[found.end :].strip(BLANK):
                yield found.end

    def _split_thinking(self, text: str, start: int) -> Iterator[int]:
        """Yield the end of each step of a thinking without tags except the last."""
        closed = [match.span() for pattern in (CODE, _FORMULA) for match in pattern.finditer(text)]

        def is_closed(place: int) -> bool:
            return any(first < place < end for first, end in closed)

        ends = {match.end(): False for match in _PARAGRAPH.finditer(text)}  # whether a mark follows
        after = None
        for match in mark_pattern(self.marks).finditer(text):
            before = _BEFORE_MARK.search(text, max(match.start() - 40, 0), match.start())
            if before:
                # Right after another mark, as in "Hmm. Wait, no", it continues the same thought
                if after is None or text[after : match.start()].strip(BLANK + ",.!?…—–。，！？"):
                    ends[before.start("lead")] = True
                after = match.end()
        for place, is_mark in [*sorted(ends.items()), (len(text), True)]:
            if place <= start or is_closed(place):
                continue
            for cut in self._split_long(text, start, place, is_closed):
                yield cut
                start = cut
            is_short = len(text[start:place].strip()) < self.min_characters and not is_mark
            if not is_short and text[start:place].strip(BLANK) and text[place:].strip(BLANK):
                yield place
                start = place

    def _split_long(self, text: str, start: int, end: int, is_closed: Callable[[int], bool]) -> Iterator[int]:
        """Yield the places at which to split `text[start:end]`, so that no part has more than `max_characters`."""
        while True:
            start += len(text[start:end]) - len(text[start:end].lstrip())
            content = start + len(text[start:end]) - len(text[start:end].lstrip(BLANK))
            limit = max(start + self.max_characters, content + 1)
            if not text[limit:end].strip(BLANK):
                return
            sentences = []
            for match in _SENTENCE_END.finditer(text, start, limit):
                line = text.rfind("\n", start, match.end() - 1) + 1
                if not _NO_SENTENCE_END.search(text[max(line, start) : match.end()]):
                    sentences.append(match.end())
            lines, spaces = (
                [match.end() for match in pattern.finditer(text, start, limit)] for pattern in (_LINE, _SPACE)
            )
            least = max(start + self.max_characters // 2, content)
            kinds = [[place for place in kind if place > least] for kind in (sentences, lines, spaces)]
            kinds = [[place for place in kind if not is_closed(place)] for kind in kinds] + kinds[1:]
            start = next((kind[-1] for kind in kinds if kind), limit)
            yield start


def rule_type(settings: Mapping[str, Any]) -> type[StepRule]:
    """Return the class of a step rule from its settings in the manifest of a run."""
    return ThinkingRule if "marks" in settings else StepRule


@lru_cache
def mark_pattern(marks: tuple[str, ...]) -> re.Pattern:
    """
    Return a pattern that matches a mark, ignoring case.

    Raises:
        `ValueError`: If `marks` is empty, or a mark is blank.
    """
    if not marks or not all(isinstance(mark, str) and mark.strip() for mark in marks):
        raise ValueError(
            f"The marks of backtracking are {shown(list(marks), 200)}. They must be phrases such as 'Wait'."
        )
    words = sorted({mark.strip() for mark in marks}, key=lambda mark: (-len(mark), mark))
    one = "|".join(re.escape(word) + r"(?!\w)" * (word[-1].isascii() and word[-1].isalnum()) for word in words)
    return re.compile(rf"(?<!\w)(?:{one})", re.IGNORECASE)


def begins_thought(step: str, marks: Sequence[str] | None = None) -> bool:
    """Return whether a step begins with a mark, after any formatting such as `**`."""
    return mark_pattern(MARKS if marks is None else tuple(marks)).match(step.lstrip(_LEAD + "\n\r")) is not None


def thought_length(steps: Sequence[str], marks: Sequence[str] | None = None, max_steps: int = 16) -> int:
    """
    Return the number of steps at the end of a path that are merged into one, if the last step begins a thought: this step and all
    steps of the thought before it. The thought before it starts at the previous step that begins with a mark, or at the first step.

    Args:
        steps (`Sequence[str]`):
            Texts of the steps of a path.
        marks (`Sequence[str]`, *optional*):
            Marks of backtracking. Defaults to `MARKS`.
        max_steps (`int`, *optional*, defaults to `16`):
            Maximum number of steps. Of a longer thought, only the last steps are merged.

    Returns:
        `int`: Number of steps. 1 if the last step does not begin a thought, or is the first.

    Example:

    ```python
    >>> thought_length(["3 * 4 is 7.", "So 2 + 7 is 9.", "Wait, 3 * 4 is 12."])
    3
    ```
    """
    if not steps or not begins_thought(steps[-1], marks):
        return 1
    length = 1
    while length < min(len(steps), max_steps):
        length += 1
        if begins_thought(steps[-length], marks):
            break
    return length


def dropped_tag(tokenizer: Tokenizer) -> str | None:
    """
    Return a thinking tag that is a special token of the tokenizer, or `None`. Special tokens are left out of sampled texts, so
    thinking could not be told from the answer.
    """
    for tag in ("</think>", "</thinking>", "[/THINK]", "◁/think▷"):
        ids = tokenizer.encode(tag, add_special_tokens=False)
        texts = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)]
        if tag in texts[0] and tag not in texts[1]:
            return tag
    return None
