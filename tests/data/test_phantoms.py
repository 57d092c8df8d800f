import json
import signal
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from amkd_monai.data import phantoms
from amkd_monai.data.datasets import PHANTOM_MARKER, get_task, is_phantom
from amkd_monai.files.masks import read_mask

POLYPS = get_task("kvasir_seg")


@pytest.fixture(scope="module")
def kvasir(tmp_path_factory):
    return get_task("kvasir_seg").write_phantom(tmp_path_factory.mktemp("kvasir"), count=12)


@pytest.fixture(scope="module")
def heart(tmp_path_factory):
    return get_task("msd_heart").write_phantom(tmp_path_factory.mktemp("heart"), cases=3)


def load_frame(item):
    """Frame (H, W, 3) in [0, 255] and mask (H, W) of 0 and 1."""
    image, mask = (np.asarray(Image.open(item[key]), dtype=float) for key in ("image", "label"))
    return image, mask[..., 0] > 127


def load_volume(file):
    return np.asarray(nibabel.load(file).dataobj)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def files_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_frames_have_the_official_layout(kvasir):
    items = get_task("kvasir_seg").layout.find_items(kvasir)
    assert len(items) == 12
    sizes = set()
    for item in items:
        image, mask = load_frame(item)
        height, width = mask.shape
        sizes.add((height, width))
        assert 150 <= height < width <= 230
        assert image.shape == (height, width, 3)
        assert 0.005 < mask.mean() < 0.35
        assert image[..., 0].mean() > 1.2 * image[..., 2].mean()  # reddish
        assert max(image[0, 0].max(), image[-1, -1].max()) < 40  # black corners
    assert len(sizes) > 3


def test_masks_ring_like_the_real_ones(kvasir):
    for item in get_task("kvasir_seg").layout.find_items(kvasir):
        mask = Image.open(item["label"])
        assert (mask.format, mask.mode) == ("JPEG", "RGB")
        values = np.unique(np.asarray(mask))
        assert len(values) > 4 and values.min() == 0 and values.max() == 255


def test_no_threshold_finds_the_polyp(kvasir):
    """The best threshold of a colour channel or a colour ratio, found with the answer at hand, stays poor."""
    frames = [load_frame(item) for item in get_task("kvasir_seg").layout.find_items(kvasir)]
    for channel in (
        lambda image: image[..., 0],
        lambda image: image[..., 1],
        lambda image: image[..., 2],
        lambda image: 100 * image[..., 0] / (1 + image[..., 1]),
    ):
        values = [(channel(image), mask) for image, mask in frames]
        levels = np.percentile(np.concatenate([value.ravel() for value, _ in values]), range(5, 100, 5))
        scores = [
            np.mean([dice(sign * value > sign * level, mask) for value, mask in values])
            for level in levels
            for sign in (-1, 1)
        ]
        assert max(scores) < 0.5


def test_volumes_have_the_official_layout(heart):
    items = get_task("msd_heart").layout.find_items(heart)
    assert [item["id"] for item in items] == ["la_001", "la_002", "la_003"]
    assert [item["id"] for item in get_task("msd_heart").layout.inference_items(heart)] == ["la_004", "la_005"]
    for item in items:
        volume = nibabel.load(item["image"])
        assert volume.get_data_dtype() == np.int16
        assert volume.shape[:2] == (20, 96) and abs(volume.shape[2] - 100) <= 8
        assert np.allclose(volume.affine, np.diag([2.5, 2.5, 1.37, 1]))
        assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    content = json.loads((heart / "dataset.json").read_text())
    assert all(entry["image"].startswith("./imagesTr/") for entry in content["training"])
    assert content["test"] == ["./imagesTs/la_004.nii.gz", "./imagesTs/la_005.nii.gz"]


def test_left_atrium_is_central_bright_and_not_alone(heart):
    for item in get_task("msd_heart").layout.find_items(heart):
        volume, label = load_volume(item["image"]), load_volume(item["label"]) > 0
        assert 0.005 < label.mean() < 0.04
        center = [place.mean() / length for place, length in zip(label.nonzero(), label.shape, strict=True)]
        assert all(0.3 < place < 0.7 for place in center)
        assert volume[label].mean() > 2 * volume[~label].mean()
        assert max(dice(volume > level, label) for level in range(300, 1300, 50)) < 0.6


def test_ultrasound_images_have_the_traps_of_the_real_ones(tmp_path):
    items = {
        item["id"]: item
        for item in get_task("busi").layout.find_items(get_task("busi").write_phantom(tmp_path, count=3))
    }
    assert list(items) == [
        *(f"benign ({n})" for n in (1, 2, 3)),
        *(f"malignant ({n})" for n in (1, 2, 3, 4)),
        "normal (1)",
    ]
    assert len(items["benign (1)"]["label"]) == 2
    assert items["malignant (1)"]["group"] == items["malignant (4)"]["group"] == "malignant (1)+malignant (4)"
    assert len({item["group"] for item in items.values()}) == len(items) - 1
    for name, item in items.items():
        files = item["label"] if isinstance(item["label"], list) else [item["label"]]
        assert {Image.open(file).mode for file in files} == ({"RGB"} if "normal" in name else {"1"})
        mask, image = read_mask(files), np.asarray(Image.open(item["image"]))
        assert image.shape == (*mask.shape, 3) and mask.shape[0] < mask.shape[1]
        assert (mask.mean() == 0) if "normal" in name else (0.01 < mask.mean() < 0.3)


@pytest.mark.parametrize("task", ["busi", "covid"])
def test_no_grey_level_finds_the_target(tmp_path, task):
    scores = []
    for item in get_task(task).layout.find_items(get_task(task).write_phantom(tmp_path, count=8)):
        mask = read_mask(item["label"] if isinstance(item["label"], list) else [item["label"]])
        grey = np.asarray(Image.open(item["image"]).convert("L"), dtype=float)
        if mask.any():
            levels = range(10, 250, 10)
            scores.append([dice(s * grey > s * level, mask) for level in levels for s in (-1, 1)])
    assert np.mean(scores, axis=0).max() < 0.5


def test_slices_have_the_layout_of_pairs(tmp_path):
    items = get_task("covid").layout.find_items(get_task("covid").write_phantom(tmp_path, count=10))
    assert [item["id"] for item in items] == [str(n) for n in range(10)]
    empty = [not read_mask([item["label"]]).any() for item in items]
    assert empty == [False] * 9 + [True]
    assert len({item["group"] for item in items}) == 10


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("aptos2019", {"count": 5, "height": 30}),
        ("busi", {"count": 2, "size": (60, 90)}),
        ("covid", {"count": 2, "size": (60, 90)}),
        ("covid_volumes", {"cases": 1, "shape": (20, 18, 6)}),
        ("isic2017", {"counts": (3, 3, 3), "height": 30}),
        ("kvasir_seg", {"count": 2, "size": (40, 60)}),
        ("msd_heart", {"cases": 1, "shape": (6, 20, 24)}),
    ],
)
def test_phantoms_are_deterministic(tmp_path, task, options):
    first, again, other = (
        files_of(get_task(task).write_phantom(tmp_path / name, seed=seed, **options))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


@pytest.mark.parametrize("task", ["aptos2019", "isic2017"])
def test_every_section_holds_every_class(task, tmp_path):
    folder, layout = get_task(task).write_phantom(tmp_path, height=90), get_task(task).layout
    sections = layout.split(folder, layout.find_items(folder))
    classes = set(range(len(get_task(task).classes)))
    assert all({item["label"] for item in section} == classes for section in sections)
    if task == "aptos2019":
        stained = [[] for _ in range(5)]
        for item in layout.find_items(folder):
            red, green, _ = np.asarray(Image.open(item["image"]), float).transpose(2, 0, 1)
            stained[item["label"]].append(np.mean((red > 30) & (green < 0.28 * red)))
        means = [np.mean(values) for values in stained]
        assert means[0] < means[1] < means[2] < min(means[3], means[4]), "the load of lesions rises with the grade"


def test_phantoms_are_written_once_and_never_replace_other_data(tmp_path):
    folder = POLYPS.write_phantom(tmp_path, count=1, size=(40, 60))
    assert folder == tmp_path / "Kvasir-SEG" and is_phantom(folder)
    before = (folder / "images").stat().st_mtime_ns
    assert POLYPS.write_phantom(tmp_path) == folder
    assert (folder / "images").stat().st_mtime_ns == before
    (folder / PHANTOM_MARKER).unlink()
    with pytest.raises(FileExistsError, match="Kvasir-SEG already exists"):
        POLYPS.write_phantom(tmp_path)
    assert not is_phantom(folder)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantoms, "_heart_volume", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get_task("msd_heart").write_phantom(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_data_set_and_can_be_repeated(tmp_path):
    """The process dies when everything is written but the last rename."""
    script = (
        "import os, pathlib, sys; from amkd_monai.data.datasets import get_task;"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), 9);"
        "get_task('kvasir_seg').write_phantom(sys.argv[1], count=2, size=(40, 60))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "Kvasir-SEG").exists()
    assert all(entry.name.startswith(".") for entry in tmp_path.iterdir())
    assert len(POLYPS.layout.find_items(POLYPS.write_phantom(tmp_path, count=3, size=(40, 60)))) == 3
