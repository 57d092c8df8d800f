"""The network at its full size over two real images, into the feature store."""

import numpy as np
import pytest
import torch
from helpers import shared_data
from PIL import Image
from toy_dataset import decoded

from amkd_monai.cache.build import cache_teacher
from amkd_monai.teachers.base import build_teacher


@pytest.mark.slow
def test_two_real_images_are_cached(tmp_path):
    items = []
    for number, file in enumerate(sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))[:2]):
        mask = Image.open(file.parents[1] / "masks" / file.name).convert("L")
        for name, picture in (("image", Image.open(file)), ("label", mask)):
            picture.crop((0, 0, 320, 256)).save(tmp_path / f"{name}{number}.png")
        paths = {name: str(tmp_path / f"{name}{number}.png") for name in ("image", "label")}
        items.append({**paths, "id": file.stem, "group": file.stem})
    dataset = decoded(items, tmp_path / "decoded")
    polyp = [49406, 6833, 335, 530, 13476, 20018, 49407]  # "polyp in endoscopy"
    description = {"name": "b", "kind": "biomedparse", "weights": "random", "token_ids": [polyp], "image_size": 256}
    teacher = build_teacher(description)
    store = cache_teacher(teacher, dataset, tmp_path / "cache")
    assert {name: spec.shape for name, spec in store.arrays.items()} == {
        "grid": (1536, 8, 8),
        "pooled": (1536,),
        "logits": (2, 64, 64),
    }
    with torch.inference_mode():
        expected = teacher(torch.from_numpy(np.stack([dataset.image(1)])).float() / 255)
    for name in ("grid", "pooled", "logits"):
        kept = torch.from_numpy(store.read(name, np.array([1]))).float()
        torch.testing.assert_close(kept, getattr(expected, name), rtol=2e-3, atol=2e-3)
