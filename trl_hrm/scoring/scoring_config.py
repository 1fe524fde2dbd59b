"""Config for scoring steps with a reward model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import COUNT, Config
from ..io import shown
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


def checkpoint_name(path_or_repo: str | Path, loaded: str) -> str:
    """Return the path or Hub id of a checkpoint as a string. Raise `TypeError` for a loaded model, which `loaded` takes instead."""
    if not isinstance(path_or_repo, str | Path):
        raise TypeError(
            f"`path_or_repo` is a `{type(path_or_repo).__name__}`. It must be the path or Hub id of a checkpoint. For a loaded model, use "
            f"`{loaded}`."
        )
    return str(path_or_repo)


def plain_candidates(
    prompts: Sequence[Any], candidates: Sequence[Sequence[Sequence[Any]]]
) -> tuple[list[str], list[list[list[str]]]]:
    """
    Return the texts of prompts and candidates, which may be messages. See [`~messages.plain_row`].

    Raises:
        `ValueError`: If there is not one list of candidates per prompt, a candidate is not a list of steps, a step is not a text, or the
            messages are not one problem and its steps.
    """
    if isinstance(prompts, str):
        raise ValueError("`prompts` is a string, expected a list of problems.")
    plain = []
    for i, solutions in enumerate(candidates):
        where = f"prompt {i}"
        plain.append([])
        for steps in _listed(solutions, where):
            steps = plain_row({"completions": _listed(steps, where)}, where)["completions"]
            wrong = [step for step in steps if not isinstance(step, str)]
            if wrong:
                raise ValueError(
                    f"{where}: candidate {len(plain[i])} has the step {shown(wrong[0])}. Each step must be a string. Correct or remove it."
                )
            plain[i].append(steps)
    if len(prompts) != len(candidates):
        raise ValueError(
            f"Got {len(prompts)} prompts and candidates for {len(candidates)} prompts. Pass one list of candidates per prompt."
        )
    texts = [plain_row({"prompt": prompt}, f"prompt {i}")["prompt"] for i, prompt in enumerate(prompts)]
    return texts, plain


def _listed(values: Any, where: str) -> list[Any]:
    """Return the candidates of a prompt, or the steps of a candidate, as a list. They may be an array."""
    if isinstance(values, str):
        raise ValueError(
            f"{where}: a candidate is a string, expected a list of the texts of its steps. Split the solution into steps first. "
            "`StepScorer.score_texts` does both."
        )
    if not isinstance(values, Iterable) or isinstance(values, Mapping):
        raise ValueError(
            f"{where}: found {shown(values)}, expected a list of candidates, each a list of the texts of its steps. Correct or remove it."
        )
    return list(values)
