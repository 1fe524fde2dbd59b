"""The choices of multiple-choice problems, which are part of the problem, and the label of the right one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any


COLUMNS = ("choices", "options")
_LABELLED = re.compile(r"\(?([A-Z])[).:]\s*(.+)", re.DOTALL)


@dataclass(frozen=True)
class Choices:
    """
    The choices of a problem.

    Args:
        labels (`list[str]`):
            Their labels, such as `"A"`.
        texts (`list[str]`):
            Their texts.
    """

    labels: list[str]
    texts: list[str]

    def add_to(self, problem: str) -> str:
        """
        The problem with its choices, one a line, unless it holds them already.

        Example:

        ```python
        >>> print(Choices(["A", "B"], ["3", "4"]).add_to("What is 1 + 2?"))
        What is 1 + 2?
        A. 3
        B. 4
        ```
        """
        place = 0
        for label, text in zip(self.labels, self.texts, strict=True):
            shown = re.compile(rf"(?<!\w){re.escape(label)}(?!\w)").search(problem, place)
            place = -1 if shown is None else problem.find(text, shown.end())
            if place == -1:
                break
            place += len(text)
        else:
            return problem
        lines = [f"{label}. {text}" for label, text in zip(self.labels, self.texts, strict=True)]
        return "\n".join([problem.strip(), *lines])

    def label_of(self, answer: str | int | float) -> str | None:
        """The label of the right choice, given by its label, its text, or its index from 0. `None` if it is not clear which."""
        text = str(answer).strip()
        if text in self.labels:
            return text
        marked = re.fullmatch(r"\(?([A-Za-z0-9]+)[).:]?", text)
        if marked and marked[1] in self.labels:
            return marked[1]
        by_text = [label for label, choice in zip(self.labels, self.texts, strict=True) if choice.strip() == text]
        labelled = _LABELLED.fullmatch(text)
        if not by_text and labelled and labelled[1] in self.labels:
            return labelled[1]
        is_index = isinstance(answer, int) and 0 <= answer < len(self.labels)
        by_index = [self.labels[answer]] if is_index else []
        found = {*by_text, *by_index}
        return found.pop() if len(found) == 1 else None


def read_choices(value: Any) -> Choices | None:
    """
    Choices as the public datasets have them: a list of texts, with or without their labels, an object of texts by label, or
    an object with lists `text` and `label`. `None` for anything else.
    """
    if isinstance(value, Mapping) and {"text", "label"} <= value.keys():
        labels, texts = value["label"], value["text"]
    elif isinstance(value, Mapping):
        labels, texts = list(value), list(value.values())
    elif isinstance(value, (list, tuple)):
        labels, texts = list(ascii_uppercase[: len(value)]), list(value)
        marked = [_LABELLED.fullmatch(text) for text in texts if isinstance(text, str)]
        if len(marked) == len(texts) and all(marked) and [match[1] for match in marked] == labels:
            texts = [match[2] for match in marked]
    else:
        return None
    if not isinstance(labels, list) or not isinstance(texts, list) or not 1 < len(texts) == len(labels):
        return None
    if not all(isinstance(text, (str, int, float)) and str(text).strip() for text in [*labels, *texts]):
        return None
    return Choices([str(label).strip() for label in labels], [str(text).strip() for text in texts])
