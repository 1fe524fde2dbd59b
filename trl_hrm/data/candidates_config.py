"""Options of the reading of candidate solutions."""

from dataclasses import dataclass, field

from ..search.steps import RULES, StepRule, regex_rule


@dataclass(kw_only=True)
class CandidatesConfig:
    r"""
    Where candidate solutions are, and how their texts are cut into steps.

    Args:
        candidates (`str`):
            A file of JSON Lines or of a JSON array, the folder of a dataset, or that of a run of `trl-hrm annotate`.
        split (`str`, *optional*):
            Split of a dataset. By default `"train"`.
        segmentation (`str`, *optional*):
            Name of the [`StepRule`] that cuts texts into steps, or `"regex"`. By default `"step_header"`, and for a run the steps
            of its search. Not for lists of steps, which are cut already.
        step_pattern (`str`, *optional*):
            Regular expression whose matches end steps, for `segmentation="regex"`.
        join_steps (`str`, *optional*):
            Text between the steps of a candidate that is given as a list, in its text. By default `"\n\n"`.
        columns (`dict[str, str]`, *optional*):
            New names of columns, such as `{"prompt": "question"}`. See [`~data.sources.rename_columns`]. Not for runs.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether a reasoning model's thinking has steps and answers like the rest of its text. By default it is left out, up to
            `</think>`, and a candidate that only thinks has no steps.

    Raises:
        `ValueError`: If there is no such rule, or an option has no meaning beside another.
    """

    candidates: str
    split: str | None = None
    segmentation: str | None = None
    step_pattern: str | None = None
    join_steps: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    keep_thinking: bool = False

    def __post_init__(self):
        if self.segmentation not in (None, "regex", *RULES):
            raise ValueError(f"segmentation is {self.segmentation!r}, expected one of {', '.join(RULES)}, regex.")
        if (self.segmentation == "regex") != (self.step_pattern is not None):
            raise ValueError("segmentation='regex' and step_pattern go together, and one of them is missing.")
        self.step_rule()  # checks the pattern

    def step_rule(self) -> StepRule:
        """Tells where the steps of a text end."""
        return (
            regex_rule(self.step_pattern)
            if self.step_pattern is not None
            else RULES[self.segmentation or "step_header"]
        )
