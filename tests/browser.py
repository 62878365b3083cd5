"""Headless Chromium, driven by its debugging protocol through two pipes; no other package is needed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """A page of a browser without network."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._session: str | None = None
        self._buffer, self._last = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], 60)
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def open(self, path: Path, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """Load a file in a window of this size in CSS pixels."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression, or of its promise."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def settle(self) -> None:
        """Wait until the page has handled what it was sent, and has been drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))")

    def middle(self, selector: str) -> dict[str, float]:
        """Scroll an element into view; returns where its middle is."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', inline: 'center'}})")
        self.settle()
        box = "(({x, y, width, height}) => ({x: x + width / 2, y: y + height / 2}))"
        return self.run(f"{box}({element}.getBoundingClientRect())")

    def point(self, selector: str) -> None:
        """Move the mouse over an element."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.middle(selector))
        self.settle()

    def click(self, selector: str) -> None:
        """Click on an element."""
        self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **self.middle(selector))
        self.settle()

    def tap(self, selector: str) -> None:
        """Touch an element."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self.middle(selector)])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.settle()

    def problems(self) -> list[str]:
        """What the page wrote to the console, and every request but that for its own file."""
        told = [
            json.dumps(e["params"])
            for e in self.events
            if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        ]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return told + [url for url in asked[1:] if not url.startswith("data:")]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start Chromium and end it.

    Args:
        profile: an empty directory for its files.
    """
    assert CHROMIUM, "no Chromium"
    ends = [end for _ in range(2) for end in os.pipe()]
    (theirs_read, ours_write, ours_read, theirs_write) = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends)
    for end in ends:
        os.close(end)
    command = f'exec "$0" "$@" 3<&{theirs_read} 4>&{theirs_write}'  # Chromium reads from 3 and writes to 4
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(theirs_read, theirs_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_read)
    os.close(theirs_write)
    try:
        yield Page(ours_read, ours_write)
    finally:
        process.kill()
        process.wait()
        os.close(ours_read)
        os.close(ours_write)
