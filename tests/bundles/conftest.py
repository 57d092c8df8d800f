"""One cache for the runs of a session: phantoms, decoded images and teacher outputs of one bundle are made once."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")
