"""Config for scoring steps with a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import COUNT, Config
from ..messages import plain_row
from ..search.thinking import thought_length
from ..step_format import StepFormat


THOUGHT = "thought"


def span(word: str) -> int | str:
    """Parse a span of the command line: a number or `thought`."""
    return word if word == THOUGHT else int(word)


@dataclass
class ScoringConfig(Config):
    """
    Configuration of how a reward model scores steps.

    Args:
        spans (`list[int | str]`, *optional*, defaults to `[1]`):
            Numbers of consecutive steps to score as one step. `[1]` scores each step separately, as the
            [HRM](https://huggingface.co/papers/2503.13551) paper does at inference (section 3.1). `[1, 2]` also scores each
            step merged with the previous step, so that a model trained on merged steps can give a correction a high score. `"thought"`
            also scores each step that begins with a mark such as "Wait" merged with the whole thought before it, since the corrected
            error can be several steps earlier. See [`~search.thinking.thought_length`]. The marks come from the [`StepFormat`].
        combine (`str`, *optional*, defaults to `"max"`):
            How to combine the scores of a step over several spans: `"max"` or `"mean"`. The first steps of a solution have
            fewer spans.

    Raises:
        `ValueError`: If `spans` does not contain 1, or contains a number below 1 or an unknown word, or `combine` is unknown.
    """

    spans: list[int | Literal["thought"]] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "Numbers of consecutive steps to score as one step. 1 scores each step separately. 1 2 also scores "
            "each step merged with the previous step. 1 thought also scores each step that begins with a mark such as Wait merged "
            "with the thought before it.",
            "range": COUNT,
            "words": (THOUGHT,),
            "parse": span,
        },
    )
    combine: Literal["max", "mean"] = field(
        default="max",
        metadata={
            "help": "How to combine the scores of a step over several spans.",
            "advanced": True,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if 1 not in self.spans:
            raise ValueError(
                f"`spans` is {self.spans}. It must contain 1, since the first step has no previous step to merge with, and only "
                f"positive numbers and {THOUGHT}."
            )

    @property
    def merges(self) -> bool:
        """Whether steps are also scored merged with others."""
        return set(self.spans) != {1}

    def merged_lengths(self, steps: Sequence[str], step_format: StepFormat) -> list[int]:
        """
        Return how many steps at the end of a path are scored as one step, in ascending order and without 1.

        Args:
            steps (`Sequence[str]`):
                Texts of the steps of the path.
            step_format ([`StepFormat`]):
                Step format of the model, with the marks and the maximum length of thoughts.
        """
        lengths = {span for span in self.spans if span != THOUGHT and span <= len(steps)}
        if THOUGHT in self.spans:
            lengths.add(thought_length(steps, step_format.thinking_marks, step_format.max_thought))
        return sorted(lengths - {1})


def plain_candidates(
    prompts: Sequence[Any], candidates: Sequence[Sequence[Sequence[Any]]]
) -> tuple[list[str], list[list[list[str]]]]:
    """
    Return the texts of prompts and candidates, which may be messages. See [`~messages.plain_row`].

    Raises:
        `ValueError`: If there is not one list of candidates per prompt, a candidate is not a list of steps, or the messages are not
            one problem and its steps.
    """
    if isinstance(prompts, str):
        raise ValueError("`prompts` is a string, expected a list of problems.")
    for i, solutions in enumerate(candidates):
        if isinstance(solutions, str) or any(isinstance(steps, str) for steps in solutions):
            raise ValueError(
                f"prompt {i}: a candidate is a string, expected a list of the texts of its steps. For whole solutions, use `score_texts`."
            )
    if len(prompts) != len(candidates):
        raise ValueError(
            f"Got {len(prompts)} prompts and candidates for {len(candidates)} prompts. Pass one list of candidates per prompt."
        )
    texts = [plain_row({"prompt": prompt}, f"prompt {i}")["prompt"] for i, prompt in enumerate(prompts)]
    plain = [
        [plain_row({"completions": steps}, f"prompt {i}")["completions"] for steps in solutions]
        for i, solutions in enumerate(candidates)
    ]
    return texts, plain
