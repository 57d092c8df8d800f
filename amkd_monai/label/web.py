"""MONAI Label's web application, changed in two things; the server imports ``app`` by name.

Its exceptions become JSON answers, and web pages of other origins may not read answers: MONAI Label allows all of them.
"""

from __future__ import annotations

import json

from fastapi import Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from monailabel.app import app
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException

__all__ = ["app"]

app.user_middleware[:] = [entry for entry in app.user_middleware if entry.cls is not CORSMiddleware]


@app.exception_handler(MONAILabelException)
async def _refused(request: Request, error: MONAILabelException) -> JSONResponse:
    missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
    return JSONResponse({"detail": error.msg}, status_code=404 if missing else 400)


@app.exception_handler(json.JSONDecodeError)
async def _not_json(request: Request, error: json.JSONDecodeError) -> JSONResponse:
    return JSONResponse({"detail": f"A parameter is not JSON: {error}."}, status_code=400)
