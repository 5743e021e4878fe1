"""A headless Chromium, driven through chromedriver's HTTP interface (https://www.w3.org/TR/webdriver2/)."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs Chromium and its driver (Debian: chromium, chromium-driver)"

_OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]


class Browser:
    """One window.

    Args:
        session: The session's address.
    """

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, url: str) -> None:
        self._call("url", {"url": url})

    def size(self, width: int, height: int) -> None:
        """Set the size of the page; a window cannot be as narrow as a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)

    def dark(self, *, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def text(self) -> str:
        return self.script("return document.body.innerText")

    def script(self, source: str) -> Any:
        return self._call("execute/sync", {"script": source, "args": []})

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Wait until the page shows a text; returns the page's whole text."""
        return self.wait_until(lambda shown: text in shown, seconds, f"{text!r} is not on the page")

    def wait_until(self, shows: Callable[[str], bool], seconds: float = 60, complaint: str = "not yet") -> str:
        """Wait until the page's text satisfies `shows`; returns that text."""
        deadline = time.monotonic() + seconds
        while not shows(shown := self.text()):
            assert time.monotonic() < deadline, f"{complaint}; the page reads:\n{shown[:3000]}"
            time.sleep(0.3)
        return shown

    def click(self, text: str) -> None:
        """Click the innermost element that shows exactly this text."""
        found = self.script(
            "const all = [...document.querySelectorAll('a, button, li, span, div')]"
            f".filter(e => e.innerText && e.innerText.trim() === {json.dumps(text)});"
            "if (all.length) all[all.length - 1].click(); return all.length"
        )
        assert found, f"nothing on the page reads {text!r}"

    def rename(self, old: str, new: str) -> None:
        """Replace a text wherever the page shows it."""
        self.script(
            "const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);"
            f"while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data"
            f".replaceAll({json.dumps(old)}, {json.dumps(new)})"
        )

    def screenshot(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self._call("screenshot")))

    def errors(self) -> list[str]:
        """Errors on the console since the last call."""
        log = self._call("se/log", {"type": "browser"})
        return [line["message"] for line in log if line["level"] == "SEVERE"]

    def _devtools(self, command: str, parameters: object) -> None:
        self._call("goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, path: str, body: object = None) -> Any:
        return _request(f"{self._session}/{path}", body)


@contextmanager
def browse(*own_hosts: str) -> Iterator[Browser]:
    """A browser inside the block.

    Args:
        own_hosts: Names that resolve to 127.0.0.1. A request to any other host fails, and shows up as an error on the
            console.
    """
    rules = [*(f"MAP {host} 127.0.0.1" for host in own_hosts), "MAP * ~NOTFOUND", "EXCLUDE 127.0.0.1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}", "--log-level=OFF"], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            with suppress(OSError):
                _request(f"{address}/status")
                break
            time.sleep(0.1)
        wanted = {
            "goog:chromeOptions": {
                "args": [*_OPTIONS, f"--host-resolver-rules={', '.join(rules)}"],
                "binary": CHROMIUM,
            },
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = _request(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(f"{address}/session/{session}")
        finally:
            with suppress(OSError):
                request = urllib.request.Request(f"{address}/session/{session}", method="DELETE")
                urllib.request.urlopen(request, timeout=10).close()
    finally:
        driver.terminate()
        driver.wait(10)


def _request(url: str, body: object = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()[:500]}") from None
