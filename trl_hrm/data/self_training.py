"""What a policy learns from: the choice among solutions of a problem, and the rows for supervised fine-tuning."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from ..search.prompts import Prompt, started_prompt
from ..step_tree import StepTree


ROUNDING = 1e-9  # a mean of 2/5, 5/5 and 5/5 is 0.7999999999999999, and reaches 0.8
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))


class Choice(NamedTuple):
    """
    Solutions of a problem that were chosen, and how many were not.

    Args:
        kept (`list[int]`):
            Their indices, the best first.
        num_below (`int`):
            Number of solutions below the minimum score.
        num_beyond (`int`):
            Number of solutions that reach it, but are not among the best.
    """

    kept: list[int]
    num_below: int
    num_beyond: int


def distinct(texts: Sequence[str]) -> list[int]:
    """
    Indices of the texts that no earlier one equals, up to space around them.

    Example:

    ```python
    >>> distinct(["a", "b", "a\\n"])
    [0, 1]
    ```
    """
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text.strip(), index)
    return list(first.values())


def choose(
    scores: Sequence[float], min_score: float = 0.0, top_k: int | None = None, evidence: Sequence[int] | None = None
) -> Choice:
    """
    The best solutions of a problem.

    Args:
        scores (`Sequence[float]`):
            N scores.
        min_score (`float`, *optional*, defaults to `0.0`):
            Minimum score, up to rounding.
        top_k (`int`, *optional*):
            Maximum number of solutions. Defaults to all that reach `min_score`.
        evidence (`Sequence[int]`, *optional*):
            N counts of what each score rests on: of equal scores the one on more comes first, then the earlier one.

    Example:

    ```python
    >>> choose([0.2, 0.9, 0.9, 0.8], min_score=0.5, top_k=2, evidence=[4, 4, 8, 4])
    Choice(kept=[2, 1], num_below=1, num_beyond=1)
    ```
    """
    reach = [index for index, score in enumerate(scores) if score >= min_score - ROUNDING]
    reach.sort(key=lambda index: (-scores[index], -evidence[index] if evidence else 0))
    kept = reach[:top_k]
    return Choice(kept, len(scores) - len(reach), len(reach) - len(kept))


def asked(prompt: Prompt, problem: str) -> str | list[dict[str, str]]:
    """What the policy was asked for a problem: text, or messages. Their token ids are those of [`Prompt.encode`]."""
    return prompt.text(problem) if prompt.style == "plain" else prompt.messages(problem)


def answered(prompt: str | list[dict[str, str]], text: str) -> str | list[dict[str, str]]:
    """A solution in the form of its prompt: text after a text, the assistant's message after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def prompt_of(manifest: dict[str, Any]) -> Prompt:
    """The prompt that a run was started with."""
    return Prompt(**started_prompt(manifest))


def sft_row(solution: StepTree, prompt: Prompt | None = None) -> dict[str, Any]:
    """
    The row of a solution for supervised fine-tuning, in TRL's
    [prompt-completion](https://huggingface.co/docs/trl/dataset_formats#prompt-completion) format.

    Args:
        solution ([`StepTree`]):
            The problem, the whole text as its one step, and the score as that step's label.
        prompt ([`~search.prompts.Prompt`], *optional*):
            What the policy was asked. By default the bare problem. If it has variables for the chat template, the row has
            them as `chat_template_kwargs`, with which TRL's trainers render the messages.
    """
    question = solution.prompt if prompt is None else asked(prompt, solution.prompt)
    return {
        "prompt": question,
        "completion": answered(question, solution.completions[0]),
        "mc_score": solution.labels[0],
        "problem": solution.prompt,
        **({"chat_template_kwargs": prompt.chat_template_kwargs} if prompt and prompt.chat_template_kwargs else {}),
        **solution.extra,
    }
