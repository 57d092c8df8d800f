"""The web server: MONAI Label's own, with errors as JSON, for this machine alone unless told otherwise."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")

SERVER = "AMKD_LABEL_SERVER"
"""Environment variable with the server's process id, for the trainers that it starts."""

WARNING = (
    "WARNING: {host} is reachable from outside this machine. Whoever reaches it can read the studies, save labels and "
    "replace models."
)


def serve(work: Path, studies: str, host: str, port: int) -> None:
    """Start the server; returns when it is stopped.

    Args:
        work: folder made by :func:`amkd_monai.label.workplace.prepare`.
        studies: folder of images, or address of a DICOMweb server.
        host: address to listen on.
        port: port to listen on.
    """
    if host not in LOOPBACK:
        print(WARNING.format(host=host), flush=True)
    # Read by MONAI Label when it is imported: no process that scores images after each request, no files elsewhere.
    os.environ.setdefault("MONAI_LABEL_AUTO_UPDATE_SCORING", "false")
    os.environ.setdefault("MONAI_LABEL_SESSION_PATH", str(work / "sessions"))
    from monailabel.main import Main
    from monailabel.utils.async_tasks.utils import background_executors, stop_background_task

    main = Main(actions=("start_server",))
    arguments = ["--app", str(work), "--studies", studies, "--host", host, "--port", str(port)]
    arguments += ["--uvicorn_app", "amkd_monai.label.web:app"]
    os.environ[SERVER] = str(os.getpid())
    try:
        main.action_start_server(main.args_parser().parse_args(["start_server", *arguments]))
    finally:  # the interpreter would wait for the end of a training
        for method, executor in background_executors.items():
            executor.shutdown(wait=False, cancel_futures=True)
            stop_background_task(method)


def end_with_server() -> None:
    """End this process, a trainer, as soon as the server that started it is gone, however that ended.

    What a trainer publishes appears whole or not at all, so that it may end at any moment.
    """
    server = int(os.environ.get(SERVER, os.getpid()))
    if server == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="end with server", daemon=True).start()
