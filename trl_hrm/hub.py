"""Pushes to the Hugging Face Hub: one error for all the ways in which they fail, and pauses where a fault may pass."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers


logger = logging.getLogger(__name__)
Result = TypeVar("Result")

HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library of huggingface_hub, which is httpx or httpx2
# A failed push raises, for the API, a HfHubHTTPError; for a socket that is cut, another HTTPError; for LFS, a RuntimeError; for
# Xet, a ConnectionError; for a gateway that answers in HTML, a JSONDecodeError.
FAULTS = (HTTPError, RuntimeError, ConnectionError, LocalTokenNotFoundError, json.JSONDecodeError)
PASSING = (408, 409, 412, 425, 429)  # and all from 500
MAX_PAUSE = 600  # seconds; a Hub that asks for more is told to the user
SHOWN = 600  # characters of an error


class PushError(OSError):
    """
    A push to the Hub that failed.

    Args:
        message (`str`):
            What failed, why, and what to do.
        status (`int`, *optional*):
            The HTTP status, if the Hub answered.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@contextmanager
def pushing(repo_id: str, repo_type: str = "model", token: str | None = None) -> Iterator[None]:
    """
    Turns whatever a push raises inside into a [`PushError`] that tells what to do.

    Args:
        repo_id (`str`):
            The repository.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.
        token (`str`, *optional*):
            The token, if it is not that of the environment or of `hf auth login`.

    Raises:
        [`PushError`]: If the push fails. No token stands in it.

    Example:

    ```python
    >>> with pushing("me/my-hrm"):
    ...     HfApi().upload_folder(repo_id="me/my-hrm", folder_path="outputs/hrm")
    ```
    """
    used = get_token() if token is None else token
    if used is not None and not re.fullmatch("[!-~]+", used):
        raise PushError(
            f"the {repo_type} {repo_id} was not pushed: the token from {_origin(token)} is empty, or holds white space or letters "
            "that no token has."
        )
    try:
        yield
    except FAULTS as error:
        if not is_fault(error):
            raise
        status = status_of(error)
        reason = _say(error, token)
        message = f"the push to the {repo_type} {repo_id} failed: {reason}. {_remedy(error, repo_id, token)}"
        # the error itself may quote the token
        raise PushError(message, status) from (None if _quotes_token(error, token) else error)


def retry(
    attempt: Callable[[], Result],
    what: str,
    max_tries: int = 8,
    token: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """
    Call `attempt` again, after a pause, as long as it fails in a way that may pass: two pushes at a time, a rate limit, trouble of
    the Hub, a connection that is cut. Each pause is logged.

    The answer to a request that succeeded can be lost. So `attempt` looks first at what is there.

    Args:
        attempt (`Callable[[], Result]`):
            What to call.
        what (`str`):
            What it does, for the log.
        max_tries (`int`, *optional*, defaults to `8`):
            Most calls. Pauses double from 1 to 30 seconds, unless the Hub asks for others.
        token (`str`, *optional*):
            See [`pushing`].
        sleep (`Callable[[float], None]`, *optional*, defaults to `time.sleep`):
            How to wait.

    Returns:
        `Result`: What `attempt` returns.
    """
    for number in range(1, max_tries):
        try:
            return attempt()
        except FAULTS as error:
            asked = asked_pause(error)
            pause = min(2 ** (number - 1), 30) if asked is None else asked
            if not may_pass(error) or pause > MAX_PAUSE:
                raise
            logger.warning(
                f"{what}: {_say(error, token)}. Trying again in {pause} s (try {number + 1} of {max_tries})."
            )
            sleep(pause)
    return attempt()


def is_fault(error: BaseException) -> bool:
    """Whether an error is one of a push. A `RuntimeError` can be anything."""
    return not isinstance(error, RuntimeError) or str(error).startswith("Error while uploading")


def may_pass(error: BaseException) -> bool:
    """Whether the same request can succeed a moment later."""
    if not is_fault(error) or isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
        return False
    if isinstance(error, RemoteEntryNotFoundError):  # a file to delete is gone: another push was there first
        return True
    status = status_of(error)
    return status is None or status in PASSING or status >= 500


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error or of what caused it, `None` if there was no answer."""
    if (response := _response_of(error)) is not None:
        return response.status_code
    found = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(error))  # the words of hf_xet
    return int(found[1]) if found else None


def asked_pause(error: BaseException) -> int | None:
    """The seconds after which the Hub wants to be asked again, if it says so."""
    response = _response_of(error)
    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1
    after = response.headers.get("Retry-After", "")
    return int(after) if after.isdigit() else None


def _response_of(error: BaseException | None):
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _say(error: BaseException, token: str | None) -> str:
    """An error and its causes, on one line, without secrets."""
    causes = [error]
    while causes[-1].__cause__ is not None and not isinstance(causes[-1], HfHubHTTPError):
        causes.append(causes[-1].__cause__)
    said = [" ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(".") for cause in causes]
    if isinstance(error, json.JSONDecodeError):
        said = ["the Hub, or a gateway before it, answered with something that is no JSON"]
    text = _scrub(", because of ".join(dict.fromkeys(said)), token)  # whole: half a token is not recognised
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _remedy(error: BaseException, repo_id: str, token: str | None) -> str:
    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to push; everything local works with it."
    if isinstance(error, LocalTokenNotFoundError):
        return _identity(token)
    if isinstance(error, RevisionNotFoundError):
        return "There is no such branch. Name another, or create it."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"{_identity(token)} Is the name {repo_id} right, and may you write there?"
    if status in (409, 412):
        return "Others push to it at the same time. Push again when they are done."
    if status == 429:
        asked = asked_pause(error)
        return f"The Hub limits how often it is asked. Push again in {'an hour' if asked is None else f'{asked} s'}."
    if may_pass(error):
        return "Push again later: what has arrived is not sent again."
    return "The Hub refuses what was sent; its words say why."


def _identity(token: str | None) -> str:
    """Who a push comes from, and what is wrong with that. The token itself is not told."""
    origin = _origin(token)
    if origin is None:
        return f"No token was found. Log in with `hf auth login`, or set HF_TOKEN ({_settings()})."
    try:
        user = HfApi().whoami(token=token)
    except (*FAULTS, OSError) as error:
        if status_of(error) == 401:
            return f"The Hub does not know the token from {origin}. Make a new one at {_settings()}."
        return f"The token is that from {origin}; whose it is could not be asked."
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return f"The token from {origin}, of {user['name']}, may only read. Make one that may write at {_settings()}."
    if role == "fineGrained":
        return (
            f"The token from {origin}, of {user['name']}, is fine-grained and lacks a permission: to create repositories, or to "
            f"write to this one. Add it at {_settings()}."
        )
    names = ", ".join([user["name"], *(org["name"] for org in user.get("orgs", []))])
    return f"The token from {origin} is that of {user['name']}, who pushes to names that begin with one of: {names}."


def _origin(token: str | None) -> str | None:
    if token is not None:
        return "the argument `token`"
    if not get_token():
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return name
    return "`hf auth login`"


def _settings() -> str:
    return f"{constants.ENDPOINT}/settings/tokens"


def _scrub(text: str, token: str | None) -> str:
    """The text without the token in use, without what looks like one, and without the signatures of signed addresses."""
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)
    for secret in filter(None, (token, token and token.strip(), get_token())):
        text = text.replace(secret, "<token>")
    return re.sub(r"hf_[A-Za-z0-9]{16,}", "<token>", text)


def _quotes_token(error: BaseException | None, token: str | None) -> bool:
    while error is not None:
        if "<token>" in _scrub(str(error), token):
            return True
        error = error.__cause__ or error.__context__
    return False
