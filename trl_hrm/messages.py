"""
Texts of prompts and steps in TRL's conversational format, in which a text is a list of messages.

```json
{"prompt": [{"role": "user", "content": "What is 1 + 2 + 3?"}],
 "completions": [[{"role": "assistant", "content": "1 + 2 = 3."}], [{"role": "assistant", "content": "3 + 3 = 7."}]]}
```

A reward model is shown a problem and steps. The [`StepFormat`] decides how they become tokens, with or without the chat template. So
a conversational row is the row with the texts of its messages: the prompt is its only user message, and a step is an assistant
message. System messages are instructions to the policy and are not shown to the reward model, whose own is `system_prompt`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .io import shown


INSTRUCTIONS = ("system", "developer")  # roles of messages that are not shown to the reward model
ONE_USER_MESSAGE = "Put the whole problem in one user message, or pass it as a string."


def problem_of(messages: Sequence[Mapping[str, Any]], remedy: str = ONE_USER_MESSAGE) -> str:
    """
    Return the text of the only user message. System messages are ignored.

    Args:
        messages (`Sequence[Mapping[str, Any]]`):
            Prompt in TRL's conversational format.
        remedy (`str`, *optional*):
            Advice at the end of the error message on how else to provide the problem.

    Raises:
        `ValueError`: If the messages are a dialogue of several turns, or contain anything other than text.
    """
    roles = [message["role"] for message in messages]
    if [role for role in roles if role not in INSTRUCTIONS] != ["user"]:
        raise ValueError(
            f"the prompt has messages with the roles {roles}, expected exactly one user message, which the reward model is shown as the "
            f"problem. In a dialogue, a single turn may not contain the whole problem. {remedy}"
        )
    return content_text(next(message["content"] for message in messages if message["role"] == "user"))


def content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the text of a message's content, which may be a string or content blocks, or an empty string if it has none."""
    if content is None or isinstance(content, str):
        return content or ""
    kinds = sorted({block["type"] for block in content} - {"text"})
    if kinds:
        raise ValueError(f"a message has content of type {kinds}, but step reward models only support text.")
    return "".join(block["text"] for block in content)


def prompt_text(prompt: Any) -> Any:
    """
    Return a prompt as text. Anything other than messages is returned unchanged.

    Raises:
        `ValueError`: See [`problem_of`].
    """
    return problem_of(prompt) if _are_messages(prompt) else prompt


def step_text(step: Any) -> Any:
    """
    Return a step as text. It may be an assistant message, or a list with one. Anything else is returned unchanged.

    Raises:
        `ValueError`: If there are several messages, or a message has another role or anything other than text.
    """
    messages = [step] if isinstance(step, Mapping) else step
    if not _are_messages(messages):
        return step
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise ValueError(f"a step has messages with the roles {roles}, expected exactly one assistant message.")
    return content_text(messages[0]["content"])


def plain_row(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """
    Return a row with its `prompt`, its `original_prompt` and its `completions` as texts. Other values than lists of objects are kept
    unchanged, also if they are invalid.

    Args:
        row (`Mapping[str, Any]`):
            Row in TRL's stepwise supervision format.
        where (`str`):
            Location of the row, for error messages.

    Raises:
        `ValueError`: If objects are not messages, or the messages are not one problem and its steps. See [`problem_of`] and
            [`step_text`].
    """
    steps = row.get("completions")
    try:
        for name in ("prompt", "original_prompt"):
            if _are_messages(row.get(name)):
                row = {**row, name: prompt_text(row[name])}
        if isinstance(steps, list | tuple) and any(isinstance(step, Mapping | list | tuple) for step in steps):
            row = {**row, "completions": [step_text(step) for step in steps]}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


def system_texts(prompt: Any) -> list[str]:
    """Return the texts of the system messages of a prompt."""
    if not _are_messages(prompt):
        return []
    return [content_text(message["content"]) for message in prompt if message["role"] in INSTRUCTIONS]


def _are_messages(value: Any) -> bool:
    """Return whether a value is a list of messages. A list of objects that are not messages is an error."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, Mapping) for one in value):
        return False
    for message in value:
        if not (isinstance(message.get("role"), str) and "content" in message and is_content(message["content"])):
            raise ValueError(
                f"found the message {shown(message)}, expected `role` and `content`, which is a text or a list of content blocks."
            )
    return True


def is_content(content: Any) -> bool:
    """Return whether a value is the content of a message: a text, content blocks or `None`."""
    if content is None or isinstance(content, str):
        return True
    blocks: Iterable = content if isinstance(content, list | tuple) else [None]
    return all(
        isinstance(block, Mapping)
        and isinstance(block.get("type"), str)
        and (block["type"] != "text" or isinstance(block.get("text"), str))
        for block in blocks
    )
