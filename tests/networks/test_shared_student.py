"""One student for several tasks: views share its modules, its files are small, single students start from it."""

from __future__ import annotations

import io

import pytest
import torch

from amkd_monai.networks import ClassStudent, SharedStudent, Student
from amkd_monai.networks.student import heads_of, initialised, with_heads_of
from amkd_monai.teachers.base import build_teacher
from amkd_monai.weights import CheckpointError

SIX = {
    "busi": {"kind": "segmentation", "classes": 2},
    "covid": {"kind": "segmentation", "classes": 2},
    "kvasir_seg": {"kind": "segmentation", "classes": 2},
    "msd_heart": {"kind": "segmentation", "classes": 2, "stride": 2},
    "aptos2019": {"kind": "classification", "classes": 5},
    "isic2017": {"kind": "classification", "classes": 3},
}


def shared(tasks=SIX, **options):
    return SharedStudent({t: SIX[t] for t in tasks}, weights="random", **options)


def disturb(student):
    """Give every tensor its own values, so that a wrong assignment shows."""
    with torch.no_grad():
        for k, value in enumerate(student.state_dict().values()):
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(k)) + 0.5)
    return student


def test_six_heads_stay_small():
    student = shared()
    assert sum(p.numel() for p in student.parameters()) <= 10e6
    file = io.BytesIO()
    torch.save(student.state_dict(), file)
    assert len(file.getvalue()) <= 40e6


@pytest.mark.parametrize("task", ["kvasir_seg", "msd_heart", "aptos2019"])
def test_a_view_is_the_student_of_its_task(task):
    student = disturb(shared())
    view = student.for_task(task).eval()
    own = {id(tensor) for tensor in (*student.parameters(), *student.buffers())}
    assert all(id(p) in own for p in view.parameters())
    assert {name for name, b in view.named_buffers() if id(b) not in own} == {"mean", "std"}
    stride = SIX[task].get("stride", 4)
    alone = ClassStudent(num_classes=5) if task == "aptos2019" else Student(stride=stride, weights="random")
    assert view.state_dict().keys() == alone.state_dict().keys()
    alone.load_state_dict(view.state_dict())
    image = torch.rand(2, 3, 64, 96)
    assert torch.equal(view(image), alone.eval()(image))
    if task != "msd_heart":
        assert torch.equal(torch.jit.script(view)(image), view(image))


@pytest.mark.parametrize("task", ["kvasir_seg", "msd_heart", "aptos2019"])
def test_a_single_student_starts_from_its_part(task, tmp_path):
    student = disturb(shared())
    torch.save(student.state_dict(), tmp_path / "model.pt")
    alone = ClassStudent(num_classes=5) if task == "aptos2019" else Student(stride=SIX[task].get("stride", 4))
    initialised(alone, tmp_path / "model.pt", task)
    view = student.for_task(task).state_dict()
    assert all(torch.equal(value, view[key]) for key, value in alone.state_dict().items())


def test_the_encoder_alone_on_request(tmp_path):
    student = disturb(shared(tasks=("busi", "aptos2019")))
    torch.save(student.state_dict(), tmp_path / "model.pt")
    alone = Student(neck_channels=48, weights="random")
    before = {k: v.clone() for k, v in alone.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"no head for 'kvasir_seg'.*surplus: busi, aptos2019.*init_parts"):
        initialised(alone, tmp_path / "model.pt", "kvasir_seg")
    with pytest.raises(CheckpointError, match="of another shape"):
        initialised(alone, tmp_path / "model.pt", "busi")
    initialised(alone, tmp_path / "model.pt", "kvasir_seg", "encoder")
    for key, value in alone.state_dict().items():
        taken = key.startswith("encoder.") and key in student.state_dict()  # batch norms are those of a task
        assert torch.equal(value, student.state_dict()[key] if taken else before[key])


def test_other_heads_are_named_and_new_ones_join_on_request(tmp_path):
    before = disturb(shared(tasks=("busi", "covid")))
    torch.save(before.state_dict(), tmp_path / "model.pt")
    path = tmp_path / "model.pt"
    with pytest.raises(CheckpointError, match=r"missing: kvasir_seg; surplus: covid\)"):
        initialised(shared(tasks=("busi", "kvasir_seg")), path)
    heads = with_heads_of(shared(tasks=("kvasir_seg",)).specs, path)
    assert list(heads) == ["busi", "covid", "kvasir_seg"]
    after = initialised(SharedStudent(heads, weights="random"), path, parts="known").state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.state_dict().items())
    assert heads_of(after).keys() == heads.keys()
    heads = with_heads_of(shared(tasks=("msd_heart",)).specs, path)  # it reads a level that no head has read
    after = initialised(SharedStudent(heads, weights="random"), path, parts="known").state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.state_dict().items())
    torch.save(after, path)
    heads = with_heads_of(shared(tasks=("busi",)).specs, path)
    initialised(SharedStudent(heads, weights="random"), path)


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path):
    for heads, options, words in (
        ({}, {}, "at least one head"),
        ({"a b": SIX["busi"]}, {}, "cannot name a task"),
        ({"a": {"kind": "segmentation", "classes": 1}}, {}, "two classes"),
    ):
        with pytest.raises(ValueError, match=words):
            SharedStudent(heads, weights="random", **options)
    with pytest.raises(ValueError, match="no head for 'covid'"):
        shared(tasks=("busi",)).for_task("covid")
    torch.save(Student(weights="random").state_dict(), tmp_path / "single.pt")
    with pytest.raises(CheckpointError, match="not the checkpoint of a shared student"):
        initialised(shared(tasks=("busi",)), tmp_path / "single.pt")
    with pytest.raises(ValueError, match="use one of all, known, encoder"):
        initialised(shared(tasks=("busi",)), tmp_path / "single.pt", parts="half")


def test_a_trained_student_is_a_teacher_of_features(tmp_path):
    student = disturb(shared())
    torch.save(student.state_dict(), tmp_path / "model.pt")
    description = {"name": "before", "kind": "student", "weights": str(tmp_path / "model.pt"), "task": "busi"}
    teacher = build_teacher({**description, "own_answers": False})
    said, view = teacher(torch.full((1, 3, 64, 64), 0.4)), student.for_task("busi").eval()
    assert said.logits is None and said.pooled.shape == (1, 320)
    assert torch.equal(said.grid, view.features(torch.full((1, 3, 64, 64), 0.4))[16].detach())
