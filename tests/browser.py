"""
A headless Chromium for tests, driven through a pipe with the Chrome DevTools Protocol: no package, no port, no network.

The program is `$CHROMIUM`, or otherwise chromium or google-chrome on the path.
"""

import fcntl
import json
import os
import select
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


KEYS = {
    "ArrowDown": 40,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "Home": 36,
    "End": 35,
    "Enter": 13,
    "/": 191,
    "n": 78,
    "p": 80,
}
LEFT = "Inspected target navigated or closed"  # Chromium's answer to a command whose page was replaced


def find_chromium() -> str | None:
    """Return the path of a Chromium, or `None`."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Browser:
    """
    One page of a Chromium.

    Args:
        program (`str`):
            Path of the Chromium.
        folder (`Path`):
            Folder for its profile.

    `requests` holds the address of every request since the last [`Browser.open`]. `errors` holds the page's uncaught exceptions
    and the warnings and errors that it wrote to its console.
    """

    def __init__(self, program: str, folder: Path):
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._events: list[str] = []
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self._is_leaving = False  # the page may be replaced at any moment
        self._start(program, folder)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _start(self, program: str, folder: Path) -> None:
        theirs, self._to = _high(os.pipe())
        self._from, answers = _high(os.pipe())
        arguments = [
            program,
            "--headless",
            "--remote-debugging-pipe",  # reads commands from file descriptor 3 and answers on 4
            f"--user-data-dir={folder}",
            "--no-sandbox",  # needed in containers, and safe because the pages are our own
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
        ]
        self._pid = os.posix_spawn(
            program,
            arguments,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs, 3),
                (os.POSIX_SPAWN_DUP2, answers, 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        os.close(theirs)
        os.close(answers)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                if self._is_leaving and message.get("error", {}).get("message") == LEFT:
                    return {}
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _receive(self, timeout: float = 30) -> dict[str, Any]:
        """Return the next message. Events on the way are recorded."""
        end = time.monotonic() + timeout
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0))
            assert ready, f"the browser was silent for {timeout} seconds"
            block = os.read(self._from, 1 << 20)
            assert block, "the browser ended"
            self._unread += block
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        params = message.get("params", {})
        method = message.get("method", "")
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        self._events.append(method)
        return message

    def open(self, page: Path | str) -> None:
        """Load a file or a URL and wait until it is rendered."""
        self.requests.clear()
        self.errors.clear()
        url = page if isinstance(page, str) else page.absolute().as_uri()
        self.after_load(lambda: self.call("Page.navigate", url=url))

    def after_load(self, action: Callable[[], object]) -> None:
        """Do something that loads a page, and wait until it is rendered."""
        self._events.clear()
        self._is_leaving = True
        action()
        while "Page.loadEventFired" not in self._events:
            self._receive()
        self._is_leaving = False
        self.settle()

    def wait_for(self, script: str, timeout: float = 60) -> Any:
        """Return the value of a JavaScript expression as soon as it is true."""
        end = time.monotonic() + timeout
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} is {value!r} after {timeout} seconds"
            time.sleep(0.05)
        return value

    def settle(self) -> None:
        """Wait for two frames, so that pending changes are rendered. A page that is being left has none."""
        if self._is_leaving:
            return
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that match a CSS selector."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(found => found.textContent)")

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Click an element, at its centre or at other fractions of its width and height."""
        box = self.evaluate(
            f"(() => {{const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            f"return [box.left + {x} * box.width, box.top + {y} * box.height]}})()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button=button, clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        """Press a key."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        code = {"windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)
        self.settle()

    def type(self, text: str) -> None:
        """Type text into the focused element."""
        self.call("Input.insertText", text=text)
        self.settle()

    def show(self, width: int, height: int, dark: bool = False) -> None:
        """Set the viewport size and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.settle()

    def close(self) -> None:
        """Stop the browser."""
        self._session = None
        self.call("Browser.close")
        os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)


def _high(pair: tuple[int, int]) -> tuple[int, int]:
    """Move the ends of a pipe to descriptors that the browser's own, 3 and 4, cannot overwrite."""
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pair)
    for end in pair:
        os.close(end)
    return moved
