"""Select solutions of a problem, and build rows for supervised fine-tuning of the policy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from ..search.prompts import Prompt, started_prompt
from ..step_tree import StepTree


ROUNDING = 1e-9  # tolerance, since the mean of 2/5, 5/5 and 5/5 is 0.7999999999999999 and must reach 0.8
MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))


class Choice(NamedTuple):
    """
    Result of [`choose`].

    Args:
        kept (`list[int]`):
            Indices of the selected solutions, best first.
        num_below (`int`):
            Number of solutions below the minimum score.
        num_beyond (`int`):
            Number of solutions that reach the minimum score, but are not among the best.
    """

    kept: list[int]
    num_below: int
    num_beyond: int


def distinct(texts: Sequence[str]) -> list[int]:
    """
    Return the indices of the first occurrence of each text, ignoring leading and trailing whitespace.

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
    Select the best solutions of a problem.

    Args:
        scores (`Sequence[float]`):
            N scores.
        min_score (`float`, *optional*, defaults to `0.0`):
            Minimum score, with a tolerance for rounding errors.
        top_k (`int`, *optional*):
            Maximum number of solutions. Defaults to all that reach `min_score`.
        evidence (`Sequence[int]`, *optional*):
            N sample counts of the scores. Of equal scores, the one with the larger count comes first, then the earlier one.

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
    """Return the prompt of the policy for a problem, as text or messages. They tokenize to the ids of [`Prompt.encode`]."""
    return prompt.text(problem) if prompt.style == "plain" else prompt.messages(problem)


def answered(prompt: str | list[dict[str, str]], text: str) -> str | list[dict[str, str]]:
    """Return a solution in the format of its prompt: text for a text prompt, an assistant message for messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def prompt_of(manifest: dict[str, Any]) -> Prompt:
    """Return the prompt of a run."""
    return Prompt(**started_prompt(manifest))


def sft_row(solution: StepTree, prompt: Prompt | None = None) -> dict[str, Any]:
    """
    Return the row of a solution for supervised fine-tuning, in TRL's
    [prompt-completion](https://huggingface.co/docs/trl/dataset_formats#prompt-completion) format.

    Args:
        solution ([`StepTree`]):
            Tree with a single step. The text of the step is the whole solution, and its label is the score.
        prompt ([`~search.prompts.Prompt`], *optional*):
            Prompt that the policy was given. Defaults to the bare problem. If it has chat template variables, they are added to the
            row as `chat_template_kwargs`, which TRL's trainers pass to the chat template.
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
