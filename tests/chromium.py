"""Headless Chromium, driven by the DevTools protocol over a pipe: this needs no package."""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Debian's and Ubuntu's names, then those of Google's packages
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None) if os.name == "posix" else None
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
SECONDS = 60.0  # until a reply or a condition is given up


class Chromium:
    """A browser with one tab. `events` has everything that happened since the page was opened."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.number, self.received = 0, b""
        self.replies: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.sessions = {"browser": "", "page": "", "worker": ""}
        target = self.send("browser", "Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("browser", "Target.attachToTarget", targetId=target, flatten=True)
        self.sessions["page"] = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send("page", f"{domain}.enable")
        auto = {"autoAttach": True, "waitForDebuggerOnStart": False, "flatten": True}
        self.send("page", "Target.setAutoAttach", **auto)

    def send(self, where: str, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol in the browser, the page or its worker."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session := self.sessions[where]:
            message["sessionId"] = session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self.to_browser, content) :]
        while message["id"] not in self.replies:
            self.read()
        reply = self.replies.pop(message["id"])
        assert "error" not in reply, reply["error"]
        return reply["result"]

    def read(self) -> None:
        """Read the next message from the browser, an event or a reply."""
        while b"\0" not in self.received:
            assert select.select([self.from_browser], [], [], SECONDS)[0], "no reply"
            chunk = os.read(self.from_browser, 1 << 20)
            assert chunk, "the browser has ended"
            self.received += chunk
        line, _, self.received = self.received.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "id" in message:
            self.replies[message["id"]] = message
        else:
            self.events.append(message)
        params = message.get("params", {})
        if params.get("targetInfo", {}).get("type") == "worker" and "sessionId" in params:
            self.sessions["worker"] = params["sessionId"]
            self.send("worker", "Network.enable")

    def evaluate(self, expression: str, where: str = "page") -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        reply = self.send(where, "Runtime.evaluate", **params)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait_for(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def open(self, file: Path) -> None:
        """Open a file as a double click does, and wait until it has loaded."""
        self.events, self.sessions["worker"] = [], ""
        self.send("page", "Page.navigate", url=file.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.read()

    def mouse(self, kind: str, x: float, y: float, **params: Any) -> None:
        self.send("page", "Input.dispatchMouseEvent", type=kind, x=x, y=y, **params)

    def touch(self, x: float, y: float) -> None:
        points = {"touchStart": [{"x": x, "y": y}], "touchEnd": []}
        for kind, places in points.items():
            self.send("page", "Input.dispatchTouchEvent", type=kind, touchPoints=places)


@contextmanager
def start_chromium(profile: Path) -> Iterator[Chromium]:
    assert CHROMIUM
    browser_input, to_browser = os.pipe()
    from_browser, browser_output = os.pipe()

    def use_pipes() -> None:  # the browser reads from 3 and writes to 4
        os.dup2(browser_input, 103)
        os.dup2(browser_output, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    quiet: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(command, preexec_fn=use_pipes, close_fds=False, **quiet)
    os.close(browser_input)
    os.close(browser_output)
    try:
        browser = Chromium(to_browser, from_browser)
        yield browser
        browser.send("browser", "Browser.close")
    finally:
        os.close(to_browser)
        os.close(from_browser)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
