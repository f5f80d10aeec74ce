"""A page in headless Chromium, over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 60


class Page:
    """One tab. Whatever it says on its console, or fails to load, is in `problems`."""

    def __init__(self, send, receive):
        self._send, self._receive, self._count = send, receive, 0
        self.problems: list[str] = []
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Log", "Runtime", "Page", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, dark: bool = False, width: int = 1200, height: int = 900) -> None:
        """Load a file, and wait until it has loaded."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        phone = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.problems.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        self.evaluate("0")  # what the page said while loading has come before the answer

    def evaluate(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """All of the page as a PNG."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        message = json.loads(self._receive())
        found, said = message.get("method"), message.get("params", {})
        if found == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(said["entry"]["text"])
        elif found == "Runtime.exceptionThrown":
            self.problems.append(said["exceptionDetails"]["exception"].get("description", "an exception"))
        elif found == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(str([argument.get("value") for argument in said["args"]]))
        elif found == "Network.loadingFailed":
            self.problems.append(f"failed to load: {said['errorText']}")
        return message


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A browser with one tab, which is gone afterwards, with its profile."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def take_pipes() -> None:
        # Chromium reads from 3 and writes to 4, whichever numbers the pipes have got here.
        read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(read, 3)
        os.dup2(write, 4)

    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        process = subprocess.Popen(
            [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}/chromium", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=take_pipes,
            pass_fds=(3, 4),
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        buffer = bytearray()

        def send(text: str) -> None:
            os.write(to_browser[1], text.encode() + b"\0")

        def receive() -> bytes:
            while b"\0" not in buffer:
                data = os.read(from_browser[0], 1 << 16)
                assert data, "Chromium has gone"
                buffer.extend(data)
            message, _, rest = bytes(buffer).partition(b"\0")
            buffer[:] = rest
            return message

        try:
            yield Page(send, receive)
        finally:
            os.close(to_browser[1])
            os.close(from_browser[0])
            process.terminate()
            process.wait(_SECONDS)
