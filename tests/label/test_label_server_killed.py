"""SIGKILL of server or trainer at any moment leaves whole files of one run, which the next server serves."""

from __future__ import annotations

import json
import os
import random
import time

import psutil
import pytest

from amkd_monai.weights import file_sha256, load_state_dict

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("AMKD_KILLS", "4"))
"""20 are proof enough for a release; each takes some ten seconds and more on a busy machine."""


def whole_files(model):
    """Each weight file of a model can be read; only the published ones lie beside the student."""
    folder = model / "models"
    names = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    assert names <= {"model.pt", "previous.pt", "student.json"}, names
    weights = [folder / name for name in names if name.endswith(".pt")]
    assert all(load_state_dict(file) for file in weights)
    return {file.name: file_sha256(file) for file in weights}


def served(server):
    """The students of the server, and an answer of one that is not trained meanwhile."""
    names = server.get("/info/").json()["models"].keys() - {"killed"}
    checksums = {name: server.get(f"/model/info/{name}").json()["checksum"] for name in names}
    return checksums, server.infer("busi", "busi0").content


def test_random_kills_of_server_and_trainer_leave_whole_files_of_one_run(lab, record_property):
    server, model, chance = lab.server, lab.work / "model" / "killed", random.Random(0)
    for image in lab.images["busi"][:3]:
        assert lab.put_label(image, lab.mask(image)).status == 200
    labels = server.get("/info/").json()["datastore"]["completed"]
    start = time.perf_counter()
    state = server.train("killed", max_epochs=1, learning_rate_scale=4)
    length = time.perf_counter() - start
    assert state["status"] == "DONE", state["details"]
    published, records, outlived = {whole_files(model)["model.pt"]}, 0, []
    for number in range(KILLS):
        is_server = number % 4 == 3  # a start takes long
        assert server.post_json("/train/killed", {"max_epochs": 1, "learning_rate_scale": 4}).status == 200
        deadline = time.monotonic() + 60
        while not (processes := server.trainers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.1 * length))
        if is_server:
            before = served(server)
            server.kill()
            start = time.perf_counter()
            _, alive = psutil.wait_procs(processes, timeout=30)
            outlived.append(time.perf_counter() - start)
            assert not alive, f"the trainer outlives the server (kill {number})"
        else:
            for process in processes:
                if process.is_running():
                    process.kill()
            psutil.wait_procs(processes, timeout=30)
        hashes = whole_files(model)
        record = json.loads((model / "fine_tuning.json").read_text())
        assert hashes["model.pt"] in published | {record["student"]}, "a model of no finished run"
        published.add(hashes["model.pt"])
        if is_server:
            server.start()
            assert whole_files(model) == hashes and served(server) == before, "a restart keeps every student"
        deadline = time.monotonic() + 60
        while server.trainers() and time.monotonic() < deadline:
            time.sleep(0.1)
        info = server.get("/info/").json()
        stats = info["train_stats"]["killed"]
        assert stats == (record if record["student"] == hashes["model.pt"] else {}), "figures of another student"
        records += bool(stats)
        assert info["datastore"]["completed"] == labels
        assert server.infer("killed", "busi0").status == 200
    record_property("seconds outlived", outlived)
    print(f"a training takes {length:.1f} s; trainers end {max(outlived):.1f} s after their server; {records} records")
    state = server.train("killed", max_epochs=1)
    assert state["status"] == "DONE", state["details"]
    assert {f.name for f in (model / "models").iterdir()} <= {"model.pt", "previous.pt", "student.json"}, (
        "nothing half-written is left"
    )
