"""`evaluate` of an exported student, without torch: the figures that the student itself has on the same folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from amkd_monai.cli import main
from amkd_monai.data.datasets import get_task
from amkd_monai.metrics.summary import read_case_csv

ALONE = (
    "import sys; from amkd_monai.cli import main; code = main(sys.argv[1:]); "
    "assert not {'torch', 'monai'} & set(sys.modules); sys.exit(code)"
)


@pytest.mark.parametrize("task", ["kvasir_seg", "msd_heart", "aptos2019"])
def test_an_exported_student_has_the_figures_of_the_student(task, exported, tmp_path, capsys):
    folder, words = exported(task)
    few = {"kvasir_seg": {"count": 10}, "msd_heart": {"cases": 2}, "aptos2019": {"count": 20, "unlabelled": 0}}
    other = get_task(task).write_phantom(tmp_path / "other", seed=11, **few[task])
    bundle, settings = words[0], [word for word in words[3:] if word.split("=")[1] in ("ckpt_dir", "cache_dir")]
    assert main(["evaluate", bundle, "--data", str(other), "--output", str(tmp_path / "student"), *settings]) == 0
    dist = ["evaluate", str(folder / "dist" / task), "--data", str(other), "--output", str(tmp_path / "dist")]
    if task == "kvasir_seg":
        subprocess.run([sys.executable, "-c", ALONE, *dist, "--threads", "1", "--quiet"], check=True, cwd=ROOT)
    else:
        assert main(dist) == 0
    student, alone = (tmp_path / name for name in ("student", "dist"))
    rows = [read_case_csv(at / "per_case.csv") for at in (student, alone)]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]]
    for key in ("dice", "iou") if task != "aptos2019" else ("p_no_dr",):
        differences = [abs(a[key] - b[key]) for a, b in zip(*rows, strict=True) if not np.isnan(a[key])]
        assert differences and max(differences) < 0.02
    a, b = (json.loads((at / "metrics.json").read_text()) for at in (student, alone))
    assert a["run"] == b["run"] and a["summary"]["metrics"].keys() == b["summary"]["metrics"].keys()
    assert a["seen"] == b["seen"] == {} and a["seen_is_known"] and b["seen_is_known"]
    assert (alone / "report.html").stat().st_size > 10_000 and any((alone / "previews").iterdir())
    assert main([*dist[:-1], str(student)]) == 1 and "another student" in capsys.readouterr().err


def test_images_of_the_training_and_bad_files_are_named(exported, tmp_path, capsys):
    folder, words = exported("kvasir_seg")
    own = next((folder / "cache" / "phantoms").glob("*/images")).parent
    dist = ["evaluate", str(folder / "dist" / "kvasir_seg"), "--output", str(tmp_path / "out"), "--data"]
    assert main([*dist, str(own)]) == 1
    assert "took part in the student's training" in capsys.readouterr().err
    assert main([*dist, str(own), "--seen", "apart"]) == 0
    scored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    record = json.loads((folder / "models" / "student.json").read_text())
    assert {f"train/{name}" for name in scored["seen"]["cases"]} >= {n for n in record["seen"][""] if n[:5] == "train"}
    copy = shutil.copytree(own, tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    first = sorted((copy / "masks").iterdir())[0]
    first.write_bytes(first.read_bytes()[:100])
    assert main([*dist, str(copy), "--seen", "apart"]) == 1
    assert first.name in capsys.readouterr().err and not (tmp_path / "out" / "metrics.json").exists()
    Image.new("L", (7, 7)).save(first)
    assert main([*dist, str(copy), "--seen", "apart"]) == 1
    assert first.name in capsys.readouterr().err
    masks = [np.asarray(Image.open(file).convert("L")) > 127 for file in sorted((own / "masks").iterdir())[:2]]
    values = masks[0] * np.uint8(255), masks[1] * np.uint8(1)
    values[1][:3, :3] = 255
    for file, mask in zip(sorted((copy / "masks").iterdir())[:2], values, strict=True):
        file.unlink()
        Image.fromarray(mask).save(file.with_suffix(".png"))
    assert main([*dist, str(copy), "--seen", "apart"]) == 1
    assert "255" in capsys.readouterr().err and not (tmp_path / "out" / "metrics.json").exists()
    (tmp_path / "empty").mkdir()
    for words in ([*dist, str(tmp_path / "empty")], [*dist, str(tmp_path / "none")], dist[:-1]):
        assert main(words) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "empty" in errors[-3] and "none" in errors[-2] and "--data" in errors[-1]
