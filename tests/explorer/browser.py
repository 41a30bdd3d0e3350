"""A page in headless Chromium that is pressed, dragged and looked at as a reader does, over the DevTools protocol."""

import asyncio
import base64
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.browsers import CHROMIUM

FLAGS = "--headless --no-sandbox --disable-sync --disable-gpu --disable-quic --no-first-run --remote-debugging-port=0"
QUIET = "--disable-background-networking --disable-component-update --hide-scrollbars"
KEYS = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32, "Home": 36, "End": 35}


class Page:
    """The page's own end of the protocol."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self.socket, self.waiting, self.count = socket, dict[int, asyncio.Future[Any]](), 0
        self.complaints: list[Any] = []
        """What the page wrote on its console as a warning or an error, and exceptions that nothing caught."""
        self.bound: dict[str, Callable[[str], None]] = {}
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (text := await self.socket.read_message()) is not None:
            message = json.loads(text)
            params = message.get("params", {})
            match message.get("method"):
                case None:
                    self.waiting.pop(message["id"]).set_result(message)
                case "Runtime.bindingCalled":
                    self.bound[params["name"]](params["payload"])
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    self.complaints.append(params["args"])
                case "Runtime.exceptionThrown" | "Log.entryAdded":
                    self.complaints.append(params)

    def tell(self, method: str, **params: Any) -> "asyncio.Future[Any]":
        """A call whose answer need not be awaited."""
        self.count += 1
        self.waiting[self.count] = answer = asyncio.get_running_loop().create_future()
        self.socket.write_message(json.dumps({"id": self.count, "method": method, "params": params}))
        return answer

    async def call(self, method: str, **params: Any) -> Any:
        message = await asyncio.wait_for(self.tell(method, **params), 60)
        assert "error" not in message, message
        return message["result"]

    async def value(self, expression: str) -> Any:
        """Of a JavaScript expression, awaited if it is a promise."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not await self.value(expression):
            assert time.monotonic() < end, f"never came true: {expression}"
            await asyncio.sleep(0.02)

    async def bind(self, name: str, function: Callable[[str], None]) -> None:
        """Let the page call a function of this process with a text."""
        self.bound[name] = function
        await self.call("Runtime.addBinding", name=name)

    async def press(self, key: str, *, shift: bool = False) -> None:
        about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, modifiers=8 * shift, **about, **text)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def mouse(self, kind: str, x: float, y: float) -> None:
        pressed = {"button": "left", "clickCount": 1, "buttons": 1}
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    async def drag(self, selector: str, start: float, stop: float, steps: int = 5) -> None:
        """The mouse pressed on an element, moved across it, and let go; places are shares of its width."""
        box = await self.value(
            f"(() => {{ const box = document.querySelector({selector!r}); box.scrollIntoView(); "
            "const at = box.getBoundingClientRect(); return [at.x, at.y + at.height / 2, at.width]; })()"
        )
        x, y, width = box
        await self.mouse("mousePressed", x + start * width, y)
        for step in range(1, steps + 1):
            await self.mouse("mouseMoved", x + (start + (stop - start) * step / steps) * width, y)
        await self.mouse("mouseReleased", x + stop * width, y)

    async def picture(self, path: Path, *, width: int, dark: bool, height: int = 0) -> None:
        """The whole page as PNG, at a width, for readers who prefer light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        for tall in (height or 900, height):
            tall = tall or int(await self.value("document.documentElement.scrollHeight"))
            await self.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=tall, deviceScaleFactor=1, mobile=False
            )
            await asyncio.sleep(0.2)
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def opened(page: Path, profile: Path, *, width: int = 1200, height: int = 1000) -> AsyncIterator[Page]:
    """A file in a browser of its own, which is gone afterwards."""
    command = [
        str(CHROMIUM),
        *FLAGS.split(),
        *QUIET.split(),
        f"--user-data-dir={profile}",
        f"--window-size={width},{height}",
    ]
    browser = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        socket = await websocket_connect(await _address(profile), max_message_size=2**28)
        view = Page(socket)
        for domain in ("Runtime", "Log", "Page"):
            await view.call(f"{domain}.enable")
        await view.call("Page.navigate", url=page.as_uri())
        await view.until("document.readyState === 'complete' && location.protocol === 'file:'")
        yield view
        socket.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(view.reading, 5)
    finally:
        browser.terminate()
        browser.wait(30)


async def _address(profile: Path) -> str:
    """Where the browser's page listens, once it does."""
    end = time.monotonic() + 60
    direct = build_opener(ProxyHandler({}))
    while time.monotonic() < end:
        await asyncio.sleep(0.1)
        with suppress(OSError, IndexError, StopIteration, ValueError):
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            with direct.open(f"http://127.0.0.1:{port}/json", timeout=5) as answer:
                targets = json.load(answer)
            return str(next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page"))
    raise AssertionError("the browser did not start")
