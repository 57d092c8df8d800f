"""Weight files are looked for in a fixed order, and downloaded only when asked for."""

import pytest
import torch
from safetensors.torch import save_file

from amkd_monai.__main__ import main
from amkd_monai.teachers.catalogue import CATALOGUE, CatalogueEntry, entry, find_weights, status


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The four places, best first; the last one is laid out like huggingface_hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMKD_WEIGHTS", str(tmp_path / "named"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0a1b")
    snapshot = repository / "snapshots" / "0a1b"
    folders = [tmp_path / "argument", tmp_path / "named", tmp_path / "weights", snapshot]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def find(argument):
    teacher = CatalogueEntry("x", "x", ("a.pth", "b.pth"), "", "", hub="owner/name", hub_files=("a.pth",))
    return find_weights(teacher, argument)


def test_the_first_place_that_has_a_file_wins(places):
    assert find(places[0]) is None
    for folder in reversed(places):
        (folder / "a.pth").touch()
        assert find(places[0]).resolve() == folder / "a.pth"
    (places[0] / "a.pth").rename(places[0] / "b.pth")
    assert find(places[0]) == places[0] / "b.pth"


def test_the_catalogue_says_what_was_found(places, capsys):
    medsam = entry("medsam")
    assert status(medsam, str(places[0])) == "weights missing"
    save_file({"w": torch.zeros(1)}, places[0] / "medsam_vit_b.pth")
    assert status(medsam, str(places[0])) == "usable"
    assert main(["teachers", "--weights_dir", str(places[0])]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("MedSAM"))
    assert "usable" in line and "Apache-2.0" in line


def test_a_teacher_is_named_by_key_or_kind():
    assert entry("retfound").key == "retfound_mae_natureCFP"
    assert entry("retfound_mae_natureOCT").files[0] == "RETFound_mae_natureOCT.pth"
    keys = [e.key for e in CATALOGUE if e.key]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match=r"'timm'.*medsam"):
        entry("timm")


def test_fetching_offline_or_what_is_not_on_the_hub_is_one_sentence(places, capsys):
    for teacher, word in (("medsam", "cannot be reached"), ("usfm", "by hand"), ("oracle", "oracle")):
        assert main(["fetch", teacher]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and word in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("status_code", "headers", "word"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "HF_TOKEN"),
        (401, {"X-Error-Code": "RepoNotFound"}, "access is denied"),
        (404, {"X-Error-Code": "EntryNotFound"}, "has none of"),
    ],
)
def test_what_the_hub_answers_becomes_a_sentence(status_code, headers, word, places, tmp_path):
    """A local server in the hub's place."""
    import subprocess
    import sys
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status_code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        import os

        from helpers import ROOT

        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        ended = subprocess.run(
            [sys.executable, "-m", "amkd_monai", "fetch", "retfound"], capture_output=True, text=True, env=environment
        )
    finally:
        server.shutdown()
    assert ended.returncode == 1 and not torch.is_tensor(ended)
    assert ended.stderr.startswith("error: ") and word in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
