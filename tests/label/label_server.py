"""Starts the real server in the environment of `make label-env`, on a free loopback port, and talks to it."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import ROOT, without
from PIL import Image


def label_python() -> Path:
    """Return the interpreter that has MONAI Label; without it the test fails in CI and is skipped elsewhere."""
    python = Path(os.environ.get("AMKD_LABEL_PYTHON", ROOT / ".venv-label" / "bin" / "python"))
    return python if python.is_file() else without(str(python), "run `make label-env` or set AMKD_LABEL_PYTHON")


def png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Answer:
    status: int
    kind: str
    content: bytes
    headers: Message

    def json(self) -> Any:
        return json.loads(self.content)


class LabelServer:
    """`python -m amkd_monai label` as a process."""

    def __init__(self, bundles: list[Path], studies: Path, work: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = work.parent / "server.log"
        options = ["--studies", str(studies), "--work", str(work), "--port", str(self.port)]
        self.command = [str(label_python()), "-m", "amkd_monai", "label", "--bundles", *map(str, bundles), *options]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.log.parent
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/info/")
                return
            except urllib.error.URLError:
                time.sleep(0.5)
        self.stop()
        pytest.fail(f"the server did not start: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(120)

    def kill(self) -> None:
        """SIGKILL the server alone; its trainers are left to themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(120)

    def trainers(self) -> list[psutil.Process]:
        """Processes that the server has started."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def cpu_seconds(self) -> float:
        """Processor time that the server has used, without its children."""
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def get(self, path: str, **headers: str) -> Answer:
        return self._send(urllib.request.Request(self._url(path), headers=headers))

    def post_json(self, path: str, content: Any = None) -> Answer:
        headers = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(self._url(path), json.dumps(content or {}).encode(), headers))

    def send(self, path: str, method: str = "POST", params: str = "{}", **files: tuple[str, bytes]) -> Answer:
        """Send a form: `params` and files, each by its name and content."""
        mark = uuid.uuid4().hex
        parts = [f'Content-Disposition: form-data; name="params"\r\n\r\n{params}'.encode()]
        for field, (name, content) in files.items():
            head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
            parts.append(head.encode() + content)
        body = b"".join(b"--%s\r\n%s\r\n" % (mark.encode(), part) for part in parts) + b"--%s--\r\n" % mark.encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        return self._send(urllib.request.Request(self._url(path), body, headers, method=method))

    def infer(self, model: str, image: str, output: str = "image") -> Answer:
        return self.send(f"/infer/{model}?image={image}&output={output}")

    def train(self, model: str, **options: Any) -> dict[str, Any]:
        """Start a training and wait for its end."""
        assert self.post_json(f"/train/{model}", options).status == 200
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            state: dict[str, Any] = self.get("/train/").json()
            if state["status"] not in ("SUBMITTED", "RUNNING"):
                return state
            time.sleep(0.5)
        raise TimeoutError("the training did not end")

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _send(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return Answer(answer.status, answer.headers.get_content_type(), answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers.get_content_type(), error.read(), error.headers)
