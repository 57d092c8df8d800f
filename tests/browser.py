"""A headless Chromium without a network, driven by its DevTools protocol."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from helpers import needs, without

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
)


HOW: dict[str, Any] = {"max_size": None, "ping_interval": None, "open_timeout": 60}


class Browser:
    """One page; what it asks of the network is in ``asked``, its errors are in ``complaints``."""

    def __init__(self, folder: Path, width: int = 1280, offline: bool = True) -> None:
        self.folder, self.downloads = folder, folder / "downloads"
        self.downloads.mkdir(parents=True)
        if shutil.which("chromium") is None:
            without("chromium", "install it")
        client = needs("websockets.sync.client")
        command = ["chromium", *OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000"]
        with (folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen([*command, "about:blank"], stderr=stderr)
        port = folder / "profile" / "DevToolsActivePort"
        self.wait(lambda: port.is_file() and port.read_text().count("\n") == 1)
        number, path = port.read_text().split("\n")
        self.socket = client.connect(f"ws://127.0.0.1:{number}{path}", **HOW)
        self.numbers, self.session, self.asked, self.complaints = itertools.count(1), {}, list[str](), list[str]()
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self(f"{domain}.enable")
        if offline:
            self("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters, **self.session}))
        while True:
            answer = json.loads(self.socket.recv(timeout=120))
            if answer.get("method") == "Network.requestWillBeSent":
                self.asked.append(answer["params"]["request"]["url"][:200])
            elif answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"])[:1000])
            elif answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, awaited."""
        how = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        result = self("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, address: str) -> None:
        """Open an address and wait until the student of the page is open or cannot be."""
        self("Page.navigate", url=address)
        self.wait(lambda: self.evaluate("document.readyState === 'complete' && typeof busy === 'object'"))
        self.evaluate("busy")

    def give(self, *files: Path) -> None:
        """Choose files on the page and wait for the answers."""
        node = self("Runtime.evaluate", expression="document.getElementById('files')")["result"]["objectId"]
        self("DOM.setFileInputFiles", files=[str(file) for file in files], objectId=node)
        count = self.evaluate("entries.length")
        self.wait(lambda: self.evaluate("entries.every((entry) => entry.state !== 'waiting')") and count, 300)
        self.evaluate("busy")

    def click(self, name: str) -> None:
        """Click an element by its id."""
        self.evaluate(f"document.getElementById('{name}').click()")

    def download(self, name: str) -> Path:
        """Return a file that the page saves, once it is there."""
        self.wait(lambda: (self.downloads / name).is_file())
        return self.downloads / name

    def picture(self, file: Path) -> None:
        """Write a PNG of the whole page."""
        import base64

        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def wait(self, condition: Any, seconds: float = 180) -> None:
        """Wait for a condition."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the browser does not get there"
            time.sleep(0.05)

    def close(self) -> None:
        """End the browser."""
        self.session = {}
        self.socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
        self.process.wait(120)
