"""An exported student over HTTP: ``POST /predict`` and its page, by FastAPI and Uvicorn.

The preprocessing, the network and the files of answers are those of ``predict``. Nothing of a request becomes a path.
"""

import gzip
import tempfile
import threading
import zlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware

from amkd_monai import __version__
from amkd_monai.errors import root_cause
from amkd_monai.export.predict import Predictor, refusals
from amkd_monai.files.names import DICOM_SUFFIX
from amkd_monai.files.pictures import write_mask
from amkd_monai.files.volumes import write_mask_volume

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PICTURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\0": ".tif", b"MM\0*": ".tif", b"BM": ".bmp"}
DICOM = b"DICM"  # behind 128 bytes of any content, which may look like another kind of file
PACKED = b"\x1f\x8b"
VOLUMES = dict.fromkeys((PACKED, b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c"), ".nii")
"""Suffix by the first bytes of a file: the name that a client gives decides nothing."""
UNPACKED = 20  # times its packed size that a volume may have
HEADERS = {
    **{"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"},
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer; with the first two the page may use threads."""


def application(predictor: Predictor, limit: int, hosts: Sequence[str]) -> FastAPI:
    """Return the web application of an exported student; one of several pictures an image is a ValueError.

    ``limit`` is the largest upload, bytes; requests may come under the names ``hosts``, ``*`` for all, so that other
    web pages cannot reach a local server by a name of their own.
    """
    config, turn = predictor.config, threading.Semaphore(2)  # a third answer at a time would only take memory
    if predictor.channels > 1 and config["dimensions"] == 2:
        raise ValueError(f"{predictor.folder} takes {predictor.channels} files an image, a request one: use `predict`.")
    title = f"Student {config['task']}: research only, not for clinical use"
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None)  # their pages load from a CDN
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.middleware("http")
    async def guarded(request: Request, pass_on: Callable[[Request], Awaitable[Response]]) -> Response:
        stated, remedy = request.headers.get("content-length", "0"), "use `predict`, or serve with a larger --limit"
        status, detail = 413, f"The upload is larger than {limit / 1e6:g} MB: {remedy}."
        if "transfer-encoding" in request.headers or not stated.isdigit():
            status, detail = 411, "The upload does not state its length: send Content-Length."
        if status == 411 or int(stated) > limit:  # nothing of it is read
            answer: Response = JSONResponse({"detail": detail}, status, {"Connection": "close"})
        else:
            answer = await pass_on(request)
        answer.headers.update(HEADERS)
        return answer

    @app.exception_handler(RequestValidationError)
    async def without_file(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": "The request holds no file: send a form whose field `file` is one."}, 422)

    @app.get("/model")
    def describe() -> dict[str, Any]:
        """What the student takes and answers."""
        keys = ("task", "kind", "dimensions", "classes", "version", "run")
        return {**{key: config[key] for key in keys}, "intended": "research only, NOT FOR CLINICAL USE"}

    described: dict[int | str, dict[str, Any]] = {
        200: {"content": {"image/png": {}, "application/gzip": {}, "application/json": {}}},
        411: {"description": "no stated length"},
        413: {"description": "larger than the limit"},
        415: {"description": "not the student's kind of file"},
        422: {"description": "a file that cannot be used, and why"},
    }

    @app.post("/predict", response_class=Response, responses=described)
    def predict(file: Annotated[list[UploadFile], "a picture (PNG, JPEG, TIFF, BMP, DICOM) or volume"]) -> Response:
        """Answer one file: a mask of its size and geometry (PNG or .nii.gz), or the probability of each class."""
        if len(file) > 1:
            raise HTTPException(422, f"The request holds {len(file)} files: send one a request.")
        with turn, tempfile.TemporaryDirectory() as place:
            path = _stored(file[0], Path(place) / "upload", config["dimensions"], limit)
            try:
                return _answer(predictor, path, Path(place) / "answer")
            except refusals() as error:
                reason = " ".join(str(root_cause(error)).split()) or "it does not fit into memory"
                raise HTTPException(422, reason.replace(str(path), "The file")) from error

    home = "/openapi.json"
    if (predictor.folder / "web" / "index.html").is_file():
        app.mount("/page", StaticFiles(directory=predictor.folder / "web", html=True))
        home = "/page/"
    app.add_api_route("/", lambda: RedirectResponse(home), include_in_schema=False)
    return app


def _stored(file: UploadFile, upload: Path, dimensions: int, limit: int) -> Path:
    """Store an upload under a name of its own, a volume unpacked."""
    pictures, volumes = (PICTURES, "pictures (PNG, JPEG, TIFF, BMP, DICOM)"), (VOLUMES, "NIfTI volumes (.nii, .nii.gz)")
    known, taken = pictures if dimensions == 2 else volumes
    head = file.file.read(132)
    file.file.seek(0)
    suffix = next((suffix for start, suffix in known.items() if head.startswith(start)), "")
    if head[128:] == DICOM:
        suffix = DICOM_SUFFIX if dimensions == 2 else ""
    if not suffix:
        raise HTTPException(415, f"The student takes {taken}, which this file is not.")
    source: Any = gzip.GzipFile(fileobj=file.file, mode="rb") if head.startswith(PACKED) else file.file
    written, path = 0, upload.with_suffix(suffix)
    with path.open("wb") as target:
        try:
            while part := source.read(2**20):
                if (written := written + target.write(part)) > UNPACKED * limit:
                    raise HTTPException(413, f"The volume unpacks to more than {UNPACKED * limit / 1e6:g} MB.")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise HTTPException(422, "The file is damaged or cut short: replace it by an intact copy.") from error
    return path


def _answer(predictor: Predictor, path: Path, result: Path) -> Response:
    (_, grid, answer), classes = predictor.answered(predictor.images(path)[0]), predictor.config["classes"]
    if predictor.config["kind"] != "segmentation":
        names = dict(zip(classes, (round(float(p), 6) for p in answer), strict=True))
        return JSONResponse({"class": predictor.named(answer), "probabilities": names})
    if grid is None:
        write_mask(result, answer, len(classes))
    else:
        write_mask_volume(result, answer, grid)
    kind, name = ("image/png", "mask.png") if grid is None else ("application/gzip", "mask.nii.gz")
    return Response(result.read_bytes(), 200, {"Content-Disposition": f'attachment; filename="{name}"'}, kind)


def serve(predictor: Predictor, host: str, port: int, limit: float) -> None:
    """Serve an exported student until the process is ended; ``limit`` is the largest upload in MB."""
    app = application(predictor, round(limit * 1e6), LOOPBACK if host in LOOPBACK else ("*",))
    print(f"http://{host}:{port}/ research only, NOT FOR CLINICAL USE; end it by Ctrl+C", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
