"""A headless Chromium, spoken to over two pipes (DevTools protocol): screenshots, scripts, and what a page asks for.

python tests/report/browser.py REPORT.html FOLDER      screenshots: laptop and phone, light and dark, and a PDF
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAPTOP, PHONE = (1280, 800), (390, 844)
ANSWER_SECONDS = 120
MAX_HEIGHT = 16_000
"""Of one screenshot; the GPU-less renderer draws nothing beyond 16,384 pixels."""


def find_browser() -> str | None:
    """The program: RAY_MERGE_CHROMIUM, or the first known one on PATH."""
    named = os.environ.get("RAY_MERGE_CHROMIUM")
    return named or next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Page:
    """One tab. `requests` are the URLs that it asked for, `complaints` what stands in its console."""

    def __init__(self, commands: Any, answers: Any) -> None:
        self._commands, self._answers, self._count = commands, answers, 0
        self._session: str | None = None
        self._buffer = b""
        self._seen: set[str] = set()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], ANSWER_SECONDS)
            assert ready, f"the browser said nothing for {ANSWER_SECONDS} s"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser is gone"
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        given = message.get("params", {})
        self._seen.add(message.get("method", ""))
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        if message.get("method") == "Log.entryAdded":
            self.complaints.append(given["entry"]["text"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(given["exceptionDetails"]))
        return message

    def open(self, path: Path, size: tuple[int, int], *, dark: bool = False, fragment: str = "") -> None:
        """Load a file in a window of that many pixels."""
        self._look(size, dark=dark)
        # From an empty page: another fragment alone would load nothing.
        for url in ("about:blank", path.absolute().as_uri() + fragment):
            self._seen.discard("Page.loadEventFired")
            self.ask("Page.navigate", url=url)
            while "Page.loadEventFired" not in self._seen:
                self._next()

    def _look(self, size: tuple[int, int], *, dark: bool) -> None:
        phone = size[0] < 600
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=size[0], height=size[1], deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[colours])

    def run(self, script: str) -> Any:
        """The value of an expression."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """One key, as from a keyboard."""
        text = {"Enter": "\r"}.get(key)
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more
            )

    def screenshot(self, path: Path) -> None:
        """The whole page, from its top to its end."""
        # Parts far from the window are not drawn before they come near it.
        self.run(
            "document.querySelectorAll('.inside').forEach(one => { one.style.contentVisibility = 'visible' })"
        )
        height = min(MAX_HEIGHT, int(self.run("document.documentElement.scrollHeight")))
        width = int(self.run("innerWidth"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self, path: Path) -> None:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"]))


@contextmanager
def browser_page(program: str) -> Iterator[Page]:
    """A new browser with an empty profile, and one tab of it."""
    (give, take), (hear, say) = os.pipe(), os.pipe()

    def wire() -> None:  # Chromium reads commands from 3 and writes answers to 4
        os.dup2(give, 10), os.dup2(say, 11)
        os.dup2(10, 3), os.dup2(11, 4)

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
             f"--user-data-dir={profile}"],
            preexec_fn=wire, pass_fds=(3, 4), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(give), os.close(say)
        try:
            with open(take, "wb") as commands:
                yield Page(commands, hear)
        finally:
            os.close(hear)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(report: Path, folder: Path) -> None:
    """Screenshots of one report."""
    program = find_browser()
    if program is None:
        sys.exit(f"none of {', '.join(PROGRAMS)} is on PATH; apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with browser_page(program) as page:
        for name, size in (("laptop", LAPTOP), ("phone", PHONE)):
            for dark in (False, True):
                page.open(report, size, dark=dark)
                look = f"{name}-{'dark' if dark else 'light'}"
                page.screenshot(folder / f"{look}.png")
                page.run("document.getElementById('open-all').click()")
                page.screenshot(folder / f"{look}-open.png")
        page.pdf(folder / "print.pdf")
        print(f"{page.run('document.querySelectorAll(`*`).length')} elements, console: {page.complaints}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
