"""Configuration of the rule that splits solutions into steps."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import COUNT, Config
from ..io import shown
from .steps import RULES, StepRule, regex_rule
from .thinking import ThinkingRule


THINKING_OPTIONS = {  # and the arguments of `ThinkingRule`
    "thinking_marks": "marks",
    "min_step_characters": "min_characters",
    "max_step_characters": "max_characters",
    "answer_segmentation": "answer",
}


@dataclass(kw_only=True)
class SegmentationConfig(Config):
    r"""
    Configuration of the rule that splits solutions into steps.

    Args:
        segmentation (`str`, *optional*):
            Name of the [`StepRule`] that splits solutions into steps, `"thinking"` for a [`ThinkingRule`], which also splits the
            thinking of a reasoning model, or `"regex"`.
        step_pattern (`str`, *optional*):
            Regular expression for `segmentation="regex"`. Each match ends a step.
        thinking_marks (`list[str]`, *optional*):
            For `segmentation="thinking"`: phrases with which the model starts to correct or check itself. Case is ignored. Defaults
            to [`~search.thinking.MARKS`], such as `"Wait"` and `"Alternatively"`.
        min_step_characters (`int`, *optional*):
            For `segmentation="thinking"`: minimum number of characters of a step in thinking. Shorter ones are joined to the next
            step, but never across a mark. Defaults to 80.
        max_step_characters (`int`, *optional*):
            For `segmentation="thinking"`: maximum number of characters of a step in thinking. Longer ones are split. Defaults to 2000.
        answer_segmentation (`str`, *optional*):
            For `segmentation="thinking"`: name of the [`StepRule`] that splits the answer after the thinking. Defaults to
            `"blank_line"`.

    Raises:
        `ValueError`: If only one of `segmentation="regex"` and `step_pattern` is set, or an option has no effect with the
            segmentation.
    """

    segmentation: Literal["step_header", "blank_line", "sentence", "formula", "thinking", "regex"] | None = field(
        default=None,
        metadata={
            "help": "Rule that splits solutions into steps. thinking also splits the thinking of a reasoning model, at blank lines and "
            "marks such as Wait (default: for sampled solutions, the rule of the prompt, or blank_line for a prompt from a file; for "
            "given solutions, step_header or the steps of their run)."
        },
    )
    step_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression for --segmentation regex. Each match ends a step.",
            "advanced": True,
        },
    )
    thinking_marks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Phrases with which a model starts to correct or check itself, for --segmentation thinking (default: Wait, "
            "Alternatively, Let me check and others, also in other languages).",
            "metavar": "PHRASE",
            "advanced": True,
        },
    )
    min_step_characters: int | None = field(
        default=None,
        metadata={
            "help": "Minimum number of characters of a step in thinking, for --segmentation thinking. Shorter ones are joined to the "
            f"next step, but never across a mark (default: {ThinkingRule.min_characters}).",
            "range": COUNT,
            "metavar": "N",
            "advanced": True,
        },
    )
    max_step_characters: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of characters of a step in thinking, for --segmentation thinking. Longer ones are split "
            f"(default: {ThinkingRule.max_characters}).",
            "range": COUNT,
            "metavar": "N",
            "advanced": True,
        },
    )
    answer_segmentation: Literal["step_header", "blank_line", "sentence", "formula"] | None = field(
        default=None,
        metadata={
            "help": "Rule that splits the answer after the thinking, for --segmentation thinking "
            f"(default: {ThinkingRule.answer}).",
            "advanced": True,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.segmentation == "regex") != (self.step_pattern is not None):
            raise ValueError(
                f"`segmentation` is {shown(self.segmentation)} and `step_pattern` is {shown(self.step_pattern)}. `segmentation='regex'` and "
                "`step_pattern` must be used together."
            )
        for name in THINKING_OPTIONS:
            if self.segmentation != "thinking" and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` is {shown(getattr(self, name))}, but has no effect with `segmentation={self.segmentation!r}`. Use "
                    f"`segmentation='thinking'`, or remove `{name}`."
                )
        self.step_rule()  # raises if an option is invalid

    def step_rule(self, default: str = "step_header") -> StepRule:
        """Return the rule that splits solutions into steps. `default` is its name if `segmentation` is not set."""
        if self.step_pattern is not None:
            return regex_rule(self.step_pattern)
        if self.segmentation == "thinking":
            given = {name: getattr(self, option) for option, name in THINKING_OPTIONS.items()}
            return ThinkingRule(**{name: value for name, value in given.items() if value is not None})
        return RULES[self.segmentation or default]
