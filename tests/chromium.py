"""A page in headless Chromium, driven over its DevTools protocol: what it asks for, how it looks, what its scripts say."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
PATIENCE_S = 60

MEASURE = """(async () => {
  for (const image of document.images) image.loading = 'eager';
  await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
  const drawn = [...document.querySelectorAll('svg image')].map(one => one.getAttribute('href'));
  const decodes = href => { const i = new Image(); i.src = href; return i.decode().then(() => 1, () => 0); };
  const decoded = await Promise.all(drawn.map(decodes));
  return JSON.stringify({
    width: document.scrollingElement.scrollWidth, inner: innerWidth, height: document.scrollingElement.scrollHeight,
    images: document.images.length + drawn.length,
    broken: [...document.images].filter(image => !image.naturalWidth).length + decoded.filter(one => !one).length,
    background: getComputedStyle(document.body).backgroundColor,
  });
})()"""


@dataclass(frozen=True, slots=True)
class Look:
    """One way of looking at a page: pixels, and what was measured."""

    png: bytes
    measured: dict[str, Any]
    requests: list[str] = field(default_factory=list)  # but for the page itself and what lies in it


def program() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def look(page: Path, *, width: int, dark: bool) -> Look:
    """The whole page at so many pixels of width."""
    command = program()
    assert command is not None
    with (
        tempfile.TemporaryDirectory(prefix="nearfar-chromium-") as profile,
        subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as browser,
    ):
        try:
            port = _port(Path(profile) / "DevToolsActivePort", browser)
            return asyncio.run(_look(port, page, width, dark))
        finally:
            browser.send_signal(signal.SIGTERM)
            browser.wait(PATIENCE_S)


def _port(file: Path, browser: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not (file.exists() and file.read_text().count("\n")):
        assert browser.poll() is None, "Chromium did not start"
        assert time.monotonic() < deadline, "Chromium does not answer"
        time.sleep(0.05)
    return int(file.read_text().split()[0])


async def _look(port: int, page: Path, width: int, dark: bool) -> Look:
    address, requests = page.absolute().as_uri(), []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(one for one in await answer.json() if one["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            numbers = iter(range(1, 1000))

            async def call(method: str, until: str = "", **parameters: Any) -> dict[str, Any]:
                number, answer = next(numbers), None
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while answer is None or until:
                    message = json.loads((await socket.receive(PATIENCE_S)).data)
                    if message.get("method") == "Network.requestWillBeSent":
                        requests.append(message["params"]["request"]["url"])
                    if until and message.get("method") == until:
                        until = ""
                    if message.get("id") == number:
                        assert "error" not in message, message
                        answer = message["result"]
                return answer

            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            await call("Network.enable")
            await call("Page.enable")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await call("Emulation.setDeviceMetricsOverride", **size)
            await call("Emulation.setEmulatedMedia", features=scheme)
            await call("Page.navigate", until="Page.loadEventFired", url=address)
            found = await call("Runtime.evaluate", expression=MEASURE, awaitPromise=True)
            measured = json.loads(found["result"]["value"])
            clip = {"x": 0, "y": 0, "width": width, "height": measured["height"], "scale": 1}
            shot = await call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    asked = [url for url in requests if url != address and not url.startswith("data:")]
    return Look(base64.b64decode(shot["data"]), measured, asked)
