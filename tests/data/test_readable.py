"""An evaluation or inference of files of which some cannot be used: the rest goes on, and the end says so."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, Orientationd, ScaleIntensityRanged
from toy_images import write_photo

from amkd_monai.data.decoded import BadSampleError, ReadableDataset, ReadableLoader
from amkd_monai.data.transforms import LoadMaskd, LoadPictured, LoadVolumed

CHAIN = Compose([LoadPictured("image"), LoadMaskd("label"), ScaleIntensityRanged("image", 0, 255, 0, 1)])


def items(folder, broken=()):
    folder.mkdir(exist_ok=True)
    made = [write_photo(folder, f"p{number}", seed=number) for number in range(5)]
    for number in broken:
        (folder / f"p{number}.png").write_bytes(b"no picture")
    return made


def evaluate(loader):
    """Run an evaluator; return the ids it saw, in order, and its last metrics."""
    seen = []
    evaluator = SupervisedEvaluator("cpu", loader, torch.nn.Identity(), val_handlers=[loader])
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch[0]["id"]))
    try:
        evaluator.run()
    except BadSampleError as error:
        return seen, error
    return seen, None


@pytest.mark.parametrize("broken", [(), (0,), (4,), (1, 2), (0, 1, 3, 4)])
@pytest.mark.parametrize("on_bad_sample", ["stop", "skip"])
@pytest.mark.parametrize("keep", [False, True])
def test_usable_items_are_seen_once_and_the_others_are_named(tmp_path, broken, on_bad_sample, keep):
    loader = ReadableLoader(ReadableDataset(items(tmp_path, broken), CHAIN, keep), on_bad_sample)
    for _ in range(2):
        seen, error = evaluate(loader)
        assert seen == [f"p{number}" for number in range(5) if number not in broken]
        assert [row["id"] for row in loader.skipped] == [f"p{number}" for number in broken]
        assert all(f"p{n}.png" in row["reason"] for n, row in zip(broken, loader.skipped, strict=True))
        assert (error is not None) == bool(broken and on_bad_sample == "stop")
        assert error is None or f"p{broken[0]}.png" in str(error)


def test_nothing_usable_is_an_error_even_if_files_may_be_skipped(tmp_path):
    loader = ReadableLoader(ReadableDataset(items(tmp_path, range(5)), CHAIN), "skip")
    assert "p0.png" in str(evaluate(loader)[1])


def test_what_a_layout_found_wrong_and_mixed_codings_count_as_unusable(tmp_path):
    made = items(tmp_path)
    made[1]["problem"] = "p1_mask.png belongs elsewhere."
    void = np.zeros((24, 40), np.uint8)
    void[5:9, 5:9], void[9, 5:9] = 1, 255
    from PIL import Image

    Image.fromarray(void).save(made[2]["label"])
    loader = ReadableLoader(ReadableDataset(made, CHAIN), "skip")
    assert evaluate(loader)[0] == ["p0", "p3", "p4"], "255 is foreground in the first and no label in the third"
    assert [row["id"] for row in loader.skipped] == ["p1", "p2"]


def test_volumes_of_different_axes_are_not_mixed(tmp_path):
    rng, made = np.random.default_rng(0), []
    for number, axes in enumerate(([1, 1, 1], [-1, -1, 1])):
        image = nibabel.Nifti1Image(rng.normal(0, 100, (8, 9, 7)).astype(np.float32), np.diag([*axes, 1.0]))
        nibabel.save(image, tmp_path / f"v{number}.nii.gz")
        made.append({"image": str(tmp_path / f"v{number}.nii.gz"), "id": f"v{number}"})
    scale = ScaleIntensityRanged("image", -300, 300, 0, 1, clip=True)
    chain = Compose([LoadVolumed("image"), scale])
    assert evaluate(ReadableLoader(ReadableDataset(made, chain), "skip"))[0] == ["v0"]
    chain = Compose([LoadVolumed("image"), Orientationd("image", "RAS", labels=None), scale])
    assert evaluate(ReadableLoader(ReadableDataset(made, chain), "skip"))[0] == ["v0", "v1"]


def test_on_bad_sample_is_stop_or_skip(tmp_path):
    with pytest.raises(ValueError, match="perhaps"):
        ReadableLoader(ReadableDataset(items(tmp_path), CHAIN), "perhaps")
