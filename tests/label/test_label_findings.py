"""Students of several findings on the real server: answers, labels and fine-tuning, also on DICOM pictures."""

from __future__ import annotations

import csv
import json
import shutil
import time

import monai.bundle
import numpy as np
import pytest
from label_server import LabelServer, label_python
from own_data import FINDINGS, dicom_picture
from PIL import Image

from amkd_monai.label.student import ServedStudent
from amkd_monai.metrics.summary import read_case_csv

pytestmark = pytest.mark.slow
COUNT = 12


@pytest.fixture(scope="module")
def chest(finding_bundle, tmp_path_factory):
    """A server of one student of findings and its studies; the last picture is DICOM."""
    label_python()
    folder = tmp_path_factory.mktemp("chest")
    studies, images = folder / "studies", finding_bundle.parent / "data" / "images"
    studies.mkdir()
    for number in range(COUNT):
        shutil.copy(images / f"{number:02d}.png", studies / f"x{number}.png")
    file = studies / f"x{COUNT - 1}.png"
    dicom_picture(file.with_suffix(".dcm"), np.asarray(Image.open(file)))
    file.unlink()
    server = LabelServer([finding_bundle], studies, folder / "work")
    server.start()
    yield server, studies
    server.stop()


def put(server, image, content):
    return server.send(f"/datastore/label?image={image}", "PUT", label=("label.json", json.dumps(content).encode()))


def test_findings_come_with_the_probabilities_of_offline_inference(chest, finding_bundle, tmp_path):
    server, studies = chest
    info = server.get("/info/").json()
    assert info["models"]["chest"]["labels"] == {name: number for number, name in enumerate(FINDINGS)}
    assert info["datastore"]["total"] == COUNT
    config = str(finding_bundle / "configs" / "inference.json")
    places = {"bundle_root": str(finding_bundle), "dataset_dir": str(studies), "output_dir": str(tmp_path)}
    monai.bundle.run(config_file=config, **places)
    offline, seen = {row["id"]: row for row in read_case_csv(tmp_path / "predictions.csv")}, set()
    for number in range(COUNT):
        answer, row = server.infer("chest", f"x{number}", "json").json(), offline[f"x{number}"]
        assert "prediction" in answer, answer
        scores = {entry["label"]: entry["score"] for entry in answer["prediction"]}
        expected = [row[f"p_{name}"] for name in ("mass", "fluid_level", "stripes")]
        assert list(scores) == FINDINGS and list(scores.values()) == pytest.approx(expected, abs=1e-5)
        assert answer["class"] == row["class"]
        assert answer["findings"] == {name: score >= 0.5 for name, score in scores.items()}
        seen.add(answer["class"])
    assert len(seen) > 2
    student = ServedStudent(finding_bundle)
    unsure = {f"x{n}": student.uncertainty(next(studies.glob(f"x{n}.*"))) for n in range(COUNT)}
    broken = studies / "broken.png"
    broken.write_bytes(b"no picture")
    for total in (COUNT + 1, COUNT):  # one that cannot be read has no score, and keeps no other from its own
        end = time.monotonic() + 20
        while server.get("/info/").json()["datastore"]["total"] != total:  # the server watches the folder
            assert time.monotonic() < end, f"there are not {total} images"
            time.sleep(0.2)
        chosen = server.post_json("/activelearning/uncertainty_chest").json()
        assert chosen["id"] == max(unsure, key=unsure.get)
        assert chosen["uncertainty"] == pytest.approx(max(unsure.values()))
        broken.unlink(missing_ok=True)


def test_labels_of_other_names_or_forms_are_refused(chest):
    server, _ = chest
    whole = dict.fromkeys(FINDINGS, False)
    wrong = [
        ({"findings": {"mass": True}}, "not all and only the findings mass, Fluid level, stripes"),
        ({"findings": {**whole, "rib": True}}, "rib"),
        ({"findings": {**whole, "mass": "yes"}}, "must be JSON"),
        ({"findings": {**whole, "mass": 2}}, "must be JSON"),
        ({"findings": ["mass"]}, "must be JSON"),
        ({"findings": whole, "class": "none"}, "not among the classes (none is served)"),
        ({"class": "mass"}, "not among the classes (none is served)"),
    ]
    for content, word in wrong:
        answer = put(server, "x0", content)
        assert answer.status == 400 and word in answer.json()["detail"], (content, answer)
    assert server.get("/info/").json()["datastore"]["completed"] == 0


def test_saved_findings_train_the_student(chest, finding_bundle):
    server, _ = chest
    with (finding_bundle.parent / "data" / "labels.csv").open() as file:
        truth = [{name: row[name] == "1" for name in FINDINGS} for row in csv.DictReader(file)][:COUNT]
    present = next(n for n, row in enumerate(truth) if row["mass"])
    for number in (present, next(n for n, row in enumerate(truth) if not row["mass"])):
        assert put(server, f"x{number}", {"findings": truth[number]}).status == 200
    refused = server.post_json("/train/chest", {"max_epochs": 1})
    assert refused.status == 400 and "two images with and two without" in refused.json()["detail"]
    for number, row in enumerate(truth):  # turned round, so that an epoch is better than the student was
        label = {"findings": {name: int(not value) for name, value in row.items()}}
        assert put(server, f"x{number}", label).status == 200
    checksum = server.get("/model/info/chest").json()["checksum"]
    state = server.train("chest", max_epochs=4, learning_rate_scale=2.0)
    assert state["status"] == "DONE", "\n".join(state["details"][-12:])
    stats = server.get("/info/").json()["train_stats"]["chest"]
    assert stats["train"] + stats["validation"] == COUNT and 2 <= stats["validation"] <= COUNT // 2
    assert stats["best_metric"] > stats["metric_before"] and stats["metric"] == "macro_auroc"
    assert server.get("/model/info/chest").json()["checksum"] != checksum
    answer = server.infer("chest", "x0", "json").json()
    assert len(answer["prediction"]) == 3
