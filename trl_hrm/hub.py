"""Pushes to the Hugging Face Hub: one error class for all failures, and retries with pauses."""

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

from .terminal import one_line, plain


logger = logging.getLogger(__name__)
Result = TypeVar("Result")

HTTPError = HfHubHTTPError.__bases__[0]  # class of the HTTP library that huggingface_hub uses, httpx or httpx2
# A failed push raises HfHubHTTPError (API), another HTTPError (lost connection), RuntimeError (LFS), ConnectionError
# (Xet), or JSONDecodeError (a gateway answers in HTML).
FAULTS = (HTTPError, RuntimeError, ConnectionError, LocalTokenNotFoundError, json.JSONDecodeError)
PASSING = (408, 409, 412, 425, 429)  # temporary, as are 500 and above
MAX_PAUSE = 600  # seconds. If the Hub asks for a longer pause, the error is raised
SHOWN = 600  # maximum number of characters of an error


class PushError(OSError):
    """
    Raised if a push to the Hub fails.

    Args:
        message (`str`):
            What failed, why, and what to do.
        status (`int`, *optional*):
            HTTP status, if the Hub answered.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@contextmanager
def pushing(repo_id: str, repo_type: str = "model", token: str | None = None) -> Iterator[None]:
    """
    Context manager that converts the errors of a push to a [`PushError`], which says what to do.

    Args:
        repo_id (`str`):
            Id of the repository.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.
        token (`str`, *optional*):
            Token of the push. By default from the environment or from `hf auth login`.

    Raises:
        [`PushError`]: If the push fails. The message contains no token.

    Example:

    ```python
    >>> with pushing("me/my-hrm"):
    ...     HfApi().upload_folder(repo_id="me/my-hrm", folder_path="outputs/hrm")
    ```
    """
    used = get_token() if token is None else token
    if used is not None and not re.fullmatch("[!-~]+", used):
        raise PushError(
            f"the {repo_type} {repo_id} was not pushed: the token from {_origin(token)} is empty or contains characters that are "
            "not allowed in a token, such as whitespace. Copy it again."
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
    Call `attempt`, and retry after temporary errors: concurrent pushes, rate limits, server errors, lost connections.
    Each retry is logged.

    A request can succeed although its answer is lost. `attempt` must therefore check first whether its work is already
    done.

    Args:
        attempt (`Callable[[], Result]`):
            Function to call.
        what (`str`):
            Description of the call, for the log.
        max_tries (`int`, *optional*, defaults to `8`):
            Maximum number of calls. Pauses double from 1 to 30 seconds, unless the Hub asks for a different pause.
        token (`str`, *optional*):
            See [`pushing`].
        sleep (`Callable[[float], None]`, *optional*, defaults to `time.sleep`):
            Function that waits for a number of seconds.

    Returns:
        `Result`: Return value of `attempt`.
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
                f"{plain(what)}: {one_line(_say(error, token))}. Retrying in {pause} s (attempt {number + 1} of {max_tries})."
            )
            sleep(pause)
    return attempt()


def is_fault(error: BaseException) -> bool:
    """Return whether an error comes from a push. A `RuntimeError` can come from anything."""
    return not isinstance(error, RuntimeError) or str(error).startswith("Error while uploading")


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    if not is_fault(error) or isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
        return False
    if isinstance(error, RemoteEntryNotFoundError):  # another push has deleted the file first
        return True
    status = status_of(error)
    return status is None or status in PASSING or status >= 500


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error or of its cause, or `None` if there was no answer."""
    if (response := _response_of(error)) is not None:
        return response.status_code
    found = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(error))  # message of hf_xet
    return int(found[1]) if found else None


def asked_pause(error: BaseException) -> int | None:
    """Return the number of seconds that the Hub asks to wait, if it does."""
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
    """Return an error and its causes on one line, without secrets."""
    causes = [error]
    while causes[-1].__cause__ is not None and not isinstance(causes[-1], HfHubHTTPError):
        causes.append(causes[-1].__cause__)
    said = [" ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(".") for cause in causes]
    if isinstance(error, json.JSONDecodeError):
        said = ["the answer of the Hub, or of a gateway, is not JSON"]
    text = _scrub(", because of ".join(dict.fromkeys(said)), token)  # before cutting, which could split a token
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _remedy(error: BaseException, repo_id: str, token: str | None) -> str:
    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to push."
    if isinstance(error, LocalTokenNotFoundError):
        return _identity(token)
    if isinstance(error, RevisionNotFoundError):
        return "The branch does not exist. Create it, or use another."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"{_identity(token)} Check that the name {repo_id} is correct and that you have write access."
    if status in (409, 412):
        return "Another push to the repository is in progress. Push again when it is done."
    if status == 429:
        asked = asked_pause(error)
        return f"The rate limit of the Hub was reached. Push again in {'an hour' if asked is None else f'{asked} s'}."
    if may_pass(error):
        return "Push again later. Files that were uploaded are not sent again."
    return "The Hub rejected the push for the reason above."


def _identity(token: str | None) -> str:
    """Describe the token of a push, without the token itself: where it comes from, whose it is, and what it lacks."""
    origin = _origin(token)
    if origin is None:
        return f"No token was found. Log in with `hf auth login`, or set HF_TOKEN ({_settings()})."
    try:
        user = HfApi().whoami(token=token)
    except (*FAULTS, OSError) as error:
        if status_of(error) == 401:
            return f"The token from {origin} is not valid. Create a new one at {_settings()}."
        return f"The token comes from {origin}. Its owner could not be determined."
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return (
            f"The token from {origin}, of {user['name']}, is read-only. Create one with write access at {_settings()}."
        )
    if role == "fineGrained":
        return (
            f"The token from {origin}, of {user['name']}, is fine-grained and lacks the permission to create repositories or to "
            f"write to this one. Add it at {_settings()}."
        )
    names = ", ".join([user["name"], *(org["name"] for org in user.get("orgs", []))])
    return f"The token from {origin} belongs to {user['name']}, who can push to these namespaces: {names}."


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
    """Remove tokens, and signatures of signed URLs, from a text."""
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
