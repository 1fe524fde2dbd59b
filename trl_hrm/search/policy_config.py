"""Options of the commands that sample from a policy: the policy and its engine, the prompt, and the run."""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..config import COUNT, PROCESSES, SEED, Config, Dtype
from ..encoding import CHAT_TEMPLATE_DATE
from ..grading import DEFAULT_EXTRACTORS, EXTRACTORS
from ..io import read_text, shown
from ..tracking import TRACKERS
from .prompts import PROMPTS, Prompt
from .run_folder import Shard, show_own_gpu
from .segmentation_config import SegmentationConfig
from .steps import StepRule


# Metadata of the fields that all models with an engine have
ENGINE_ARGS = {
    "help": "Additional arguments of the engine as JSON. For vllm, any engine argument, such as "
    """'{"gpu_memory_utilization": 0.8}'; for transformers, batch_size and attn_implementation; for openai, """
    "timeout, max_retries and backoff.",
    "metavar": "JSON",
}
TOP_P = {
    "help": "Cumulative probability of the tokens to sample from. 1 disables it.",
    "advanced": True,
    "range": "(0, 1]",
}
TOP_K = {
    "help": "Number of most probable tokens to sample from. 0 disables it.",
    "advanced": True,
    "range": "[0, inf)",
}


@dataclass(kw_only=True)
class EngineConfig(Config):
    """
    Base class of the configs with a model that an engine runs, such as [`PolicyConfig`]. It checks the options and starts the engine.

    A subclass has the fields `engine`, `engine_args`, `temperature`, `top_p` and `top_k`, and the fields that `MODEL_FIELDS` names:

    Attributes:
        MODEL_FIELDS (`dict[str, str]`):
            Names of the fields with the `model`, its `revision`, `dtype`, `urls`, `api` and `tokenizer`.
    """

    MODEL_FIELDS: ClassVar[dict[str, str]]

    def __post_init__(self):
        super().__post_init__()
        names = self.MODEL_FIELDS
        if self.engine is None and self._option("model") is not None:
            local = "vllm" if find_spec("vllm") else "transformers"
            self.engine = local if self._option("urls") is None else "openai"
        for name in (names["urls"], names["api"], names["tokenizer"]):
            if getattr(self, name) is not None and self.engine != "openai":
                raise ValueError(
                    f"`{name}` only applies to engine openai, but `engine` is {self.engine}. Remove `{name}`."
                )
        if self.engine == "openai":
            if self._option("urls") is None:
                raise ValueError(
                    f"`engine` is openai, but `{names['urls']}` is missing. Set it to the base URLs of the servers, such as "
                    "http://host:8000/v1."
                )
            if self._option("dtype") is not None:
                raise ValueError(
                    f"`{names['dtype']}` only applies to vllm and transformers, but `engine` is openai. Remove `{names['dtype']}`."
                )
        self.refuse_revision_of_folder(
            names["revision"], names["model" if self._option("tokenizer") is None else "tokenizer"]
        )

    def _option(self, name: str) -> Any:
        """Return the value of an option of the model, by its name in `MODEL_FIELDS`."""
        return getattr(self, self.MODEL_FIELDS[name])

    def load_tokenizer(self) -> Any:
        """Load the tokenizer of the model."""
        from ..loading import load_tokenizer

        return load_tokenizer(self._option("tokenizer") or self._option("model"), self._option("revision"))

    def model_identity(self) -> dict[str, Any]:
        """
        Return what identifies the content of the model, for the manifest. For servers, only the tokenizer is known. See
        [`~identity.checkpoint_identity`].
        """
        from ..identity import checkpoint_identity

        identity = checkpoint_identity(self._option("tokenizer") or self._option("model"), self._option("revision"))
        if self.engine == "openai":
            commit = {name: value for name, value in identity.items() if name == "commit"}
            return {"tokenizer": identity.get("tokenizer", commit)}
        return {name: value for name, value in identity.items() if name != "step_format"}

    def load_engine(self, shard: Shard | None = None) -> Any:
        """
        Start the engine of the model. If several processes were launched, each uses its own GPU.

        Raises:
            `OSError`: If no server can be used.
            `ValueError`: If the engine does not accept an argument in `engine_args`.
        """
        model = self._option("model")
        given = {
            "revision": self._option("revision"),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        if self.engine == "openai":
            from .engines.openai import OpenAIEngine

            given |= self._engine_args("timeout", "max_retries", "backoff")
            if self._option("api") is not None:
                given["api"] = self._option("api")
            engine = OpenAIEngine(self._option("urls"), model, self.load_tokenizer(), **given)
            engine.connect()
            return engine
        if self._option("dtype") is not None:
            given["dtype"] = self._option("dtype")
        if self.engine == "vllm":
            from .engines.vllm import VLLMEngine

            if shard is not None and shard.local is not None:
                show_own_gpu(shard.local)
            return VLLMEngine.from_pretrained(model, **(self.engine_args or {}), **given)
        import torch

        from .engines.transformers import TransformersEngine

        given |= self._engine_args("batch_size", "attn_implementation")
        device = None
        if shard is not None and shard.local is not None and torch.accelerator.is_available():
            device = torch.device(torch.accelerator.current_accelerator().type, shard.local)
        return TransformersEngine.from_pretrained(model, device=device, **given)

    def _engine_args(self, *names: str) -> dict[str, Any]:
        """Return `engine_args` for an engine that only accepts these names."""
        unknown = [name for name in self.engine_args or () if name not in names]
        if unknown:
            raise ValueError(
                f"`engine_args` has {', '.join(unknown)}, but engine {self.engine} accepts only {', '.join(names)}."
            )
        return self.engine_args or {}


@dataclass(kw_only=True)
class PolicyConfig(EngineConfig):
    """
    Configuration of the policy and of the engine that runs it.

    Args:
        policy (`str`):
            Path or Hub id of the policy. With `engine="openai"`, the name of the model on the servers. Optional only for
            commands that accept other inputs.
        engine (`str`, *optional*):
            Engine that runs the policy: `"vllm"`, `"transformers"`, or `"openai"` for servers. Defaults to `"openai"` if
            `policy_urls` is set, otherwise to `"vllm"` if vLLM is installed, otherwise to `"transformers"`.
        policy_revision (`str`, *optional*):
            Revision of the policy on the Hub.
        policy_dtype (`str`, *optional*):
            Dtype of the weights, for vllm and transformers. Defaults to the dtype of the checkpoint.
        policy_urls (`list[str]`, *optional*):
            Base URLs of OpenAI-compatible completions servers, such as `http://host:8000/v1`.
        policy_api (`str`, *optional*):
            Kind of server: `"vllm"` (exchanges token ids), `"transformers"` (`transformers serve`), or `"text"` (any other
            completions server). Defaults to `"vllm"`.
        policy_tokenizer (`str`, *optional*):
            Path or Hub id of the tokenizer, for servers. Defaults to `policy`.
        engine_args (`dict[str, Any]`, *optional*):
            Additional arguments of the engine. For vllm, any engine argument, such as `{"gpu_memory_utilization": 0.8}`; for
            transformers, `batch_size` and `attn_implementation`; for openai, `timeout`, `max_retries` and `backoff`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. 0 means greedy decoding.
        top_p (`float`, *optional*, defaults to `1.0`):
            Cumulative probability of the tokens to sample from. 1 disables it.
        top_k (`int`, *optional*, defaults to `0`):
            Number of most probable tokens to sample from. 0 disables it.

    Raises:
        `ValueError`: If an option does not work with the engine.
    """

    policy: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of the policy. For openai, the name of the model on the servers."},
    )
    engine: Literal["vllm", "transformers", "openai"] | None = field(
        default=None,
        metadata={
            "help": "Engine that runs the policy (default: openai if --policy_urls is set, otherwise vllm if it is "
            "installed, otherwise transformers)."
        },
    )
    policy_revision: str | None = field(
        default=None, metadata={"help": "Revision of the policy on the Hub.", "advanced": True}
    )
    policy_dtype: Dtype | None = field(
        default=None,
        metadata={"help": "Dtype of the weights, for vllm and transformers (default: the dtype of the checkpoint)."},
    )
    policy_urls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base URLs of OpenAI-compatible completions servers, such as http://host:8000/v1.",
            "metavar": "URL",
        },
    )
    policy_api: Literal["vllm", "transformers", "text"] | None = field(
        default=None,
        metadata={
            "help": "Kind of server: vllm (exchanges token ids), transformers (`transformers serve`), or text (any "
            "other completions server) (default: vllm).",
            "advanced": True,
        },
    )
    policy_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of the tokenizer, for servers (default: the policy).",
            "advanced": True,
        },
    )
    engine_args: dict[str, Any] | str | None = field(default=None, metadata=ENGINE_ARGS)
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature. 0 means greedy decoding.", "range": "[0, inf)"}
    )
    top_p: float = field(default=1.0, metadata=TOP_P)
    top_k: int = field(default=0, metadata=TOP_K)

    MODEL_FIELDS: ClassVar[dict[str, str]] = {
        "model": "policy",
        "revision": "policy_revision",
        "dtype": "policy_dtype",
        "urls": "policy_urls",
        "api": "policy_api",
        "tokenizer": "policy_tokenizer",
    }


@dataclass(kw_only=True)
class PromptConfig(SegmentationConfig):
    r"""
    Configuration of the prompt, of the rule that splits solutions into steps, and of the answer extractors. It also has the fields of
    [`SegmentationConfig`]. The default of `segmentation` is the rule of the prompt, or `"blank_line"` for a file.

    Args:
        prompt (`str`, *optional*, defaults to `"boxed"`):
            Prompt: `"boxed"` (`# Step k` headers, answer in `\boxed{}`), `"steps"` (headers and answer as in the HRM paper),
            `"formulas"` (steps end with formulas), `"question"` (only the question), or the path of a text file that contains
            `{question}`.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` applies the policy's chat template, `"plain"` uses the text as is.
        system_prompt (`str`, *optional*):
            System message, for the chat style. If the chat template has no system messages, it is put at the start of the user
            message.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's date. A fixed date keeps prompts the same from day to day.
        final_stops (`list[str]`, *optional*):
            Strings that end a solution. An empty string means none. Defaults to the strings of the prompt, or none for a file.
        extractors (`list[str]`, *optional*):
            Answer extractors, in order. The first one that finds an answer is used. Defaults to
            `["marker", "tag", "boxed", "hash", "answer_is"]`. See [`extract_answer`].

    Raises:
        `ValueError`: If `final_stops` contains an empty string. See also [`SegmentationConfig`].
    """

    prompt: str = field(
        default="boxed",
        metadata={
            "help": r"Prompt: boxed (`# Step k` headers, answer in \boxed{}), steps (headers and answer as in the HRM paper), "
            "formulas (steps end with formulas), question (only the question), or the path of a text file that contains "
            "{question}."
        },
    )
    prompt_style: Literal["chat", "plain"] = field(
        default="chat", metadata={"help": "chat applies the policy's chat template, plain uses the text as is."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message, for the chat style.", "may_be_empty": True}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": """Variables for the chat template as JSON, such as '{"enable_thinking": false}'.""",
            "metavar": "JSON",
        },
    )
    chat_template_date: str = field(
        default=CHAT_TEMPLATE_DATE,
        metadata={
            "help": "Date for chat templates that print today's date. A fixed date keeps prompts the same from day to day.",
            "metavar": "YYYY-MM-DD",
            "advanced": True,
        },
    )
    final_stops: list[str] | None = field(
        default=None,
        metadata={
            "help": "Strings that end a solution. '' means none (default: the strings of the prompt, or none for a file).",
            "may_be_empty": True,
        },
    )
    extractors: list[str] | None = field(
        default=None,
        metadata={
            "help": "Answer extractors, in order. The first one that finds an answer is used (default: "
            f"{' '.join(DEFAULT_EXTRACTORS)}).",
            "choices": list(EXTRACTORS),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.final_stops == [""]:
            self.final_stops = []
        if "" in (self.final_stops or []):
            raise ValueError(
                "`final_stops` contains an empty string. Remove it, or pass only an empty string for none."
            )
        if self.chat_template_kwargs == {}:
            self.chat_template_kwargs = None

    def make_prompt(self) -> tuple[Prompt, StepRule]:
        """
        Return the prompt, and the rule that splits solutions into steps.

        Raises:
            `ValueError`: If the prompt is unknown, or one of its options is invalid.
        """
        if self.prompt in PROMPTS:
            prompt = PROMPTS[self.prompt]
        elif Path(self.prompt).is_file():
            prompt = Prompt(self.prompt, read_text(self.prompt), rule="blank_line")
        else:
            raise ValueError(
                f"`prompt` is {shown(self.prompt)}. It must be one of {', '.join(PROMPTS)}, or the path of a text file that contains "
                "{question}."
            )
        rule = self.step_rule(prompt.rule)
        prompt = replace(
            prompt,
            rule=rule.name,
            style=self.prompt_style,
            system_prompt=self.system_prompt,
            final_stops=prompt.final_stops if self.final_stops is None else tuple(self.final_stops),
            chat_template_kwargs=self.chat_template_kwargs,
            chat_template_date=self.chat_template_date,
        )
        return prompt, rule


@dataclass(kw_only=True)
class TrackingConfig(Config):
    """
    Trackers that get the search trees of a run when it is finished. See [`~search.tree_table.log_trees`].

    Args:
        report_to (`list[str]`, *optional*):
            Trackers to log to: `"trackio"` and `"wandb"`. By default, nothing is logged.
        project (`str`, *optional*, defaults to `"trl_hrm"`):
            Name of the project, for `report_to`.
        run_name (`str`, *optional*):
            Name of the run, for `report_to`. By default, the tracker chooses it.

    Raises:
        `ValueError`: If `run_name` or `project` is set without `report_to`.
    """

    report_to: list[str] | None = field(
        default=None,
        metadata={
            "help": "Trackers that get a table of the problems and pages of trees at the end: trackio and wandb (default: none).",
            "choices": list(TRACKERS),
            "advanced": True,
        },
    )
    project: str = field(
        default="trl_hrm", metadata={"help": "Name of the project, for --report_to.", "advanced": True}
    )
    run_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of the run, for --report_to (default: the tracker chooses it).",
            "advanced": True,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.report_to:
            for name, default in (("project", "trl_hrm"), ("run_name", None)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}` has no effect without `report_to`. Set `report_to`, or remove `{name}`."
                    )


@dataclass(kw_only=True)
class RunConfig(Config):
    """
    Configuration of a run. The concurrency options do not change the results.

    Args:
        output_dir (`str`):
            Output folder of the run.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of all samples.
        max_in_flight (`int`, *optional*, defaults to `256`):
            Maximum number of sequences that the engine generates in parallel.
        max_open_problems (`int`, *optional*, defaults to `256`):
            Maximum number of problems in memory.
        grader_workers (`int`, *optional*, defaults to `1`):
            Number of worker processes that grade answers.
        grader_timeout (`float`, *optional*, defaults to `10.0`):
            Timeout for grading an answer, in seconds.
        accept_changes (`list[str]`, *optional*):
            Names of changes to accept when a run is resumed, such as `policy.weights`, as listed in the error message. The run then mixes
            both, which is recorded in its manifest. Only for sampling.

    Raises:
        `ValueError`: If a number is below 1.
    """

    output_dir: str = field(metadata={"help": "Output folder of the run."})
    seed: int = field(default=42, metadata={"help": "Random seed of all samples.", "range": SEED})
    max_in_flight: int = field(
        default=256,
        metadata={"help": "Maximum number of sequences that the engine generates in parallel.", "range": COUNT},
    )
    max_open_problems: int = field(
        default=256, metadata={"help": "Maximum number of problems in memory.", "advanced": True, "range": COUNT}
    )
    grader_workers: int = field(
        default=1,
        metadata={"help": "Number of worker processes that grade answers.", "advanced": True, "range": PROCESSES},
    )
    grader_timeout: float = field(
        default=10.0,
        metadata={"help": "Timeout for grading an answer, in seconds.", "advanced": True, "range": "(0, 86400]"},
    )
    accept_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of changes to accept when a run is resumed, such as policy.weights, as listed in the error message. "
            "The run then mixes both, which is recorded in its manifest. Only for sampling.",
            "metavar": "NAME",
            "advanced": True,
        },
    )
