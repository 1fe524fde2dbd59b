"""The settings of the commands that score steps with a trained reward model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .scoring_config import ScoringConfig


if TYPE_CHECKING:
    from ..step_format import StepFormat
    from .tree_scorer import TreeScorer

# What each engine takes, and what it takes if nothing is given
ENGINE_SETTINGS: dict[str, dict[str, Any]] = {
    "transformers": {"revision": None, "dtype": "float32", "max_length": 2048, "batch_size": 8},
    "vllm": {"revision": None, "dtype": "float32", "args": None},
    "URL": {"revision": None, "served_model_name": None},
}
# Names in reports, see `describe_scoring`, and the options that they come from
REPORTED = {"scorer": "reward_model_engine", "scorer_args": "reward_model_args"} | {
    name: f"reward_model_{name}" for name in ("revision", "dtype", "max_length", "batch_size")
}
# Arguments of vLLM's engine that have a setting of their own here
_OWN_SETTINGS = {
    "model": "the reward model",
    "revision": "reward_model_revision",
    "dtype": "reward_model_dtype",
    "runner": 'always "pooling"',
}


@dataclass(kw_only=True)
class RewardModelConfig(ScoringConfig):
    """
    The reward model, what runs it, and how the scores of steps are taken from it: the fields of [`ScoringConfig`], and

    Args:
        reward_model (`str`):
            Folder or Hub id of the reward model.
        reward_model_engine (`str`, *optional*, defaults to `"transformers"`):
            What runs it: `"transformers"` (candidates share their prefix), `"vllm"` in this process, or the address of a server
            that runs `vllm serve MODEL --runner pooling`.
        reward_model_revision (`str`, *optional*):
            Revision of the reward model on the Hub.
        reward_model_dtype (`str`, *optional*):
            Type of the weights, for transformers and vllm. By default `"float32"`.
        reward_model_batch_size (`int`, *optional*):
            Rows of a forward pass, for transformers. By default 8.
        reward_model_max_length (`int`, *optional*):
            Largest number of tokens of a row, for transformers. By default 2048.
        reward_model_args (`dict[str, Any]`, *optional*):
            More arguments of vLLM's engine, for vllm, such as `{"gpu_memory_utilization": 0.8}`.
        served_model_name (`str`, *optional*):
            Name of the reward model at the server. By default its folder or Hub id.
        step_format (`str`, *optional*):
            A `step_format.json`, for a model that was saved without one. By default the model's own.

    Raises:
        `FileNotFoundError`: If there is no such format.
        `ValueError`: If an option does not go with the engine, or has no meaning beside another option.
    """

    reward_model: str = field(metadata={"help": "Folder or Hub id of the reward model."})
    reward_model_engine: str = field(
        default="transformers",
        metadata={
            "help": "What runs the reward model: transformers (candidates share their prefix), vllm in this process, or "
            "the address of a server that runs `vllm serve MODEL --runner pooling`.",
            "metavar": "transformers|vllm|URL",
        },
    )
    reward_model_revision: str | None = field(
        default=None, metadata={"help": "Revision of the reward model on the Hub.", "advanced": True}
    )
    reward_model_dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights, for transformers and vllm (default: float32)."}
    )
    reward_model_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of a forward pass, for transformers (default: 8)."}
    )
    reward_model_max_length: int | None = field(
        default=None,
        metadata={"help": "Largest number of tokens of a row, for transformers (default: 2048).", "advanced": True},
    )
    reward_model_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More arguments of vLLM's engine as JSON, for vllm, as in "
            """'{"gpu_memory_utilization": 0.8}'.""",
            "metavar": "JSON",
            "advanced": True,
        },
    )
    served_model_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward model at the server (default: the folder or Hub id).",
            "metavar": "NAME",
            "advanced": True,
        },
    )
    step_format: str | None = field(
        default=None,
        metadata={
            "help": "A step_format.json, for a model that was saved without one (default: the model's own).",
            "metavar": "FILE",
            "advanced": True,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, own in _OWN_SETTINGS.items():
            if name in (self.reward_model_args or ()):
                raise ValueError(f"reward_model_args has {name}, which is {own}. Leave it out.")
        self._settings()
        if self.combine != "max" and set(self.spans) == {1}:
            raise ValueError(
                f"combine is {self.combine}, which makes one score of those of several spans, and spans is 1. Give spans 1 2, or "
                "leave it out."
            )
        if self.step_format is not None and not Path(self.step_format).is_file():
            raise FileNotFoundError(
                f"step_format: there is no file {self.step_format}, expected a step_format.json, as the trainer saves one "
                "with every checkpoint."
            )

    def load_scorer(self) -> "TreeScorer":
        """
        Load the reward model.

        Raises:
            `FileNotFoundError`, `ValueError`: See the scorers.
        """
        from transformers.utils import logging

        settings, step_format = self._settings(), self._step_format()
        logging.disable_progress_bar()  # loading takes a moment; the bar of scoring is the one to watch
        if self.reward_model_engine == "transformers":
            from .scorer import StepScorer

            return StepScorer.from_pretrained(self.reward_model, step_format=step_format, **settings)
        if self.reward_model_engine == "vllm":
            from .vllm_scorer import VLLMScorer

            settings |= settings.pop("args") or {}
            return VLLMScorer.from_pretrained(self.reward_model, step_format=step_format, **settings)
        from .http_scorer import ServerScorer

        return ServerScorer.from_pretrained(
            self.reward_model, self.reward_model_engine, step_format=step_format, **settings
        )

    def check_reward_model(self) -> None:
        """
        Refuse a reward model whose format or weights do not fit, without loading it.

        Raises:
            `FileNotFoundError`, `ValueError`: See [`~step_format.StepFormat.from_pretrained`] and [`~loading.check_checkpoint`].
        """
        from ..loading import check_checkpoint
        from ..step_format import StepFormat

        revision = self.reward_model_revision
        step_format = self._step_format() or StepFormat.from_pretrained(self.reward_model, revision=revision)
        check_checkpoint(self.reward_model, step_format, revision)

    def describe_scoring(self) -> dict[str, Any]:
        """
        The settings that decide the scores, for reports.

        Reports are published: the address of a server is left out, and so is a token for the Hub.
        """
        settings = {"scorer": self._kind(), **self._settings()}
        args = settings.pop("args", None)
        if args:
            settings["scorer_args"] = json.dumps({name: value for name, value in args.items() if name != "hf_token"})
        settings |= {"step_format": self.step_format, "spans": self.spans, "combine": self.combine}
        return {name: value for name, value in settings.items() if value is not None}

    def _kind(self) -> str:
        if self.reward_model_engine.startswith(("http://", "https://")):
            return "URL"
        if self.reward_model_engine not in ("transformers", "vllm"):
            raise ValueError(
                f"reward_model_engine is {self.reward_model_engine!r}, expected transformers, vllm, or the address of a server "
                "such as http://localhost:8000."
            )
        return self.reward_model_engine

    def _settings(self) -> dict[str, Any]:
        """What the chosen engine takes. A setting of another one is an error: it would do nothing."""
        settings = dict(ENGINE_SETTINGS[self._kind()])
        for name in dict.fromkeys(name for names in ENGINE_SETTINGS.values() for name in names):
            own = name if name == "served_model_name" else f"reward_model_{name}"
            value = getattr(self, own)
            if value is None:
                continue
            if name not in settings:
                others = " and ".join(kind for kind, names in ENGINE_SETTINGS.items() if name in names)
                raise ValueError(
                    f"{own} goes with reward_model_engine {others}, and reward_model_engine is {self.reward_model_engine}. "
                    "Leave it out."
                )
            settings[name] = value
        return settings

    def _step_format(self) -> "StepFormat | None":
        from ..step_format import StepFormat

        if self.step_format is None:
            return None
        return StepFormat.from_json(Path(self.step_format).read_bytes(), where=self.step_format)
