"""Config of the commands that score steps with a reward model."""

import hashlib
import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import COUNT, SEED, Dtype
from ..io import shown
from .scoring_config import ScoringConfig


if TYPE_CHECKING:
    from ..step_format import StepFormat
    from .generative_scorer import GenerativeScorer
    from .judge_templates import JudgeTemplate
    from .tree_scorer import TreeScorer

# The settings of each engine, with their defaults: for a step reward model, and for a judge
ENGINE_SETTINGS: dict[str, dict[str, Any]] = {
    "transformers": {
        "revision": None,
        "dtype": "float32",
        "max_length": 2048,
        "batch_size": 8,
        "reference_model": None,
    },
    "vllm": {"revision": None, "dtype": "float32", "args": None},
    "URL": {"revision": None, "served_model_name": None},
}
JUDGE_SETTINGS: dict[str, dict[str, Any]] = {
    "transformers": {"revision": None, "dtype": "auto", "batch_size": 32},
    "vllm": {"revision": None, "dtype": "auto", "args": None},
    "URL": {"revision": None, "served_model_name": None},
}
# Options of a judge and their defaults. `None` is a value of the template
JUDGE_OPTIONS = {"judge_samples": 4, "judge_max_tokens": None, "judge_temperature": None, "judge_seed": 42}
# Names in reports (see `describe_scoring`), and the options they come from
REPORTED = {"scorer": "reward_model_engine", "scorer_args": "reward_model_args"} | {
    name: f"reward_model_{name}" for name in ("revision", "dtype", "max_length", "batch_size")
}
# Arguments of vLLM's engine that have a separate option
_OWN_SETTINGS = {
    "model": "reward_model",
    "revision": "reward_model_revision",
    "dtype": "reward_model_dtype",
    "runner": 'this package to "pooling"',
}


@dataclass(kw_only=True)
class RewardModelConfig(ScoringConfig):
    """
    Configuration of the reward model and of the engine that runs it. It also has the fields of [`ScoringConfig`].

    Args:
        reward_model (`str`):
            Path or Hub id of the reward model.
        reward_model_engine (`str`, *optional*, defaults to `"transformers"`):
            Engine that runs the reward model: `"transformers"` (candidates share their prefix), `"vllm"` (in this process), or
            the URL of a server that runs `vllm serve`, see [`ServerScorer`].
        reward_model_revision (`str`, *optional*):
            Revision of the reward model on the Hub.
        reward_model_dtype (`str`, *optional*):
            Dtype of the weights, for `"transformers"` and `"vllm"`. Defaults to `"float32"`, for a judge to `"auto"`.
        reward_model_batch_size (`int`, *optional*):
            Number of rows per forward pass, for `"transformers"`. Defaults to 8, for a judge to 32.
        reward_model_max_length (`int`, *optional*):
            Maximum number of tokens per row, for `"transformers"`. Longer trees are split. Defaults to 2048.
        reward_model_args (`dict[str, Any]`, *optional*):
            Additional arguments of vLLM's engine, for `"vllm"`, such as `{"gpu_memory_utilization": 0.8}`.
        served_model_name (`str`, *optional*):
            Name of the reward model on the server. Defaults to `reward_model`.
        step_format (`str`, *optional*):
            Name of a published step format (see `docs/model_zoo.md`) or path to a `step_format.json`, for a model that was saved
            without one. Defaults to the file of the model or, for a published model, to its format.
        reference_model (`str`, *optional*):
            Path or Hub id of the reference model of an implicit PRM, for `transformers`. Defaults to the name in its `step_format.json`.
        judge_template (`str`, *optional*):
            Use the reward model as a judge: a language model that writes a critique and a verdict for each step. `"instruct"` for any
            instruction model, `"genprm"`, `"thinkprm"`, or the path of a template file. See [`JudgeTemplate`]. The engine can then be a
            server that runs `vllm serve MODEL`. Set automatically for the published models `GenPRM/GenPRM-*` and `launch/ThinkPRM-*`.
        judge_samples (`int`, *optional*):
            Number of responses of the judge per prompt. Defaults to 4.
        judge_max_tokens (`int`, *optional*):
            Maximum number of tokens of a response. Defaults to the value of the template.
        judge_temperature (`float`, *optional*):
            Sampling temperature of the judge. Defaults to the value of the template.
        judge_seed (`int`, *optional*):
            Random seed of the judge. Defaults to 42.
        judge_log (`str`, *optional*):
            JSON Lines file with the responses of the judge. Responses in it are not sampled again. Defaults to `judgements*.jsonl` in
            the output folder of `best-of-n` and `benchmark`. Other commands write no log by default.

    Raises:
        `FileNotFoundError`: If `step_format` is neither a name nor a file.
        `ValueError`: If an option does not apply to the engine, or has no effect with another option.
    """

    reward_model: str = field(metadata={"help": "Path or Hub id of the reward model."})
    reward_model_engine: str = field(
        default="transformers",
        metadata={
            "help": "Engine that runs the reward model: transformers (candidates share their prefix), vllm (in this "
            "process), or the URL of a server that runs `vllm serve`.",
            "metavar": "transformers|vllm|URL",
        },
    )
    reward_model_revision: str | None = field(
        default=None, metadata={"help": "Revision of the reward model on the Hub.", "advanced": True}
    )
    reward_model_dtype: Dtype | None = field(
        default=None,
        metadata={"help": "Dtype of the weights, for transformers and vllm (default: float32, for a judge auto)."},
    )
    reward_model_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of rows per forward pass, for transformers (default: 8, for a judge 32).",
            "advanced": True,
            "range": COUNT,
        },
    )
    reward_model_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens per row, for transformers. Longer trees are split (default: 2048).",
            "advanced": True,
            "range": COUNT,
        },
    )
    reward_model_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Additional arguments of vLLM's engine as JSON, for vllm, such as "
            """'{"gpu_memory_utilization": 0.8}'.""",
            "metavar": "JSON",
            "advanced": True,
        },
    )
    served_model_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward model on the server (default: --reward_model).",
            "metavar": "NAME",
            "advanced": True,
        },
    )
    step_format: str | None = field(
        default=None,
        metadata={
            "help": "Name of a published step format, or path to a step_format.json, for a model that was saved without one "
            "(default: the file of the model, or the format of a published model).",
            "metavar": "NAME|FILE",
            "advanced": True,
        },
    )

    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of the reference model of an implicit PRM, for transformers (default: the name in its "
            "step_format.json).",
            "advanced": True,
        },
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": "Use the reward model as a judge, a language model that writes a critique and a verdict for each step: "
            "instruct (any instruction model), first_error (any instruction model, one prompt per solution), genprm, thinkprm, or "
            "the path of a template file. The engine can then be a server that runs `vllm serve MODEL`.",
            "metavar": "instruct|first_error|genprm|thinkprm|FILE",
        },
    )
    judge_samples: int | None = field(
        default=None,
        metadata={
            "help": "Number of responses of the judge per prompt (default: 4).",
            "advanced": True,
            "range": COUNT,
        },
    )
    judge_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of a response of the judge (default: the value of the template).",
            "advanced": True,
            "range": COUNT,
        },
    )
    judge_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature of the judge (default: the value of the template).",
            "advanced": True,
            "range": "[0, inf)",
        },
    )
    judge_seed: int | None = field(
        default=None,
        metadata={"help": "Random seed of the judge (default: 42).", "advanced": True, "range": SEED},
    )
    judge_log: str | None = field(
        default=None,
        metadata={
            "help": "JSON Lines file with the responses of the judge. Responses in it are not sampled again (default: "
            "judgements*.jsonl in the output folder of best-of-n and benchmark, otherwise no log).",
            "metavar": "FILE",
            "advanced": True,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_judge()
        for name, own in _OWN_SETTINGS.items():
            if name in (self.reward_model_args or ()):
                raise ValueError(f"`reward_model_args` contains {name}, which is set by {own}. Remove it.")
        self._settings()
        self.refuse_revision_of_folder("reward_model_revision", "reward_model")
        if self.combine != "max" and set(self.spans) == {1}:
            raise ValueError(
                f"`combine` is {self.combine}, but `spans` is 1, so there is only one score per step to combine. Set `spans` to 1 2, "
                "or remove `combine`."
            )
        self._step_format()

    def load_scorer(self, judge_log: Path | None = None, overwrite: bool = False) -> "TreeScorer | GenerativeScorer":
        """
        Load the reward model.

        Args:
            judge_log (`Path`, *optional*):
                Default of the option `judge_log`.
            overwrite (`bool`, *optional*, defaults to `False`):
                Whether to clear the default log if it was written with other settings.

        Raises:
            `FileNotFoundError`, `ValueError`: See the scorers.
        """
        from transformers.utils import logging

        settings, step_format = self._settings(), self._step_format()
        logging.disable_progress_bar()  # show only the progress bar of scoring
        if self.judge_template is not None:
            from .generative_scorer import GenerativeScorer

            options = self._judge_options()
            args = settings.pop("args", None) or {}
            return GenerativeScorer.from_pretrained(
                self.reward_model,
                engine=self.reward_model_engine,
                template=self.judge_template,
                temperature=options["judge_temperature"],
                revision=settings.pop("revision"),
                served_model_name=settings.pop("served_model_name", None),
                engine_args=settings | args,
                num_samples=options["judge_samples"],
                max_tokens=options["judge_max_tokens"],
                seed=options["judge_seed"],
                log=self.judge_log or judge_log,
                overwrite=overwrite and self.judge_log is None,
                progress=True,
            )
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
        Check that the step format, the tokenizer, the engine and the weights of the reward model fit, without loading it.

        Raises:
            `FileNotFoundError`, `ValueError`: See [`~step_format.StepFormat.from_pretrained`] and [`~loading.check_checkpoint`].
        """
        from ..loading import check_checkpoint, check_policy, load_tokenizer, read_step_format
        from .tree_scorer import read_text_contract

        revision = self.reward_model_revision
        if self.judge_template is not None:
            if not self.is_served():
                check_policy(self.reward_model, revision)
            return
        step_format = self._step_format()
        if self._kind() == "transformers":
            step_format = step_format or read_step_format(self.reward_model, revision)
            check_checkpoint(self.reward_model, step_format, revision, reference_model=self.reference_model)
            tokenizer = load_tokenizer(self.reward_model, revision)
        else:
            tokenizer, step_format = read_text_contract(self.reward_model, step_format, revision, False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the scorer gives them
            step_format.check(tokenizer)

    def is_served(self) -> bool:
        """Return whether a server runs the reward model."""
        return self._kind() == "URL"

    def describe_identity(self, scorer: "TreeScorer | None") -> dict[str, Any]:
        """
        Return what identifies the content of the reward model, to notice that a run is resumed with another one: `reward_model`
        (see [`~identity.checkpoint_identity`]) and, for a server, `reward_model_server`, as described by the loaded `scorer`.
        """
        from ..identity import checkpoint_identity, digest_of_files

        identity = checkpoint_identity(self.reward_model, self.reward_model_revision)
        if self.step_format is not None:
            file = Path(self.step_format)
            identity["step_format"] = digest_of_files([file]) if file.is_file() else self.step_format
        if self.judge_template is not None:
            identity.pop("step_format", None)
            template = self._judge_template()
            content = repr(template.settings() if template.scope == "first_error" else template)
            identity["judge_template"] = hashlib.sha256(content.encode()).hexdigest()
        found = {"reward_model": identity}
        described = scorer.describe() if hasattr(scorer, "describe") else {}
        if "identity" in described:
            found["reward_model_server"] = described["identity"]
        return found

    def describe_scoring(self) -> dict[str, Any]:
        """
        Return the settings that determine the scores, for reports.

        Reports are published, so the URL of a server and a token for the Hub are left out.
        """
        settings = {"scorer": self._kind(), **self._settings()}
        args = settings.pop("args", None)
        if args:
            settings["scorer_args"] = json.dumps({name: value for name, value in args.items() if name != "hf_token"})
        if self.judge_template is not None:
            settings |= {"judge_template": self.judge_template, **self._judge_options()}
        settings |= {"step_format": self.step_format, "spans": self.spans, "combine": self.combine}
        return {name: value for name, value in settings.items() if value is not None}

    def _kind(self) -> str:
        if self.reward_model_engine.startswith(("http://", "https://")):
            return "URL"
        if self.reward_model_engine not in ("transformers", "vllm"):
            raise ValueError(
                f"`reward_model_engine` is {shown(self.reward_model_engine)}. It must be transformers, vllm, or the URL of a server such "
                "as http://localhost:8000."
            )
        return self.reward_model_engine

    def _check_judge(self) -> None:
        """Raise if an option of a judge has no effect, or an option does not apply to judges."""
        from .judge_templates import published_template

        if self.judge_template is None and isinstance(self.reward_model, str) and self.step_format is None:
            self.judge_template = published_template(self.reward_model)
        if self.judge_template is None:
            models = [self.reward_model] if isinstance(self.reward_model, str) else self.reward_model
            has_judge = self.step_format is None and any(map(published_template, models))
            for name in () if has_judge else (*JUDGE_OPTIONS, "judge_log"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` has no effect without `judge_template`. Set `judge_template`, or remove it."
                    )
            return
        if self._judge_template().needs_answer:
            raise ValueError(
                f"`judge_template` is {shown(self.judge_template)}, which shows the reference answer, but a reward model scores solutions "
                "without it. Use another template, or label solutions with trl-hrm judge."
            )
        if self.step_format is not None:
            raise ValueError("`step_format` does not apply to a judge. Remove `step_format`, or `judge_template`.")
        if set(self.spans) != {1}:
            raise ValueError(
                f"`spans` is {self.spans}, but a judge sees each step with the steps before it, so steps are not merged. Set `spans` "
                "to 1."
            )
        if self.judge_temperature == 0 and self._judge_options()["judge_samples"] > 1:
            raise ValueError(
                "`judge_temperature` is 0, so all responses would be the same. Set `judge_samples` to 1, or use a higher temperature."
            )

    def _judge_template(self) -> "JudgeTemplate":
        from .judge_templates import JudgeTemplate

        return JudgeTemplate.load(self.judge_template)

    def _judge_options(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in JUDGE_OPTIONS}
        return JUDGE_OPTIONS | {name: value for name, value in given.items() if value is not None}

    def _settings(self) -> dict[str, Any]:
        """Return the settings of the chosen engine. Raise if a setting of another engine is set, as it has no effect."""
        table = ENGINE_SETTINGS if self.judge_template is None else JUDGE_SETTINGS
        settings = dict(table[self._kind()])
        for name in dict.fromkeys(name for names in ENGINE_SETTINGS.values() for name in names):
            own = name if name in ("served_model_name", "reference_model") else f"reward_model_{name}"
            value = getattr(self, own)
            if value is None:
                continue
            if name not in settings:
                others = " and ".join(kind for kind, names in table.items() if name in names)
                if not others:
                    raise ValueError(f"`{own}` does not apply to a judge. Remove `{own}`.")
                raise ValueError(
                    f"`{own}` only applies to engine {others}, but `reward_model_engine` is {self.reward_model_engine}. Remove "
                    f"`{own}`."
                )
            settings[name] = value
        return settings

    def _step_format(self) -> "StepFormat | None":
        from ..step_format import StepFormat

        return None if self.step_format is None else StepFormat.named(self.step_format)


@dataclass(kw_only=True)
class RewardModelsConfig(RewardModelConfig):
    """
    Configuration of several reward models and of the engine that runs them. It also has the fields of [`RewardModelConfig`].

    Args:
        reward_model (`list[str]`):
            Paths or Hub ids of the reward models. Each is scored in its own step format. The other options apply to all of them.

    Raises:
        `ValueError`: If there are several reward models, and an option can only apply to one.
    """

    reward_model: list[str] = field(
        metadata={
            "help": "Paths or Hub ids of the reward models. Each is scored in its own step format.",
            "metavar": "MODEL",
        }
    )

    def __post_init__(self):
        super().__post_init__()
        for name, words in (("served_model_name", "the name of one model"), ("judge_log", "the log of one model")):
            if len(self.reward_model) > 1 and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is {words}. Remove it, or pass one `reward_model`.")

    def scoring_configs(self) -> list[RewardModelConfig]:
        """Return the config of each reward model. The options of a judge only apply to judges."""
        from .judge_templates import published_template

        shared = {field.name: getattr(self, field.name) for field in fields(RewardModelConfig)}
        configs = []
        for name in self.reward_model:
            settings = shared | {"reward_model": name}
            if self.judge_template is None and published_template(name) is None:
                settings |= dict.fromkeys(JUDGE_OPTIONS)  # these are for the judges among the models
            configs.append(RewardModelConfig(**settings))
        return configs
