import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from amkd_monai.teachers.specialist import SpecialistTeacher
from amkd_monai.weights import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHARED_DATA = Path(os.environ.get("AMKD_SHARED_DATA", "../shared/data"))


class Features(nn.Module):
    """Strided convolution, batch normalisation, dropout and a head: (logits, features)."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout())
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x):
        features = self.stem(x)
        return self.head(features), features


class Answers(Features):
    """The same network, but logits alone."""

    def forward(self, x):
        return self.head(self.stem(x))


def segmenter(classes, gives_features, seed=0):
    return (Features if gives_features else Answers)(classes, seed)


def image(height=32, width=48, batch=2, seed=0):
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def torchscript_file(folder, network):
    path = folder / "network.ts"
    torch.jit.trace(network, image(), check_trace=False).save(str(path))
    return path


def scripted_file(folder, network):
    path = folder / "scripted.ts"
    torch.jit.script(network).save(str(path))
    return path


def exported_file(folder, network):
    path = folder / "network.pt2"
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(network.eval(), (image(),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("write", [torchscript_file, exported_file])
@pytest.mark.parametrize("gives_features", [False, True])
def test_either_format_gives_the_networks_answers(tmp_path, write, gives_features):
    network = segmenter(3, gives_features).eval()
    teacher = SpecialistTeacher("s", write(tmp_path, network))
    for x in (image(), image(batch=1, seed=1)):
        said = teacher(x)
        with torch.inference_mode():
            features = network.stem(x)
            torch.testing.assert_close(said.logits, network.head(features))
        assert said.logits.shape == (len(x), 3, 8, 12)
        if gives_features:
            torch.testing.assert_close(said.grid, features)
            torch.testing.assert_close(said.pooled, features.mean((2, 3)))
        else:
            assert said.grid is None and said.pooled is None


@pytest.mark.parametrize("write", [torchscript_file, exported_file])
def test_one_channel_becomes_two_classes_of_the_same_probability(tmp_path, write):
    network = segmenter(1, False).eval()
    said = SpecialistTeacher("s", write(tmp_path, network))(image())
    assert said.logits.shape[1] == 2
    with torch.inference_mode():
        torch.testing.assert_close(said.logits.softmax(1)[:, 1], network(image()).sigmoid()[:, 0])


@pytest.mark.parametrize("write", [scripted_file, exported_file])
def test_a_training_step_of_a_parent_leaves_it_as_it_was(tmp_path, write):
    teacher = SpecialistTeacher("s", write(tmp_path, segmenter(2, True)))
    parent = nn.ModuleDict({"teacher": teacher, "student": nn.Conv2d(3, 2, 4, stride=4)})
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    parent.train()
    assert not teacher.training
    assert torch.equal(teacher(image()).logits, teacher(image()).logits)  # dropout is off
    optimiser = torch.optim.SGD(parent.parameters(), lr=1.0)
    (parent["student"](image()) - teacher(image()).logits).square().mean().backward()
    optimiser.step()
    assert before and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_statistics_size_and_channel_order_matter(tmp_path):
    network = segmenter(2, True).eval()
    path = torchscript_file(tmp_path, network)
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    said = SpecialistTeacher("s", path, mean=mean, std=std)(image())
    x = (image() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(said.logits, network(x)[0])
    assert not torch.allclose(said.logits, SpecialistTeacher("s", path)(image()).logits, atol=1e-3)
    assert not torch.allclose(said.logits, SpecialistTeacher("s", path, mean=mean, std=std)(image().flip(1)).logits)
    squashed = SpecialistTeacher("s", path, image_size=64)
    assert squashed(image(20, 100)).logits.shape == (2, 2, 16, 16)


def test_feature_maps_are_pooled_down_and_never_up(tmp_path):
    path = torchscript_file(tmp_path, segmenter(2, True).eval())
    full = SpecialistTeacher("s", path)(image(32, 128)).grid
    assert full.shape[-2:] == (8, 16)
    pooled = SpecialistTeacher("s", path, grid_limit=10)(image(32, 128))
    assert pooled.grid.shape[-2:] == (8, 10)
    assert pooled.logits.shape[-2:] == (8, 32)  # answers keep their own grid


def test_the_fingerprint_is_stable_and_sees_the_file_and_the_preprocessing(tmp_path):
    (tmp_path / "b").mkdir()
    path = torchscript_file(tmp_path, segmenter(2, True).eval())
    other = torchscript_file(tmp_path / "b", segmenter(2, True, seed=1).eval())
    reference = SpecialistTeacher("s", path).fingerprint
    assert SpecialistTeacher("t", path, licence="MIT").fingerprint == reference
    others = [
        SpecialistTeacher("s", other),
        SpecialistTeacher("s", path, image_size=64),
        SpecialistTeacher("s", path, grid_limit=8),
        SpecialistTeacher("s", path, mean=(0.1, 0.0, 0.0)),
        SpecialistTeacher("s", path, std=(1.0, 1.0, 2.0)),
        SpecialistTeacher("s", path, answers="classes"),
    ]
    assert len({reference, *(t.fingerprint for t in others)}) == len(others) + 1


@pytest.mark.parametrize("write", [torchscript_file, exported_file])
@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, write, keep):
    path = write(tmp_path, segmenter(2, True).eval())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError) as error:
        SpecialistTeacher("s", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("suffix", [".ts", ".pt2"])
def test_a_file_of_another_format_is_refused(tmp_path, suffix):
    path = tmp_path / f"network{suffix}"
    torch.save(segmenter(2, True).state_dict(), path)
    with pytest.raises(CheckpointError, match="network"):
        SpecialistTeacher("s", path)
    with pytest.raises(CheckpointError, match="absent"):
        SpecialistTeacher("s", tmp_path / f"absent{suffix}")


def test_answers_that_are_no_masks_are_refused(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    teacher = SpecialistTeacher("s", torchscript_file(tmp_path, network))
    with pytest.raises(ValueError, match=r"'s'.*\(2, 2\)"):
        teacher(image())


def test_a_real_specialist_finds_polyps():
    file, folder = SHARED_DATA.parent / "weights" / "kvasir_specialist.ts", SHARED_DATA / "Kvasir-SEG"
    if not (file.is_file() and folder.is_dir()):
        message = f"needs {file} and {folder}: set AMKD_SHARED_DATA"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    from amkd_monai.data.transforms import load_mask, load_rgb

    teacher = SpecialistTeacher("polyps", file, image_size=224, licence="research only")
    scores = []
    for path in sorted((folder / "images").iterdir())[:10]:
        item = {"image": str(path), "label": str(folder / "masks" / path.name)}
        decoded = load_mask("label")(load_rgb("image")(item))
        with torch.inference_mode():
            said = teacher(torch.as_tensor(np.asarray(decoded["image"]))[None] / 255)
        assert said.logits.shape == (1, 2, 56, 56) and said.grid.shape == (1, 120, 14, 14)
        true = torch.as_tensor(np.asarray(decoded["label"]))[0] > 0
        logits = nn.functional.interpolate(said.logits, size=true.shape, mode="bilinear")
        found = logits[0].argmax(0).bool()
        scores.append(2 * float((found & true).sum()) / float(found.sum() + true.sum()))
    assert np.mean(scores) > 0.8, scores
