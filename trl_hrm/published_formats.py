"""Step formats of published step reward models. See docs/model_zoo.md for their sources."""

from typing import Any


# The repositories of each format on the Hub, and the arguments of `StepFormat`.
PUBLISHED_FORMATS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "qwen2.5-math-prm": (
        ("Qwen/Qwen2.5-Math-PRM-7B", "Qwen/Qwen2.5-Math-PRM-72B", "Qwen/Qwen2.5-Math-7B-PRM800K"),
        {
            "tokenization": "string",
            "prompt_style": "chat",
            "system_prompt": r"Please reason step by step, and put your final answer within \boxed{}.",
            "step_separator": "<extra_0>",
            "merge_separator": "\n\n",
            "head": "mlp",
        },
    ),
    "reasonflux-prm": (
        ("Gen-Verse/ReasonFlux-PRM-7B",),
        {
            "tokenization": "string",
            "prompt_style": "chat",
            "step_separator": "<extra_0>",
            "merge_separator": "\n\n",
            "head": "mlp",
        },
    ),
    "math-shepherd": (
        ("peiyi9979/math-shepherd-mistral-7b-prm",),
        {
            "tokenization": "string",
            "prompt_template": "{problem} ",
            "step_prefix": "Step {number}: ",
            "step_separator": " ки",
            "step_suffix": "\n",
            "head": "lm",
        },
    ),
    "er-prm": (
        ("HanningZhang/Llama3.1-Math-PRM", "HanningZhang/deepseek-prm"),
        {
            "tokenization": "string",
            "prompt_template": "{problem} ",
            "step_prefix": "Step {number}: ",
            "step_separator": " ки",
            "head": "lm",
            "label_tokens": (" +", " -"),
        },
    ),
    "rlhflow-prm": (
        ("RLHFlow/Llama3.1-8B-PRM-Mistral-Data", "RLHFlow/Llama3.1-8B-PRM-Deepseek-Data"),
        {
            "tokenization": "string",
            "prompt_style": "turns",
            "prompt_template": "{problem} ",
            "step_separator": "+",
            "score_position": "before_separator",
            "head": "lm",
        },
    ),
    "skywork-o1-prm": (
        ("Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B"),
        {
            "prompt_template": "{problem}\n",
            "step_separator": "\n",
            "merge_separator": " ",
            "head": "value",
            "regression_loss": "bce",
        },
    ),
    "pure-prm": (
        (
            "jinachris/PURE-PRM-7B",
            "HuggingFaceH4/Qwen2.5-Math-1.5B-Instruct-PRM-0.2",
            "HuggingFaceH4/Qwen2.5-Math-7B-Instruct-PRM-0.2",
        ),
        {},
    ),
    "trl-prm": ((), {"step_separator": "\n", "merge_separator": " "}),
    "math-psa": (
        ("openreasoner/Math-psa",),
        {
            "tokenization": "string",
            "prompt_template": "{problem} ",
            "step_separator": " \n\n\n\n\n",
            "step_suffix": " ",
            "head": "lm",
            "label_tokens": (" +", " -"),
        },
    ),
    "llemma-prm": (
        ("ScalableMath/llemma-7b-prm-prm800k-level-1to3-hf",),
        {
            "tokenization": "string",
            "prompt_template": "# Question\n\n{problem}\n\n# Solution\n\n",
            "step_separator": "\n",
            "step_suffix": "\n",
            "merge_separator": " ",
            "head": "lm_mean",
            "regression_loss": "bce",
        },
    ),
}
