"""The settings of the commands that ask a policy: what runs it, what it is asked, and how much is done at a time."""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..config import Config
from ..encoding import CHAT_TEMPLATE_DATE
from ..grading import DEFAULT_EXTRACTORS, EXTRACTORS
from .prompts import PROMPTS, Prompt
from .run_folder import Shard, show_own_gpu
from .steps import RULES, StepRule, regex_rule


@dataclass(kw_only=True)
class PolicyConfig(Config):
    """
    The policy and what runs it.

    Args:
        policy (`str`):
            Folder or Hub id of the policy; for `engine="openai"`, its name at the servers. Required, but for commands that have
            other inputs.
        engine (`str`, *optional*):
            What runs the policy: `"vllm"`, `"transformers"`, or `"openai"` for servers. By default the servers if `policy_urls` are
            given, else vLLM if it is installed, else transformers.
        policy_revision (`str`, *optional*):
            Revision of the policy on the Hub.
        policy_dtype (`str`, *optional*):
            Type of the weights, for vllm and transformers. By default that of the checkpoint.
        policy_urls (`list[str]`, *optional*):
            Addresses of OpenAI-compatible completions servers, such as `http://host:8000/v1`.
        policy_api (`str`, *optional*):
            What the servers are: `"vllm"` takes and gives token ids, `"transformers"` is `transformers serve`, `"text"` any other
            completions server. By default `"vllm"`.
        policy_tokenizer (`str`, *optional*):
            Folder or Hub id of the tokenizer, for servers. By default the policy.
        engine_args (`dict[str, Any]`, *optional*):
            More arguments of the engine: for vllm those of its engine, such as `{"gpu_memory_utilization": 0.8}`; for transformers
            `batch_size` and `attn_implementation`; for openai `timeout`, `max_retries` and `backoff`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the samples. 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability to sample from. 1 is off.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens to sample from. 0 is off.

    Raises:
        `ValueError`: If an option does not go with the engine.
    """

    policy: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the policy; for openai, its name at the servers."}
    )
    engine: Literal["vllm", "transformers", "openai"] | None = field(
        default=None,
        metadata={
            "help": "What runs the policy (default: openai if there are --policy_urls, else vllm if it is installed, "
            "else transformers)."
        },
    )
    policy_revision: str | None = field(
        default=None, metadata={"help": "Revision of the policy on the Hub.", "advanced": True}
    )
    policy_dtype: str | None = field(
        default=None,
        metadata={"help": "Type of the weights, for vllm and transformers (default: that of the checkpoint)."},
    )
    policy_urls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Addresses of OpenAI-compatible completions servers, such as http://host:8000/v1.",
            "metavar": "URL",
        },
    )
    policy_api: Literal["vllm", "transformers", "text"] | None = field(
        default=None,
        metadata={
            "help": "What the servers are: vllm takes and gives token ids, transformers is `transformers serve`, text "
            "any other completions server (default: vllm).",
            "advanced": True,
        },
    )
    policy_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the tokenizer, for servers (default: the policy).",
            "advanced": True,
        },
    )
    engine_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More arguments of the engine as JSON: for vllm those of its engine, as in "
            """'{"gpu_memory_utilization": 0.8}'; for transformers batch_size and attn_implementation; for openai """
            "timeout, max_retries and backoff.",
            "metavar": "JSON",
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples. 0 is greedy."})
    top_p: float = field(
        default=1.0, metadata={"help": "Share of the probability to sample from. 1 is off.", "advanced": True}
    )
    top_k: int = field(default=0, metadata={"help": "Number of tokens to sample from. 0 is off.", "advanced": True})

    def __post_init__(self):
        super().__post_init__()
        if self.engine is None and self.policy is not None:
            local = "vllm" if find_spec("vllm") else "transformers"
            self.engine = local if self.policy_urls is None else "openai"
        for name in ("policy_urls", "policy_api", "policy_tokenizer"):
            if getattr(self, name) is not None and self.engine != "openai":
                raise ValueError(f"{name} goes with engine openai, and engine is {self.engine}. Leave it out.")
        if self.engine == "openai":
            if self.policy_urls is None:
                raise ValueError(
                    "engine openai needs the addresses of its servers: policy_urls, such as http://host:8000/v1."
                )
            if self.policy_dtype is not None:
                raise ValueError(
                    "policy_dtype goes with engine vllm or transformers, and engine is openai. Leave it out."
                )

    def load_tokenizer(self) -> Any:
        """The tokenizer of the policy."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.policy_tokenizer or self.policy, revision=self.policy_revision)

    def load_engine(self, shard: Shard | None = None) -> Any:
        """
        Start what runs the policy, on this process's own GPU where several processes were launched.

        Raises:
            `ValueError`: If `engine_args` has a name that the engine does not.
        """
        given = {
            "revision": self.policy_revision,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        if self.engine == "openai":
            from .engines.openai import OpenAIEngine

            given |= self._engine_args("timeout", "max_retries", "backoff")
            if self.policy_api is not None:
                given["api"] = self.policy_api
            return OpenAIEngine(self.policy_urls, self.policy, self.load_tokenizer(), **given)
        if self.policy_dtype is not None:
            given["dtype"] = self.policy_dtype
        if self.engine == "vllm":
            from .engines.vllm import VLLMEngine

            if shard is not None and shard.local is not None:
                show_own_gpu(shard.local)
            return VLLMEngine.from_pretrained(self.policy, **(self.engine_args or {}), **given)
        import torch

        from .engines.transformers import TransformersEngine

        given |= self._engine_args("batch_size", "attn_implementation")
        device = None
        if shard is not None and shard.local is not None and torch.accelerator.is_available():
            device = torch.device(torch.accelerator.current_accelerator().type, shard.local)
        return TransformersEngine.from_pretrained(self.policy, device=device, **given)

    def _engine_args(self, *names: str) -> dict[str, Any]:
        """The arguments of an engine that takes these alone."""
        unknown = [name for name in self.engine_args or () if name not in names]
        if unknown:
            raise ValueError(
                f"engine_args has {', '.join(unknown)}, but engine {self.engine} takes {', '.join(names)} there."
            )
        return self.engine_args or {}


@dataclass(kw_only=True)
class PromptConfig(Config):
    r"""
    What the policy is asked, where the steps of its solutions end, and how their answers are read.

    Args:
        prompt (`str`, *optional*, defaults to `"steps"`):
            `"steps"` (`# Step k` headers), `"formulas"` (steps end with formulas), `"question"` (the question alone), or a file
            with `{question}` in it.
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` for the policy's chat template, `"plain"` for the text alone.
        system_prompt (`str`, *optional*):
            System message, for the chat style.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's, so that prompts do not change from day to day.
        final_stops (`list[str]`, *optional*):
            Strings that end a solution; an empty one for none. By default the prompt's, and none for a file.
        segmentation (`str`, *optional*):
            Name of the [`StepRule`] that says where steps end, or `"regex"`. By default the prompt's, and `"blank_line"` for a file.
        step_pattern (`str`, *optional*):
            Regular expression whose matches end steps, for `segmentation="regex"`.
        extractors (`list[str]`, *optional*):
            How the answer is read from a solution: the first that finds one counts.

    Raises:
        `ValueError`: If there is no such prompt or rule, or one of `segmentation="regex"` and `step_pattern` is missing.
    """

    prompt: str = field(
        default="steps",
        metadata={
            "help": "steps (`# Step k` headers), formulas (steps end with formulas), question (the question alone), or a "
            "file with {question} in it."
        },
    )
    prompt_style: Literal["chat", "plain"] = field(
        default="chat", metadata={"help": "The policy's chat template, or the text alone."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message, for the chat style."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": """Variables for the chat template as JSON, as in '{"enable_thinking": false}'.""",
            "metavar": "JSON",
        },
    )
    chat_template_date: str = field(
        default=CHAT_TEMPLATE_DATE,
        metadata={
            "help": "Date for chat templates that print today's, so that prompts do not change from day to day.",
            "metavar": "YYYY-MM-DD",
            "advanced": True,
        },
    )
    final_stops: list[str] | None = field(
        default=None,
        metadata={"help": "Strings that end a solution; '' for none (default: the prompt's, and none for a file)."},
    )
    segmentation: Literal["step_header", "blank_line", "sentence", "formula", "regex"] | None = field(
        default=None,
        metadata={"help": "Where steps end (default: the prompt's, and blank_line for a file)."},
    )
    step_pattern: str | None = field(
        default=None,
        metadata={"help": "Regular expression whose matches end steps, for --segmentation regex.", "advanced": True},
    )
    extractors: list[str] | None = field(
        default=None,
        metadata={
            "help": "How the answer is read from a solution; the first that finds one counts (default: "
            f"{' '.join(DEFAULT_EXTRACTORS)}).",
            "choices": list(EXTRACTORS),
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.final_stops == [""]:
            self.final_stops = []
        if self.chat_template_kwargs == {}:
            self.chat_template_kwargs = None
        if (self.segmentation == "regex") != (self.step_pattern is not None):
            raise ValueError("segmentation regex and step_pattern go together, and one of them is missing.")

    def make_prompt(self) -> tuple[Prompt, StepRule]:
        """
        The prompt, and the rule that tells steps apart.

        Raises:
            `ValueError`: If there is no such prompt, or one of its options is invalid.
        """
        if self.prompt in PROMPTS:
            prompt = PROMPTS[self.prompt]
        elif Path(self.prompt).is_file():
            prompt = Prompt(self.prompt, Path(self.prompt).read_text(encoding="utf-8"), rule="blank_line")
        else:
            raise ValueError(
                f"prompt is {self.prompt!r}, expected {', '.join(PROMPTS)}, or a file with {{question}} in it."
            )
        rule = regex_rule(self.step_pattern) if self.step_pattern else RULES[self.segmentation or prompt.rule]
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
class RunConfig(Config):
    """
    Where a run of a policy goes, and how much of it is done at a time. The latter does not change the results.

    Args:
        output_dir (`str`):
            Folder of the run.
        seed (`int`, *optional*, defaults to `42`):
            Seed of all samples.
        max_in_flight (`int`, *optional*, defaults to `256`):
            Largest number of sequences that the engine works on at a time.
        max_open_problems (`int`, *optional*, defaults to `256`):
            Largest number of problems in memory.
        grader_workers (`int`, *optional*, defaults to `1`):
            Number of processes that compare answers.
        grader_timeout (`float`, *optional*, defaults to `10.0`):
            Seconds after which a comparison is given up.

    Raises:
        `ValueError`: If a number is below 1.
    """

    output_dir: str = field(metadata={"help": "Folder of the run."})
    seed: int = field(default=42, metadata={"help": "Seed of all samples."})
    max_in_flight: int = field(
        default=256, metadata={"help": "Largest number of sequences that the engine works on at a time."}
    )
    max_open_problems: int = field(
        default=256, metadata={"help": "Largest number of problems in memory.", "advanced": True}
    )
    grader_workers: int = field(
        default=1, metadata={"help": "Number of processes that compare answers.", "advanced": True}
    )
    grader_timeout: float = field(
        default=10.0, metadata={"help": "Seconds after which a comparison is given up.", "advanced": True}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_in_flight", "max_open_problems", "grader_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more.")
