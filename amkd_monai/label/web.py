"""MONAI Label's web application with its exceptions as JSON answers; the server imports ``app`` by name."""

from __future__ import annotations

import json

from fastapi import Request
from fastapi.responses import JSONResponse
from monailabel.app import app
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException

__all__ = ["app"]


@app.exception_handler(MONAILabelException)
async def _refused(request: Request, error: MONAILabelException) -> JSONResponse:
    missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
    return JSONResponse({"detail": error.msg}, status_code=404 if missing else 400)


@app.exception_handler(json.JSONDecodeError)
async def _not_json(request: Request, error: json.JSONDecodeError) -> JSONResponse:
    return JSONResponse({"detail": f"A parameter is not JSON: {error}."}, status_code=400)
