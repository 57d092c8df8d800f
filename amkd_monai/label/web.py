"""MONAI Label's web application, changed in four points; the server imports ``app`` by name.

Refusals become JSON answers. Web pages of other origins may not read answers: MONAI Label allows all of them. Slow
requests run in threads: MONAI Label answers one after the other, ``/info`` after all inferences. A training that cannot
work, and a model file that does not fit, are refused before anything is started or replaced.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, UploadFile
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from monailabel.app import app
from monailabel.config import settings
from monailabel.endpoints import activelearning, batch_infer, datastore, infer, scoring, session, train, wsi_infer
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from monailabel.interfaces.utils.app import app_instance

from amkd_monai.weights import CheckpointError

__all__ = ["app"]

app.user_middleware[:] = [entry for entry in app.user_middleware if entry.cls is not CORSMiddleware]


@app.exception_handler(MONAILabelException)
@app.exception_handler(ValueError)
@app.exception_handler(CheckpointError)
async def _refused(request: Request, error: Exception) -> JSONResponse:
    missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
    detail = error.msg if isinstance(error, MONAILabelException) else str(error)
    return JSONResponse({"detail": detail}, status_code=404 if missing else 400)


@app.exception_handler(json.JSONDecodeError)
async def _not_json(request: Request, error: json.JSONDecodeError) -> JSONResponse:
    return JSONResponse({"detail": f"A parameter is not JSON: {error}."}, status_code=400)


def _in_thread(endpoint: Callable[..., Coroutine]) -> Callable[..., Any]:
    """Return a plain function with an endpoint's parameters: FastAPI runs those in a thread, beside its event loop."""

    def call(**values: Any) -> Any:
        if endpoint in (train.api_run_model, train.api_run):
            app_instance().check_training(values.get("model"), values["params"])
        return asyncio.run(endpoint(**values))

    call.__name__, call.__doc__ = endpoint.__name__, endpoint.__doc__
    call.__signature__ = inspect.signature(endpoint)  # type: ignore[attr-defined]
    return call


_Annotator = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))]
_first = APIRouter(include_in_schema=False)  # MONAI Label describes the same routes


@_first.put("/model/{model}")
def _upload_model(model: str, file: UploadFile, user: _Annotator) -> dict[str, Any]:
    return dict(app_instance().upload_model(model, file.file))


for _module in (activelearning, batch_infer, datastore, infer, scoring, session, train, wsi_infer):
    for _route in _module.router.routes:
        if not {"GET", "HEAD"} & _route.methods:
            _first.add_api_route(_route.path, _in_thread(_route.endpoint), methods=_route.methods)
app.include_router(_first)
app.router.routes.insert(0, app.router.routes.pop())  # the first route that fits a request answers it
