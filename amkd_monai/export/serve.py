"""An exported student over HTTP: ``POST /predict`` and its page, by FastAPI and Uvicorn.

The preprocessing, the network and the files of answers are those of ``predict``. Nothing of a request becomes a path.
"""

import gzip
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, UploadFile
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amkd_monai import __version__
from amkd_monai.errors import root_cause
from amkd_monai.export.predict import Predictor, refusals
from amkd_monai.files.cases import read_case
from amkd_monai.files.names import expanded
from amkd_monai.files.pictures import read_picture, write_mask
from amkd_monai.files.volumes import write_mask_volume

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KINDS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\0": ".tif", b"MM\0*": ".tif", b"BM": ".bmp"}
"""Suffix by the first bytes of a picture: the name that a client gives decides nothing."""
UNPACKED = 20
"""Times its packed size that a volume may have."""
CHUNK = 2**20


HEADERS = (
    *((b"cross-origin-opener-policy", b"same-origin"), (b"cross-origin-embedder-policy", b"require-corp")),
    (b"x-content-type-options", b"nosniff"),
)
"""Of every answer; with the first two the page may use threads."""


class Guarded:
    """ASGI middleware that refuses bodies above a size, by their stated length or else as they come in."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        stated, received = dict(scope["headers"]).get(b"content-length", b"0"), 0
        detail = f"The upload is larger than {self.limit / 1e6:g} MB: use `predict`, or serve with a larger --limit."

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise HTTPException(413, detail)
            return message

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        if stated.isdigit() and int(stated) > self.limit:
            return await JSONResponse({"detail": detail}, 413, {"Connection": "close"})(scope, receive, marked)
        await self.app(scope, counted, marked)


def application(model: str | Path, int8: bool, threads: int | None, limit: int, hosts: tuple[str, ...]) -> FastAPI:
    """Return the web application of an exported student.

    Args:
        model: folder that ``export`` made.
        int8: use the network of 8 bits.
        threads: of ONNX Runtime; None leaves it to choose.
        limit: largest upload, bytes.
        hosts: names under which requests may come, so that other web pages cannot reach a local server by a name of
            their own; ``*`` for all.

    Raises:
        ValueError: no exported student, or one of another version.
    """
    folder = expanded(model)
    predictor = Predictor(folder, int8, threads)
    if (channels := predictor.config.get("channels", 1)) > 1 and predictor.config["dimensions"] == 2:
        raise ValueError(f"{folder} takes {channels} files an image, a request holds one: use `predict`.")
    config, turn = predictor.config, threading.Semaphore(2)  # a third answer at a time would only take memory
    title = f"Student {config['task']}: research only, not for clinical use"
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None)  # their pages load from a CDN
    app.add_middleware(Guarded, limit=limit)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.get("/model")
    def describe() -> dict[str, Any]:
        """What the student takes and answers."""
        keys = ("task", "kind", "dimensions", "classes", "version", "run")
        return {**{key: config[key] for key in keys}, "intended": "research only, NOT FOR CLINICAL USE"}

    described: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/png": {}, "application/gzip": {}, "application/json": {}}},
        413: {"description": "larger than the limit"},
        415: {"description": "not the student's kind of file"},
        422: {"description": "a file that cannot be used, and why"},
    }
    unusable: tuple[type[Exception], ...] = (ValueError, OSError, MemoryError, *refusals())

    @app.post("/predict", response_class=Response, responses=described)
    def predict(file: Annotated[UploadFile, "a picture (PNG, JPEG, TIFF, BMP) or a NIfTI volume"]) -> Response:
        """Answer one file: a mask of its size and geometry (PNG or .nii.gz), or the probability of each class."""
        with turn, tempfile.TemporaryDirectory() as place:
            upload = Path(place) / "upload"
            try:
                return _answer(predictor, _stored(file, upload, config["dimensions"], limit), Path(place))
            except unusable as error:
                reason = str(root_cause(error)) or "it does not fit into memory"
                sentence = " ".join(reason.split())
                for path in (f"{upload}.nii", *(f"{upload}{suffix}" for suffix in KINDS.values())):
                    sentence = sentence.replace(path, "The file")
                raise HTTPException(422, sentence) from error

    home = "/openapi.json"
    if (folder / "web" / "index.html").is_file():
        app.mount("/page", StaticFiles(directory=folder / "web", html=True))
        home = "/page/"
    app.add_api_route("/", lambda: RedirectResponse(home), include_in_schema=False)
    return app


def _stored(file: UploadFile, upload: Path, dimensions: int, limit: int) -> Path:
    """Store an upload under a name of its own, a volume unpacked."""
    head = file.file.read(348)
    file.file.seek(0)
    suffix = next((suffix for start, suffix in KINDS.items() if head.startswith(start)), "")
    if dimensions == 2 and not suffix:
        raise HTTPException(415, "The student takes pictures (PNG, JPEG, TIFF, BMP), which this file is not.")
    packed = head.startswith(b"\x1f\x8b")
    if dimensions == 3 and (
        suffix or not (packed or head[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c"))
    ):
        raise HTTPException(415, "The student takes NIfTI volumes (.nii, .nii.gz), which this file is not.")
    path = upload.with_suffix(suffix or ".nii")
    source: Any = gzip.GzipFile(fileobj=file.file, mode="rb") if packed else file.file
    written = 0
    with path.open("wb") as target:
        try:
            while part := source.read(CHUNK):
                if (written := written + target.write(part)) > UNPACKED * limit:
                    raise HTTPException(413, f"The volume unpacks to more than {UNPACKED * limit / 1e6:g} MB.")
        except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:  # type: ignore[attr-defined]
            raise HTTPException(422, "The file is damaged or cut short: replace it by an intact copy.") from error
    return path


def _answer(predictor: Predictor, path: Path, place: Path) -> Response:
    config, result = predictor.config, place / "answer"
    if config["dimensions"] == 3:
        volume, grid = read_case([path], config.get("channels", 1))
        write_mask_volume(result, predictor.mask(volume, grid), grid)
        return Response(result.read_bytes(), media_type="application/gzip", headers=_named("mask.nii.gz"))
    array = read_picture(path).transpose(2, 0, 1).astype(np.float32)
    if config["kind"] != "segmentation":
        answer = predictor.probabilities(array)[0]
        names = dict(zip(config["classes"], (round(float(p), 6) for p in answer), strict=True))
        return JSONResponse({"class": predictor.named(answer), "probabilities": names})
    write_mask(result, predictor.mask(array), len(config["classes"]))
    return Response(result.read_bytes(), media_type="image/png", headers=_named("mask.png"))


def _named(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def serve(model: str, host: str, port: int, limit: float, int8: bool, threads: int | None) -> None:
    """Serve an exported student until the process is ended; ``limit`` is the largest upload in MB."""
    hosts = LOOPBACK if host in LOOPBACK else ("*",)
    app = application(model, int8, threads, round(limit * 1e6), hosts)
    print(f"http://{host}:{port}/ research only, NOT FOR CLINICAL USE; end it by Ctrl+C", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
