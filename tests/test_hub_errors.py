"""Failed pushes raise one clear error, and temporary failures are retried."""

import importlib
import json

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError
from huggingface_hub.utils import hf_raise_for_status

from trl_hrm import hub
from trl_hrm.hub import HTTPError, PushError, asked_pause, may_pass, pushing, retry, status_of


httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx or httpx2
URL = "https://huggingface.co/api/datasets/me/x/commit/main"


def answer(status: int, headers: dict[str, str] | None = None, url: str = URL, **body) -> HfHubHTTPError:
    """Return the exception that the Hub client raises for a response."""
    response = httpx.Response(status, headers=headers, json=body, request=httpx.Request("POST", url))
    with pytest.raises(HfHubHTTPError) as error:
        hf_raise_for_status(response)
    return error.value


def lfs_error(cause: Exception) -> RuntimeError:
    error = RuntimeError("Error while uploading 'tree/train-00000-of-00001.parquet' to the Hub.")
    error.__cause__ = cause
    return error


XET = "Network error: Request error: HTTP status {} error ({}), domain: https://cas.hf.co/v1/xorbs/default/0a"
CUT = httpx.RemoteProtocolError("Server disconnected without sending a response.")
NO_JSON = json.JSONDecodeError("Expecting value", "<html>", 0)
GONE = answer(404, {"X-Error-Code": "EntryNotFound"})
OFFLINE = OfflineModeIsEnabled("offline mode is enabled")


@pytest.mark.parametrize(
    ("error", "status", "passes"),
    [
        *((answer(status), status, False) for status in (400, 401, 402, 403, 404, 413, 422)),
        *((answer(status), status, True) for status in (408, 409, 412, 429, 500, 502, 503, 504)),
        (GONE, 404, True),
        (lfs_error(answer(403)), 403, False),
        (lfs_error(answer(503)), 503, True),
        (lfs_error(CUT), None, True),
        (ConnectionError(XET.format("client", "403 Forbidden")), 403, False),
        (ConnectionError(XET.format("server", "500 Internal Server Error")), 500, True),
        (ConnectionError("Network error: connection reset"), None, True),
        (CUT, None, True),
        (NO_JSON, None, True),
        (OFFLINE, None, False),
    ],
    ids=lambda value: " ".join(str(value).split())[:40],
)
def test_each_family(error, status, passes):
    """Unknown errors are raised unchanged. Retrying a permanent error keeps the user waiting."""
    assert status_of(error) == status
    assert may_pass(error) is passes
    with pytest.raises(PushError, match="dataset me/x") as raised:
        with pushing("me/x", "dataset"):
            raise error
    assert raised.value.status == status
    assert isinstance(raised.value, OSError) and "\n" not in str(raised.value)
    assert isinstance(GONE, RemoteEntryNotFoundError)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ValueError("rows"), KeyError("x"), FileNotFoundError("f")]
)
def test_other_errors_are_raised_unchanged(error):
    """Reporting a training error as a Hub error would mislead the user."""
    with pytest.raises(type(error)) as raised:
        with pushing("me/x"):
            raise error
    assert raised.value is error
    calls = []
    with pytest.raises(type(error)):
        retry(lambda: calls.append(1) or fail(error), "x", sleep=calls.append)
    assert calls == [1]


def fail(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("status", "headers", "pause"),
    [
        (429, {"Retry-After": "7"}, 7),
        (429, {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 56),
        (429, {"ratelimit": '"api";r=3;t=55'}, None),  # a different rate limit
        (503, {"Retry-After": "2"}, 2),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        (503, {}, None),
    ],
)
def test_pauses_requested_by_the_hub(status, headers, pause):
    assert asked_pause(answer(status, headers)) == pause
    assert asked_pause(lfs_error(answer(status, headers))) == pause
    assert asked_pause(CUT) is None


def test_retry(caplog):
    """Unlimited retries would hang, and an unannounced pause would look like hanging."""
    faults = [answer(503), answer(429, {"Retry-After": "9"}), CUT, answer(412)]
    pauses = []
    assert retry(lambda: fail(faults.pop(0)) if faults else "done", "me/x: committing", sleep=pauses.append) == "done"
    assert pauses == [1, 9, 4, 8]
    assert "me/x: committing: HfHubHTTPError: " in caplog.messages[0]
    assert caplog.messages[0].endswith("Retrying in 1 s (attempt 2 of 8).")
    assert caplog.messages[2].endswith(
        "RemoteProtocolError: Server disconnected without sending a response. Retrying in 4 s (attempt 4 of 8)."
    )
    calls, pauses = [], []
    with pytest.raises(HfHubHTTPError):
        retry(lambda: calls.append(1) or fail(answer(503)), "x", sleep=pauses.append)
    assert (len(calls), pauses) == (8, [1, 2, 4, 8, 16, 30, 30])
    with pytest.raises(HfHubHTTPError):
        retry(lambda: fail(answer(429, {"Retry-After": "601"})), "x", sleep=pauses.append)
    assert len(pauses) == 7


def test_signed_addresses_and_tokens_are_removed(monkeypatch):
    """Anyone could write to a signed storage address in a bug report."""
    monkeypatch.setenv("HF_TOKEN", "hf_short")
    error = answer(403, url="https://s3.amazonaws.com/lfs/0a?X-Amz-Signature=1f2e&x=y", error="hf_short may not")
    with pytest.raises(PushError, match="https://s3.amazonaws.com/lfs/0a.* <token>") as raised:
        with pushing("me/x"):
            raise lfs_error(error)
    assert "1f2e" not in str(raised.value) and "hf_short" not in str(raised.value)
    assert raised.value.__cause__ is None  # a traceback would print its message
    with pytest.raises(PushError, match="an old one: <token>"):
        with pushing("me/x"):
            raise ConnectionError("an old one: hf_" + "aB3" * 8)
    # truncating the text must not leave half of a token
    for token in ("hf_short", "hf_" + "aB3" * 10):
        for before in range(hub.SHOWN - 60, hub.SHOWN):
            with pytest.raises(PushError) as raised:
                with pushing("me/x"):
                    raise ConnectionError("-" * before + token)
            assert token[:6] not in str(raised.value)


@pytest.mark.parametrize("token", ["", "hf_x\n", "hf x", "hf_é"])
def test_a_token_that_is_invalid_in_a_header(monkeypatch, token):
    """The HTTP library would print the token, or raise an error about an ASCII codec."""
    given = {"the argument `token`": token}
    if token.strip() and not token.endswith("\n"):  # the client strips tokens from the environment
        given["HF_TOKEN"] = None
        monkeypatch.setenv("HF_TOKEN", token)
    for origin, argument in given.items():
        with pytest.raises(PushError, match=f"token from {origin}") as raised:
            with pushing("me/x", token=argument):
                raise AssertionError("it was sent")
        assert not token.strip() or token.strip() not in str(raised.value)


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, "from HF_TOKEN, of me, is read-only. Create one"),
        (
            {"name": "me", "auth": {"accessToken": {"role": "fineGrained"}}},
            "of me, is fine-grained and lacks the permission",
        ),
        (
            {"name": "me", "orgs": [{"name": "acme"}]},
            "belongs to me, who can push to these namespaces: me, acme.",
        ),
        (answer(401), "The token from HF_TOKEN is not valid. Create a new one at "),
        (CUT, "The token comes from HF_TOKEN. Its owner could not be determined."),
    ],
)
def test_errors_name_the_user(monkeypatch, user, words):
    monkeypatch.setenv("HF_TOKEN", "hf_short")
    monkeypatch.setattr(HfApi, "whoami", lambda self, token: fail(user) if isinstance(user, Exception) else user)
    with pytest.raises(PushError, match=words.replace("`", ".")):
        with pushing("me/x"):
            raise answer(403)


def test_where_the_token_comes_from(monkeypatch, tmp_path):
    """HF_TOKEN has priority over the login, so renewing the login would not help."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert hub._origin(None) is None
    (tmp_path / "token").write_text("hf_file")
    assert hub._origin(None) == "`hf auth login`"
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_old")
    assert hub._origin(None) == "HUGGING_FACE_HUB_TOKEN"
    monkeypatch.setenv("HF_TOKEN", "hf_new")
    assert hub._origin(None) == "HF_TOKEN"
    assert hub._origin("hf_given") == "the argument `token`"
