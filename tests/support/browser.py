"""A browser without a window, driven by the DevTools protocol: what a person does at the page, by keyboard and pointer."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.daemon import PATIENCE
from tests.support.programs import need

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--remote-debugging-port=0")  # fmt: skip
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " "), "Escape": (27, "")}


class Browser:
    """One page. `problems`: what it has reported: scripts that have failed, violations of the content security policy, errors of
    the console."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._session = ""
        self._loaded = asyncio.Event()
        self.problems: list[str] = []
        self.dialogs = 0
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                waiting = self._waiting.pop(said["id"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(said)
            else:
                self._heard(said["method"], said["params"])

    def _heard(self, method: str, given: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.problems.append(given["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(given["exceptionDetails"]))
        elif method == "Page.javascriptDialogOpening":
            self.dialogs += 1
            self.problems.append(f"a dialog: {given['message']}")

    async def call(self, method: str, **given: Any) -> Any:
        """The result of a command."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": given} | (
            {"sessionId": self._session} if self._session else {}
        ))  # fmt: skip
        async with asyncio.timeout(PATIENCE):
            said = await answer
        assert "error" not in said, (method, said)
        return said["result"]

    async def begin(self) -> None:
        """Open the page."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def looks(self, width: int, height: int = 900, dark: bool = False) -> None:
        """The size of the window (below 600: a phone), and what the person likes."""
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def scripts(self, allowed: bool) -> None:
        """Whether the page may run scripts."""
        await self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    async def go(self, url: str) -> None:
        """Load a page."""
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def run(self, script: str) -> Any:
        """The value of an expression, in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def text(self) -> str:
        """What is to be read."""
        return str(await self.run("document.body.innerText"))

    async def until(self, script: str) -> Any:
        """Wait until an expression is true."""
        began = time.monotonic()
        while True:
            try:
                if found := await self.run(script):
                    return found
            except AssertionError:  # the page is being left
                pass
            assert time.monotonic() - began < PATIENCE, (script, await self.text())
            await asyncio.sleep(0.02)

    async def press(self, key: str) -> None:
        """Press a key."""
        code, text = KEYS[key]
        shown = " " if key == "Space" else key
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=shown, code=key, windowsVirtualKeyCode=code, **more)

    async def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def tab_to(self, selector: str, most: int = 60) -> int:
        """Press Tab until an element has the focus; how often."""
        for count in range(1, most + 1):
            await self.press("Tab")
            if await self.run(f"document.activeElement.matches({json.dumps(selector)})"):
                return count
        raise AssertionError(f"{selector} is not reached by Tab: {await self.text()}")

    async def follows(self, *keys: str) -> None:
        """Press keys, the last of which leads to another page, and wait for that."""
        self._loaded.clear()
        for key in keys:
            await self.press(key)
        async with asyncio.timeout(PATIENCE):
            await self._loaded.wait()

    async def click(self, selector: str) -> None:
        """Click on an element that leads to another page, and wait for that."""
        self._loaded.clear()
        found = await self.run(f"!!document.querySelector({json.dumps(selector)})")
        assert found, (selector, await self.text())
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")
        async with asyncio.timeout(PATIENCE):
            await self._loaded.wait()

    async def picture(self, path: Path) -> None:
        """Write what is seen to a file (PNG)."""
        found = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))  # noqa: ASYNC240

    async def end(self) -> None:
        """Close it."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


@asynccontextmanager
async def browser(folder: Path, *flags: str) -> AsyncIterator[Browser]:
    """A browser with a profile of its own in `folder`."""
    profile = folder / "profile"
    process = subprocess.Popen(  # noqa: ASYNC220
        [need("chromium"), *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        began, place = time.monotonic(), profile / "DevToolsActivePort"
        while not (place.exists() and place.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() - began < PATIENCE, "the browser does not start"
            await asyncio.sleep(0.02)
        port, path = place.read_text().split("\n")[:2]
        async with aiohttp.ClientSession() as client:
            async with client.ws_connect(f"http://127.0.0.1:{port}{path}", max_msg_size=0) as socket:
                found = Browser(socket)
                try:
                    await found.begin()
                    yield found
                finally:
                    await found.end()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)
