"""With which box MedSAM is asked, and what follows for the cache."""

import pytest
import torch
from cache.toy_dataset import decoded, write_items
from teachers.tiny_teachers import tiny

from amkd_monai.cache.build import cache_teacher


def image(batch=1):
    return torch.rand((batch, 3, 40, 80), generator=torch.Generator().manual_seed(0))


def test_without_a_prompt_there_is_no_answer():
    assert tiny("medsam")(image()).logits is None


def test_the_whole_image_is_a_box():
    teacher = tiny("medsam", prompt="whole_image")
    assert teacher.boxes(image(2), None).tolist() == [[0, 0, 64, 64]] * 2
    said = teacher(image(2))
    assert said.logits.shape == (2, 2, 16, 16) and not said.logits[:, 0].any()
    mask, _ = teacher.answer(said.grid, torch.tensor([[0.0, 0, 64, 64]] * 2))
    torch.testing.assert_close(said.logits[:, 1:], mask)
    torch.testing.assert_close(said.logits[1:], teacher(image(2)[1:]).logits, atol=1e-5, rtol=1e-5)


def test_the_box_of_the_label_is_scaled_to_the_networks_frame():
    teacher = tiny("medsam", prompt="label_box")
    label = torch.zeros(4, 1, 40, 80, dtype=torch.uint8)
    label[0, 0, 10:21, 40:61] = 1  # rows 10 to 20, columns 40 to 60
    label[1] = 255
    label[3, 0, 5, 7] = 1
    boxes = teacher.boxes(image(4), label)
    assert boxes[0].tolist() == pytest.approx([40 * 64 / 80, 10 * 64 / 40, 60 * 64 / 80, 20 * 64 / 40])
    assert boxes[1].tolist() == [0, 0, 64, 64], "unlabelled: the whole image"
    assert boxes[2].isnan().all(), "nothing to ask for"
    assert boxes[3].tolist() == pytest.approx([5.6, 8.0, 5.6, 8.0])
    said = teacher(image(4), label)
    assert torch.isfinite(said.logits).all()
    assert (said.logits[2].softmax(0)[1] < 1e-4).all() and said.logits[0, 1].std() > 0
    assert not torch.equal(said.logits[0], teacher(image(4), torch.full_like(label, 255)).logits[0])
    with pytest.raises(ValueError, match="label"):
        teacher(image())


def test_the_cache_asks_with_the_labels_of_the_data(tmp_path):
    items = write_items(tmp_path / "data", count=3, labelled=[True, True, False])
    dataset = decoded(items, tmp_path / "cache")
    teacher = tiny("medsam", prompt="label_box")
    store = cache_teacher(teacher, dataset, tmp_path / "stores")
    batch = torch.stack([torch.from_numpy(dataset.image(i).copy()) for i in range(3)]).float() / 255
    labels = torch.stack([torch.from_numpy(dataset.labels[i].copy()) for i in range(3)])
    expected = teacher(batch, labels).logits
    torch.testing.assert_close(
        torch.from_numpy(store.read("logits", [0, 1, 2])).float(), expected, atol=2e-2, rtol=1e-2
    )
