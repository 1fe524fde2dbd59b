"""The problem that the messages of a prompt ask. A step reward model is shown one problem and one solution."""

from collections.abc import Mapping, Sequence
from typing import Any


INSTRUCTIONS = ("system", "developer")  # to the policy: the reward model is not shown them


def problem_of(messages: Sequence[Mapping[str, Any]], remedy: str) -> str:
    """
    Return the text of the only message of the user. Messages of the system are left out.

    Args:
        messages (`Sequence[Mapping[str, Any]]`):
            A prompt in TRL's conversational format.
        remedy (`str`):
            Where to give the problem instead, for the error message.

    Raises:
        `ValueError`: If the messages are a dialogue of several turns, or hold something else than text.
    """
    roles = [message["role"] for message in messages]
    if [role for role in roles if role not in INSTRUCTIONS] != ["user"]:
        raise ValueError(
            f"the prompt has messages of {roles}, expected one of the user, which the reward model is shown as the problem. One turn of "
            f"a dialogue may not say what is asked. {remedy}"
        )
    return content_text(next(message["content"] for message in messages if message["role"] == "user"))


def content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the text of a message, also of one in content blocks; nothing if the message has none."""
    if content is None or isinstance(content, str):
        return content or ""
    kinds = sorted({block["type"] for block in content} - {"text"})
    if kinds:
        raise ValueError(f"a message has content of type {kinds}, but a step reward model reads only text.")
    return "".join(block["text"] for block in content)
