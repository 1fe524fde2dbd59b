"""Show completions with their steps coloured by reward: in TRL's table of completions, and as a page."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..io import replacing
from ..pages.numbers import tint
from ..pages.page import render
from ..rewards import ScoredCompletion
from ..terminal import one_line
from ..tracking import TrackedPage, log_to_trackers


# Blue, white and orange are distinguishable for colour-blind readers, on light and on dark pages
SQUARES = ((2 / 3, "🟦"), (1 / 3, "⬜"), (-math.inf, "🟧"))
REJECTED = "⬛"
MAX_CHARACTERS = 200  # of a step in the table


def coloured_steps(scored: ScoredCompletion, advantages: Sequence[float] | None = None) -> str:
    """
    Return the steps of a completion for a cell of a table: one line per step, with a coloured square, the step reward and the
    advantage. The first line has the squares of all steps, because trackio shows only the beginning of long cells.

    A square is blue for rewards from 2/3, orange for rewards below 1/3, and otherwise white. Long steps are shortened, since the
    table also has the whole completion.

    Args:
        scored ([`~rewards.ScoredCompletion`]):
            Completion with S step rewards, or with one reward and the guards that rejected it, or without a reward.
        advantages (`Sequence[float]`, *optional*):
            Advantages of the step rewards: S values, or one if a guard rejected the completion.

    Example:

    ```python
    >>> scored = ScoredCompletion(["1 + 1 = 2.\n\n2 + 2 = 5."], [[(0, 10), (12, 22)]], [0.9, 0.1], 0.1, [])
    >>> print(coloured_steps(scored, [0.4, -0.4]))
    🟦🟧
    🟦 0.90 (+0.40) 1 + 1 = 2.
    🟧 0.10 (-0.40) 2 + 2 = 5.
    ```
    """
    if scored.step_rewards is None:
        return "no process reward"
    values = _values(scored.step_rewards, advantages)
    if scored.scores is None:
        return f"{REJECTED} {values[0]} rejected: {', '.join(scored.guards)}"
    squares = [next(square for least, square in SQUARES if score >= least) for score in scored.scores]
    lines = [
        f"{square} {value} {one_line(step, MAX_CHARACTERS)}"
        for square, value, step in zip(squares, values, scored.steps, strict=True)
    ]
    return "\n".join(["".join(squares), *lines] if len(lines) > 1 else lines)


def steps_page(step: int, logs: dict[str, Any]) -> str:
    """
    Return an HTML page with completions whose steps are coloured by their reward. Text that is not part of a step, such as thinking, is
    shown without colour.

    Args:
        step (`int`):
            Training step.
        logs (`dict`):
            Columns of B completions: `prompt`, `rewards` (a column for each reward function), `advantages`, and `steps`, with a
            [`~rewards.ScoredCompletion`] and the advantages of its step rewards (or `None`) for each completion.
    """
    groups: list[dict[str, Any]] = []  # consecutive completions of the same prompt
    for i, (prompt, (scored, advantages)) in enumerate(zip(logs["prompt"], logs["steps"], strict=True)):
        prompt = conversation_text(prompt)
        if not groups or groups[-1]["prompt"] != prompt:
            groups.append({"prompt": prompt, "completions": []})
        facts = [f"{name} {_number(values[i])}" for name, values in logs["rewards"].items()]
        facts.append(f"advantage of the completion {logs['advantages'][i]:+.2f}")
        values = None if scored.step_rewards is None else _values(scored.step_rewards, advantages)
        if values is None:
            facts.append("no process reward")
        elif scored.scores is None:
            facts.append(f"step reward {values[0]}, rejected: {', '.join(scored.guards)}")
        groups[-1]["completions"].append({"facts": facts, "pieces": _pieces(scored, values)})
    return render("steps.html.jinja", title=f"Completions at step {step}", groups=groups)


def log_steps_page(trainer: Trainer) -> None:
    """
    Write the [`steps_page`] of the completions that the trainer has just logged to `completions/steps_XXXXX.html` in its
    `output_dir`, and log it to trackio and Weights & Biases if the trainer reports to them. Call it on the main process.
    """
    logs, step = trainer._logs, trainer.state.global_step
    if not logs["steps"]:  # nothing was generated yet
        return
    page = steps_page(step, logs)
    folder = Path(trainer.args.output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"steps_{step:05d}.html") as file:
        file.write(page)
    log_to_trackers(trainer.args.report_to, {"completion_steps": TrackedPage(page)})


def conversation_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    """Return a prompt as text. The messages of a conversation are separated by blank lines, and images are shown as `[image]`."""
    if isinstance(prompt, str):
        return prompt
    parts = []
    for message in prompt:
        content = message.get("content") or ""
        if not isinstance(content, str):  # blocks, which may be images
            content = "".join(block.get("text") or f"[{block['type']}]" for block in content)
        parts.append(f"{message['role']}: {content}")
    return "\n\n".join(parts)


def _values(rewards: Sequence[float], advantages: Sequence[float] | None) -> list[str]:
    """Return the text of each reward, with its advantage if it has one."""
    if advantages is None:
        return [f"{reward:.2f}" for reward in rewards]
    return [f"{reward:.2f} ({advantage:+.2f})" for reward, advantage in zip(rewards, advantages, strict=True)]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _pieces(scored: ScoredCompletion, values: Sequence[str] | None) -> list[dict[str, str]]:
    """Return all text of a completion, in pieces with `text`, and `value` and `tint` for a scored step."""
    pieces = []
    scores = iter(zip(scored.scores, values, strict=True) if scored.scores is not None else ())
    for i, (text, spans) in enumerate(zip(scored.texts, scored.spans, strict=True)):
        if any(scored.thinking[i : i + 1]):
            pieces.append({"text": scored.thinking[i]})
        end = 0
        for start, stop in spans if scored.scores is not None else ():
            pieces.append({"text": text[end:start]})
            score, value = next(scores)
            pieces.append({"text": text[start:stop], "value": value, "tint": tint(score)})
            end = stop
        pieces.append({"text": text[end:]})
    return [piece | {"text": piece["text"].strip()} for piece in pieces if piece["text"].strip()]
