"""Makes the tests' own helpers importable and keeps every test off the network and on one thread."""

from __future__ import annotations

import ctypes
import gc
import locale
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.modules.setdefault("transformers", None)  # MONAI imports it if it can, which takes a second: see `helpers.needs`
for folder in (Path(__file__).parent, Path(__file__).parent / "bundles"):
    sys.path.insert(0, str(folder))

CHARACTERS = locale.setlocale(locale.LC_CTYPE)


@pytest.fixture(autouse=True)
def characters_of_the_start():
    """Some library sets the C locale for its whole process, in which texts are read as ASCII: each test starts anew."""
    locale.setlocale(locale.LC_CTYPE, CHARACTERS)


@pytest.fixture(autouse=True, scope="module")
def memory_is_given_back():
    """Return what a file's tests held to the system: full-size teachers would leave 5 GB in each worker."""
    yield
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def students(tmp_path_factory):
    """Train and evaluate a task's small student of phantoms, once; return the folder of its run and its settings."""
    from bundle_runs import small_student

    done = {}

    def get(task):
        if task not in done:
            folder = tmp_path_factory.mktemp(task)
            done[task] = folder, small_student(task, folder)
        return done[task]

    return get


@pytest.fixture(scope="session")
def finding_bundle(tmp_path_factory):
    """A bundle of several findings per picture, trained without teachers; its data lie in ``data`` beside it."""
    import monai.bundle
    from own_data import finding_pictures

    from amkd_monai.bundles.new import new_bundle

    folder = tmp_path_factory.mktemp("findings")
    bundle, _ = new_bundle("chest", finding_pictures(folder / "data"), folder)
    quick = {"teachers": [], "max_epochs": 4, "recipe#batch_size": 8, "recipe#min_steps": 1, "bundle_root": str(bundle)}
    monai.bundle.run(run_id="training", config_file=str(bundle / "configs" / "train.json"), **quick)
    return bundle


FIRST = ("export", "label", "report", "bundles", "engines", "runs", "docs", "teachers")
"""Folders of the longest tests, which two workers share best from the start. The export comes first of all: torch's
ONNX exporter has died in a process that had run hundreds of other tests."""

TOGETHER = ("export", "label", "report")
"""Folders that one worker runs, since all their files use what is trained for the session."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: next((n for n, folder in enumerate(FIRST) if folder == item.path.parent.name), len(FIRST))
    )


def pytest_collection_finish():
    """Leave what the imports made out of every later collection: these would take 0.4 s each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a file to one worker, so that its fixtures are made once; pytest-xdist 3.8 loses groups under pytest 9."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return next((folder for folder in TOGETHER if f"/{folder}/" in file), file)

    return ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem):
    """End the run at once: other workers would go on for minutes before the test is named."""
    pytest.exit(f"a worker died in {crashitem}", returncode=1)
