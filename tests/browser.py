"""A headless Chromium driven through its debugging pipe: nothing but the browser itself is needed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)


class Tab:
    """One page of the browser."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb", buffering=0)
        self.numbers, self.session, self.rest = itertools.count(1), "", b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._message()
            if reply.get("id") == number:
                assert "error" not in reply, reply
                found: dict[str, Any] = reply["result"]
                return found

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = self.read.read(1 << 16)
            assert part, "the browser has ended"
            self.rest += part
        text, self.rest = self.rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(text)
        return found

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 40) -> None:
        """Until a JavaScript condition is true."""
        look = f"if ({condition}) done(true); else if (Date.now() > end) done(false); else setTimeout(look, 20);"
        script = (
            f"new Promise((done) => {{ const end = Date.now() + {seconds * 1000}; (function look() {{ {look} }})(); }})"
        )
        assert self.run(script), f"never true: {condition}; the page: {self.run('document.body.innerText')}"

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'")

    def type(self, selector: str, text: str) -> None:
        """Focus a field, replace its text by keyboard input."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A new tab; skips the test where no Chromium is installed."""
    program = next((found for found in map(shutil.which, NAMES) if found), None)
    if program is None or shutil.which("bash") is None:
        pytest.skip("no Chromium; on Debian: apt-get install chromium")
    (child_read, write), (read, child_write) = os.pipe(), os.pipe()
    command = f'exec "$0" "$@" 3<&{child_read} 4>&{child_write}'  # Chromium's pipe is descriptors 3 and 4
    process = subprocess.Popen(
        ["bash", "-c", command, program, *FLAGS.split(), f"--user-data-dir={profile}"],
        pass_fds=(child_read, child_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for end in (child_read, child_write):
        os.close(end)
    try:
        yield Tab(read, write)
    finally:
        process.terminate()
        process.wait(20)
