"""Uploads lose nothing, trainings that cannot work never start, and SIGKILL at any moment leaves whole files."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import shared_data
from label_server import LabelServer
from PIL import Image

from amkd_monai.weights import load_state_dict, state_hash

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("AMKD_KILLS", "4"))
"""20 are proof enough for a release; each takes some ten seconds and more on a busy machine."""
MODELS = ("busi", "msd_heart", "aptos2019")


def png(picture):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def other_picture(file, value=90):
    return png(np.full_like(np.asarray(Image.open(file).convert("RGB")), value))


class Desk:
    """A server of its own with six ultrasound pictures and a volume; nothing of it is shared with other tests."""

    def __init__(self, bundles, folder):
        self.studies, self.work = folder / "studies", folder / "work"
        self.studies.mkdir()
        shutil.copy(shared_data("MSD-Heart", "Task02_Heart_half", "imagesTr", "la_003.nii.gz"), self.studies)
        breasts = shared_data("BUSI", "Dataset_BUSI_with_GT", "malignant")
        self.pictures = []
        for number, file in enumerate(sorted(f for f in breasts.glob("*.png") if "mask" not in f.name)[:6]):
            self.pictures.append(Path(shutil.copy(file, self.studies / f"busi{number}.png")))
        self.server = LabelServer([bundles[name] for name in MODELS], self.studies, self.work)

    def put_image(self, name, content, file="x.png", **params):
        return self.server.send(f"/datastore/image?image={name}", "PUT", json.dumps(params), file=(file, content))

    def put_label(self, name, content, file="mask.png", tag="final"):
        return self.server.send(f"/datastore/label?image={name}&tag={tag}", "PUT", label=(file, content))

    def label(self, picture, kind):
        """A mask of nearly the whole picture, or of half of it."""
        width, height = Image.open(picture).size
        mask = np.ones((height, width), np.uint8)
        mask[: height // 8] = 0
        mask[: height // 2 if kind == "half" else 0] = 0
        return png(mask)

    def kept(self):
        folder = self.studies / "replaced"
        return {f.relative_to(folder).parts[1:]: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def desk(bundles, tmp_path_factory):
    desk = Desk(bundles, tmp_path_factory.mktemp("desk"))
    desk.server.start()
    yield desk
    desk.server.stop()


def refused(answer, *words):
    assert (answer.status, answer.kind) == (400, "application/json"), answer
    assert all(word in answer.json()["detail"] for word in words), answer.json()


def test_info_answers_within_a_second_while_eight_inferences_run(desk, record_property):
    volume = [("msd_heart", "la_003")] * 8
    desk.server.infer(*volume[0])
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(desk.server.infer, *asked) for asked in volume]
        times = []
        while not all(task.done() for task in running):
            start = time.perf_counter()
            assert desk.server.get("/info/").status == 200
            times.append(time.perf_counter() - start)
            time.sleep(0.05)
        answers = [task.result() for task in running]
    record_property("slowest", max(times))
    print(f"{len(times)} answers, the slowest after {max(times):.3f} s")
    assert {answer.status for answer in answers} == {200} and len({answer.content for answer in answers}) == 1
    assert len(times) > 3 and max(times) < 1


def test_an_upload_never_replaces_an_image_unless_it_says_so(desk):
    file = desk.pictures[5]
    original, other = file.read_bytes(), other_picture(file)
    label = desk.label(file, "whole")
    assert desk.put_label("busi5", label).status == 200
    for name in ("x.png", "x.jpg", "x.bmp"):
        stream = io.BytesIO()
        Image.open(io.BytesIO(other)).save(stream, Path(name).suffix.replace(".jpg", ".jpeg")[1:])
        refused(desk.put_image("busi5", stream.getvalue(), name), "busi5", "overwrite")
    refused(desk.put_image("busi5", other, overwrite="yes"), "overwrite")
    assert desk.server.get("/datastore/image?image=busi5").content == original == file.read_bytes()
    assert desk.put_image("busi5", original).json() == {"image": "busi5"}, "the same file again changes nothing"
    assert desk.server.get("/datastore/label?label=busi5&tag=final").content == label and not desk.kept()

    assert desk.put_image("busi5", other, overwrite=True).status == 200
    assert desk.server.get("/datastore/image?image=busi5").content == other
    assert desk.server.get("/datastore/label?label=busi5&tag=final").status == 404, "a label belongs to its image"
    assert desk.kept() == {("busi5.png",): original, ("labels", "final", "busi5.png"): label}
    listed = desk.server.get("/datastore/?output=all").json()["objects"]
    assert set(listed) == {"la_003", *(p.stem for p in desk.pictures)}, "what is kept is not listed"
    new = desk.put_image("new", other)
    assert new.status == 200 and (desk.studies / "new.png").read_bytes() == other
    assert desk.server.send("/datastore/image?id=new", "DELETE").status == 200


def test_an_image_that_is_not_listed_is_not_replaced_either(desk):
    hidden = desk.studies / "hidden.PNG"
    hidden.write_bytes(desk.pictures[0].read_bytes())
    refused(desk.put_image("hidden", other_picture(hidden), "x.PNG"), "hidden", "overwrite")
    assert hidden.read_bytes() == desk.pictures[0].read_bytes()
    hidden.unlink()


def test_a_final_label_that_is_replaced_is_kept(desk):
    first, second = (desk.label(desk.pictures[4], kind) for kind in ("whole", "half"))
    before = len(desk.kept())
    for content in (first, first, second):
        assert desk.put_label("busi4", content).status == 200
        assert desk.server.get("/datastore/label?label=busi4&tag=final").content == content
    assert len(desk.kept()) == before + 1 and desk.kept()[("labels", "final", "busi4.png")] == first
    assert desk.put_label("busi4", b'{"class": "mild"}', "class.json").status == 200  # of another suffix
    assert len(list((desk.studies / "replaced").glob("*/labels/final/busi4.png"))) == 2
    assert [f.name for f in (desk.studies / "labels" / "final").glob("busi4.*")] == ["busi4.json"]
    assert desk.server.send("/datastore/label?id=busi4&tag=final", "DELETE").status == 200


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("msd_heart", {}, ["too few", "msd_heart"]),
        ("busi", {"max_epochs": "many"}, ["max_epochs", "'many'"]),
        ("busi", {"max_epochs": -3}, ["max_epochs", "-3"]),
        ("busi", {"max_epochs": 0}, ["max_epochs"]),
        ("busi", {"max_epochs": 1.5}, ["max_epochs", "1.5"]),
        ("busi", {"max_epochs": True}, ["max_epochs"]),
        ("busi", {"max_epochs": None}, ["max_epochs"]),
        ("busi", {"max_epochs": []}, ["max_epochs"]),
        ("busi", {"max_epochs": float("nan")}, ["max_epochs", "nan"]),
        ("busi", {"max_epochs": float("inf")}, ["max_epochs", "inf"]),
        ("busi", {"learning_rate_scale": float("nan")}, ["learning_rate_scale"]),
        ("busi", {"learning_rate_scale": "fast"}, ["learning_rate_scale"]),
        ("busi", {"val_split": 1.0}, ["val_split"]),
        ("busi", {"val_split": -0.5}, ["val_split"]),
        ("busi", {"teachers": "all"}, ["teachers", "all"]),
        ("busi", {"device": "abacus"}, ["device", "abacus"]),
        ("busi", {"max_epoch": 5}, ["max_epoch", "max_epochs"]),
        ("liver", {}, ["liver"]),
    ],
)
def test_a_training_that_cannot_work_is_refused_at_once(model, options, words, desk):
    refused(desk.server.post_json(f"/train/{model}", options), *words)
    refused(desk.server.post_json(f"/train/{model}?run_sync=true", options), *words)
    assert not desk.server.trainers() and desk.server.get("/train/").status == 404


def test_a_model_file_that_does_not_fit_is_refused_and_one_that_fits_keeps_the_old_one(desk, bundles):
    model = desk.work / "model" / "busi" / "models" / "model.pt"
    original = model.read_bytes()
    for content in (b"", b"<html>", original[:1000], (bundles["aptos2019"] / "models" / "model.pt").read_bytes()):
        refused(desk.server.send("/model/busi", "PUT", file=("model.pt", content)))
        assert model.read_bytes() == original
    assert desk.server.send("/model/busi", "PUT", file=("model.pt", original)).status == 200
    assert model.with_name("previous.pt").read_bytes() == original


def test_a_second_server_in_the_same_folder_is_refused(desk, bundles):
    second = LabelServer([bundles["busi"]], desk.studies, desk.work)
    before = (desk.work / "models.json").read_bytes()
    with pytest.raises(pytest.fail.Exception, match="held by another process"):
        second.start()
    assert (desk.work / "models.json").read_bytes() == before and desk.server.get("/info/").status == 200


def whole_files(model):
    """Each weight file of a model can be read; only the published ones lie beside the student."""
    folder = model / "models"
    names = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    assert names <= {"model.pt", "previous.pt", "student.json"}, names
    return {name: state_hash(load_state_dict(folder / name)) for name in names if name.endswith(".pt")}


def test_random_kills_of_server_and_trainer_leave_whole_files_of_one_run(bundles, tmp_path, record_property):
    desk, chance = Desk(bundles, tmp_path), random.Random(0)
    desk.server.start()
    model = desk.work / "model" / "busi"
    for number, file in enumerate(desk.pictures[:3]):
        assert desk.put_label(f"busi{number}", desk.label(file, "whole")).status == 200
    start = time.perf_counter()
    state = desk.server.train("busi", max_epochs=1, learning_rate_scale=4)
    length = time.perf_counter() - start
    assert state["status"] == "DONE", state["details"]
    published, records, outlived = {whole_files(model)["model.pt"]}, 0, []
    for number in range(KILLS):
        is_server = number % 4 == 3  # a start takes long
        assert desk.server.post_json("/train/busi", {"max_epochs": 1, "learning_rate_scale": 4}).status == 200
        deadline = time.monotonic() + 60
        while not (processes := desk.server.trainers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.1 * length))
        if is_server:
            desk.server.kill()
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
            desk.server.start()
        deadline = time.monotonic() + 60
        while desk.server.trainers() and time.monotonic() < deadline:
            time.sleep(0.1)
        info = desk.server.get("/info/").json()
        stats = info["train_stats"]["busi"]
        assert stats == (record if record["student"] == hashes["model.pt"] else {}), "figures of another student"
        records += bool(stats)
        assert info["datastore"]["completed"] == 3
        assert desk.server.infer("busi", "busi0").status == 200
    record_property("seconds outlived", outlived)
    print(f"a training takes {length:.1f} s; trainers end {max(outlived):.1f} s after their server; {records} records")
    state = desk.server.train("busi", max_epochs=1)
    assert state["status"] == "DONE", state["details"]
    assert {f.name for f in (model / "models").iterdir()} <= {"model.pt", "previous.pt", "student.json"}, (
        "nothing half-written is left"
    )
    desk.server.stop()
