"""Runs on data as people have them: odd names, other locales, home folders, unusable files in every section."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from bundle_runs import read_json, run, settings
from helpers import ROOT
from PIL import Image

from amkd_monai.data.decoded import BadSampleError


def polyps(folder, count=24, size=(64, 96), coding=lambda mask: mask * 255):
    """Write a data set in the layout of Kvasir-SEG: discs on a textured ground."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    y, x = np.mgrid[: size[0], : size[1]]
    for number in range(count):
        cy, cx, radius = rng.integers(14, size[0] - 14), rng.integers(14, size[1] - 14), rng.integers(7, 12)
        mask = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        pixels = np.where(mask[..., None], (230, 190, 160), (150, 70, 60)) + rng.normal(0, 6, (*size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:03d}.png")
        Image.fromarray(coding(mask).astype(np.uint8)).save(folder / "masks" / f"{number:03d}.png")
    return folder


def chain_of(error):
    while error is not None:
        yield error
        error = error.__cause__


@pytest.mark.slow
def test_names_of_any_bytes_in_a_home_folder_under_an_ascii_locale(tmp_path):
    data = polyps(tmp_path / "Kvasir-SEG")
    for file in [*(data / "images").iterdir(), *(data / "masks").iterdir()]:
        file.rename(os.fsdecode(os.fsencode(file.parent) + b"/pati\xebnt\xc3\xbc" + file.name.encode()))
    places = {"HOME": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT)}
    bundle = ROOT / "bundles" / "kvasir_seg" / "configs"
    common = {"dataset_dir": "~/Kvasir-SEG", "ckpt_dir": "~/models", "cache_dir": "~/cache"}
    train = {**common, "image_size": 64, "max_epochs": 1, "recipe#min_steps": 1, "teachers": [], "output_dir": "~/out"}
    check = ["data", "check", "kvasir_seg", "--dataset_dir=~/Kvasir-SEG", "--cache_dir=~/cache", "--sheet=~/sheet.png"]
    script = (
        "from amkd_monai.__main__ import main\nfrom monai.bundle import run\n"
        f"assert main({check}) == 0\n"
        f"run('training', config_file={str(bundle / 'train.json')!r}, **{train})\n"
        f"run(config_file={str(bundle / 'inference.json')!r}, **{common | {'output_dir': '~/masks'}})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr[-2000:].decode(errors="replace")
    assert (tmp_path / "sheet.png").is_file() and (tmp_path / "out" / "run.json").is_file()
    names = sorted(os.fsencode(file.name) for file in (tmp_path / "masks").iterdir())
    assert names[0] == b"pati%EBnt\xc3\xbc000_mask.png" and len(names) == 24
    assert not (tmp_path / "~").exists()


def test_unusable_files_are_skipped_and_recorded_in_every_section(tmp_path):
    data = polyps(tmp_path / "Kvasir-SEG")
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", dataset_dir=str(data), teachers=[], max_epochs=1)
    run("kvasir_seg", ("train",), values)
    split = read_json(next((tmp_path / "eval").glob("split_*.json")))
    broken = {section: split[section][0][0] for section in ("train", "validation", "test")}
    for kind, name in zip(("images", "masks", "masks"), broken.values(), strict=True):
        (data / kind / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(Exception) as caught:
        run("kvasir_seg", ("train",), values)
    assert any(
        f"{broken['train']}.png" in str(e) or f"{broken['validation']}.png" in str(e) for e in chain_of(caught.value)
    )
    values |= {"on_bad_sample": "skip"}
    run("kvasir_seg", ("train",), values)
    skipped = read_json(tmp_path / "eval" / "run.json")["skipped_samples"]
    assert skipped == {"train": [broken["train"]], "validation": [broken["validation"]]}
    run("kvasir_seg", ("train", "evaluate"), values)
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    assert [row["id"] for row in metrics["skipped_samples"]] == [broken["test"]]
    cases = (tmp_path / "eval" / "per_case.csv").read_text()
    assert broken["test"] not in cases and cases.count("\n") == len(split["test"])
    with pytest.raises(Exception) as caught:
        run("kvasir_seg", ("train", "evaluate"), {**values, "on_bad_sample": "stop"})
    assert any(isinstance(e, BadSampleError) and f"{broken['test']}.png" in str(e) for e in chain_of(caught.value))


def test_masks_with_pixels_without_a_label_train_and_evaluate_as_if_these_were_not_there(tmp_path):
    def with_void(mask):
        ring = np.zeros_like(mask)
        ring[1:-1, 1:-1] = (mask[:-2, 1:-1] ^ mask[2:, 1:-1]) | (mask[1:-1, :-2] ^ mask[1:-1, 2:])
        return np.where(ring, 255, mask)

    data = polyps(tmp_path / "Kvasir-SEG", coding=with_void)
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", dataset_dir=str(data), teachers=[], max_epochs=4)
    run("kvasir_seg", ("train",), values)
    run("kvasir_seg", ("train", "evaluate"), values)
    assert read_json(tmp_path / "eval" / "metrics.json")["summary"]["metrics"]["dice"]["mean"] > 0.3
