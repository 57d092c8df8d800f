"""The web server: MONAI Label's own, with errors as JSON, for this machine alone unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")

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

    main = Main(actions=("start_server",))
    arguments = ["--app", str(work), "--studies", studies, "--host", host, "--port", str(port)]
    arguments += ["--uvicorn_app", "amkd_monai.label.web:app"]
    main.action_start_server(main.args_parser().parse_args(["start_server", *arguments]))
