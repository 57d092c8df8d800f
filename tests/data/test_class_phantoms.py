import numpy as np
import pytest
from PIL import Image

from amkd_monai.data.datalist import MODULES
from amkd_monai.data.phantoms import write_phantom
from amkd_monai.tasks import get_task


@pytest.mark.parametrize("task", ["aptos2019", "isic2017"])
def test_they_repeat_and_hold_every_class_in_every_section(task, tmp_path):
    first, second = (write_phantom(task, tmp_path / name) for name in "ab")
    files = [f.relative_to(first) for f in sorted(first.rglob("*")) if f.is_file()]
    assert len(files) > 80 and all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    sections = MODULES[task].split(first, MODULES[task].find_items(first))
    classes = set(range(len(get_task(task).classes)))
    assert all({item["label"] for item in section} == classes for section in sections)


def test_the_load_of_lesions_rises_with_the_grade(tmp_path):
    folder = write_phantom("aptos2019", tmp_path)
    stained = [[] for _ in range(5)]
    for item in MODULES["aptos2019"].find_items(folder):
        red, green, _ = np.asarray(Image.open(item["image"]), float).transpose(2, 0, 1)
        stained[item["label"]].append(np.mean((red > 30) & (green < 0.28 * red)))
    means = [np.mean(values) for values in stained]
    assert means[0] < means[1] < means[2] < min(means[3], means[4])
