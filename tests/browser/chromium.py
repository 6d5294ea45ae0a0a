"""A headless Chromium that is spoken to over a pipe in its DevTools protocol: pages as a person would see them.

Nothing but the browser is needed, and nothing here waits for a fixed time: a page is asked until it has what it should.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

_FLAGS = (
    "--headless",
    "--no-sandbox",  # root, as in most containers, cannot have one
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# Chromium reads commands from file 3 and writes answers to file 4.
_START = 'exec "$@" 3<&0 4>&1 </dev/null >&2'
PATIENCE = 60.0  # seconds: a bound for slow machines, not a wait

# All elements that match, also inside of the shadow roots in which TensorBoard's older pages are built.
_DEEP = """
const deep = (selector, root = document) => [...root.querySelectorAll('*')].flatMap(
    node => [...(node.matches(selector) ? [node] : []), ...(node.shadowRoot ? deep(selector, node.shadowRoot) : [])]);
"""


def find_browser() -> str | None:
    """The first browser on the PATH that can be driven."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Chromium:
    """One tab of a browser of its own.

    Attributes:
        problems: Errors on the console and uncaught exceptions, since the last `go`.
    """

    def __init__(self, executable: str, profile: Path, size: tuple[int, int] = (1500, 2400)) -> None:
        self._log = (profile.parent / f"{profile.name}.log").open("wb")
        options = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _START, "sh", executable, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def go(self, url: str) -> None:
        """Opens a page afresh, also where only the part after the # differs."""
        self._call("Page.navigate", url="about:blank")
        self.problems.clear()
        self._call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, in which ``deep(selector)`` finds elements."""
        answer = self._call("Runtime.evaluate", expression=f"{{{_DEEP}{expression}}}", returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, what: str) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if value := self.ask(expression):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"{what} did not appear on the page in {PATIENCE:g} s; on the console: {self.problems}")

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """Ends the browser and all that it started."""
        try:
            self._session = None
            self._call("Browser.close")
            self._process.wait(10)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        deadline = time.monotonic() + PATIENCE
        while (answer := self._read(deadline)).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next message: the answer to a call, or an event."""
        assert self._process.stdout is not None
        while b"\0" not in self._unread:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer in {PATIENCE:g} s: see {self._log.name}")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise EOFError(f"the browser ended: see {self._log.name}")
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.problems.append(" ".join(str(argument.get("value")) for argument in parameters["args"]))
