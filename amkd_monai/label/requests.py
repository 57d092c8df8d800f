"""Errors as MONAI Label's server reports them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from monailabel.interfaces.exception import MONAILabelError, MONAILabelException

from amkd_monai.weights import CheckpointError


@contextlib.contextmanager
def answerable() -> Iterator[None]:
    """Turn this package's sentences about bad input into the error that the server answers with status 400."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        raise MONAILabelException(MONAILabelError.INVALID_INPUT, str(error)) from error
