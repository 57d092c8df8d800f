"""`score`: masks of other programs against references, the figures compared with plain NumPy."""

import csv
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT, shared_data
from PIL import Image
from scipy.ndimage import distance_transform_edt

from amkd_monai.cli import main

COUNT = 6


def rows_of(folder):
    with (folder / "per_case.csv").open() as file:
        return list(csv.DictReader(file))


def surface(mask):
    padded, inner = np.pad(mask, 1), np.ones(mask.shape, bool)
    for axis in range(mask.ndim):
        for step in (0, 2):
            cut = tuple(slice(step, step + n) if a == axis else slice(1, -1) for a, n in enumerate(mask.shape))
            inner &= padded[cut]
    return mask & ~inner


def figures(made, truth, spacing, tolerance):
    """Dice, NSD and HD95 of boolean masks, by the definitions."""
    a, b = surface(made), surface(truth)
    there = distance_transform_edt(~b, sampling=spacing)[a], distance_transform_edt(~a, sampling=spacing)[b]
    dice = 2 * (made & truth).sum() / (made.sum() + truth.sum())
    return dice, (np.concatenate(there) <= tolerance).mean(), max(np.percentile(d, 95) for d in there)


@pytest.fixture
def polyps(tmp_path):
    """Real outlines, moved by 3 pixels and named like predictions; returns both folders and the arrays by id."""
    for folder in ("made", "truth"):
        (tmp_path / folder).mkdir()
    arrays = {}
    for file in sorted(shared_data("Kvasir-SEG", "masks").glob("*.jpg"))[:COUNT]:
        truth = np.asarray(Image.open(file).convert("L")) > 127
        made = np.roll(truth, 3, axis=1)
        Image.fromarray(made.astype(np.uint8)).save(tmp_path / "made" / f"{file.stem}_mask.png")
        (tmp_path / "truth" / file.name).write_bytes(file.read_bytes())
        arrays[file.stem] = made, truth
    return tmp_path / "made", tmp_path / "truth", arrays


def test_masks_of_pictures_by_a_task_and_by_classes(polyps, tmp_path, capsys):
    made, truth, arrays = polyps
    for number, how in enumerate((["--task", "kvasir_seg"], ["--classes", "background,polyp"])):
        out = tmp_path / f"out{number}"
        assert main(["score", str(made), str(truth), *how, "--output", str(out)]) == 0
        rows = {row["id"]: row for row in rows_of(out)}
        assert rows.keys() == arrays.keys()
        expected = {name: figures(*masks, (1, 1), 2.0) for name, masks in arrays.items()}
        for name, values in expected.items():
            found = [float(rows[name][key]) for key in ("dice", "nsd", "hd95")]
            assert found == pytest.approx(values, abs=2e-3)  # JPEG edges are cut where the reader says
        summary = json.loads((out / "metrics.json").read_text())["summary"]
        assert summary["metrics"]["dice"]["mean"] == pytest.approx(np.mean([v[0] for v in expected.values()]), abs=2e-3)
        assert "dice" in capsys.readouterr().out
    command = (
        "import sys; from amkd_monai.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    words = ["score", str(made), str(truth), "--task", "kvasir_seg", "--output", str(tmp_path / "alone"), "--quiet"]
    subprocess.run([sys.executable, "-c", command, *words], check=True, cwd=ROOT)


def test_volumes_of_three_classes_in_another_order_of_the_axes(tmp_path, capsys):
    rng, spacing = np.random.default_rng(0), (0.7, 1.2, 3.0)
    truth = np.zeros((20, 24, 12), np.uint8)
    truth[4:14, 5:15, 3:9], truth[8:18, 12:20, 4:10] = 1, 2
    made = np.where(rng.random(truth.shape) < 0.02, 0, np.roll(truth, 1, 0)).astype(np.uint8)
    for folder in ("made", "truth"):
        (tmp_path / folder).mkdir()
    nib.save(nib.Nifti1Image(truth, np.diag([*spacing, 1])), tmp_path / "truth" / "a.nii.gz")
    turned = nib.Nifti1Image(made, np.diag([*spacing, 1])).as_reoriented([[0, -1], [2, 1], [1, 1]])
    nib.save(turned, tmp_path / "made" / "a.nii.gz")
    words = ["score", str(tmp_path / "made"), str(tmp_path / "truth"), "--classes", "background,core,rim"]
    assert main([*words, "--nsd_tolerance", "1.5", "--output", str(tmp_path / "out")]) == 0
    *rows, background = rows_of(tmp_path / "out")
    p, t = made == 0, truth == 0
    assert float(background["dice"]) == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
    for label, row in enumerate(rows, 1):
        found = [float(row[key]) for key in ("dice", "nsd", "hd95")]
        assert found == pytest.approx(figures(made == label, truth == label, spacing, 1.5), abs=1e-6)
    moved = np.diag([*spacing, 1])
    moved[0, 3] = 4.0
    nib.save(nib.Nifti1Image(made, moved), tmp_path / "made" / "a.nii.gz")
    assert main([*words, "--output", str(tmp_path / "no")]) == 1
    assert "mm off" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_what_does_not_fit_is_named(polyps, tmp_path, capsys):
    made, truth, arrays = polyps
    first, second = list(arrays)[:2]

    def refusal(*how):
        words = ["score", str(made), str(truth), "--output", str(tmp_path / "out"), *(how or ("--task", "kvasir_seg"))]
        assert main(words) == 1 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    (made / f"{first}_mask.png").rename(made / "other.png")
    assert first in refusal()
    (truth / f"{first}.jpg").rename(truth / "kept")
    assert "other" in refusal()
    (made / "other.png").unlink()
    Image.open(made / f"{second}_mask.png").resize((30, 20)).save(made / f"{second}_mask.png")
    assert f"{second}_mask.png" in (text := refusal()) and "30x20" in text
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(made / f"{second}.png")
    assert "both of the case" in refusal()
    (made / f"{second}_mask.png").unlink()
    assert "classes 0 to 2" in refusal("--classes", "background,a,b")
    assert f"{second}.png" in refusal()
    assert "compares masks" in refusal("--task", "aptos2019")
    assert "Unknown task" in refusal("--task", "polyps")


def test_255_has_one_meaning_and_every_pixel_of_a_prediction_a_class(tmp_path, capsys):
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 10:30] = 255
    for folder in ("made", "truth"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            Image.fromarray(mask).save(tmp_path / folder / f"{name}.png")

    def refusal(made="made"):
        words = ["score", str(tmp_path / made), str(tmp_path / "truth"), "--classes", "background,disc"]
        assert main([*words, "--output", str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "two folders" in refusal("truth")
    mask[12:15, 12:20] = 1
    for folder, named in (("made", "made/b.png"), ("truth", "truth: ")):
        Image.fromarray(mask).save(tmp_path / folder / "b.png")
        assert named in (text := refusal()) and "255" in text
        Image.fromarray(np.where(mask > 1, 0, mask)).save(tmp_path / "made" / "b.png")


def test_folders_of_scores_are_compared_reported_and_never_mixed(tmp_path, capsys, caplog):
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 10:30] = 1
    for folder, step in (("truth", 0), ("a", 2), ("b", 3)):
        (tmp_path / folder / "more").mkdir(parents=True)
        for name in ("c1", "c2", "c3_overlay", "more/c4"):  # no other file is an overlay of c3
            Image.fromarray(np.roll(mask, step, 1)).save(tmp_path / folder / f"{name}.png")
    Image.fromarray(mask).convert("RGB").save(tmp_path / "a" / "c1_overlay.png")

    def run(folder, out, *more):
        words = ["score", str(tmp_path / folder), str(tmp_path / "truth"), "--classes", "background,polyp"]
        return main([*words, "--output", str(tmp_path / out), *more])

    assert run("a", "one") == run("a", "two", "--nsd_tolerance", "1") == run("b", "three") == 0
    assert "more/c4.png" in caplog.text
    assert {row["id"] for row in rows_of(tmp_path / "one")} == {"c1", "c2", "c3_overlay"}
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert main(["report", one, three, "--output", str(tmp_path / "page.html")]) == 0
    assert main(["compare", one, three, "--metric", "nsd"]) == main(["compare", one, two]) == 0
    assert main(["compare", one, two, "--metric", "nsd"]) == 1 and "tolerance" in capsys.readouterr().err
    before = (tmp_path / "one" / "per_case.csv").read_bytes()
    assert run("b", "one") == 1 and "--output" in capsys.readouterr().err
    assert (tmp_path / "one" / "per_case.csv").read_bytes() == before
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "run.json").write_text("{}")
    assert run("b", "trained") == 1 and "--output" in capsys.readouterr().err
