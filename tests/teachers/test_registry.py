import pytest
import torch

from amkd_monai.teachers.base import CROSS_FITTED_KINDS, KINDS, Teacher, build_teacher, validate_descriptions
from amkd_monai.teachers.timm_encoder import TimmTeacher
from amkd_monai.weights import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LITE1 = {"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1", "weights": "random"}


def assert_one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text, text


def test_a_description_becomes_a_frozen_teacher():
    teacher = build_teacher({**LITE1, "grid_limit": 8})
    assert isinstance(teacher, TimmTeacher) and teacher.name == "lite1" and teacher.grid_limit == 8
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_a_teacher(kind):
    import importlib

    module, _, name = KINDS[kind].rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), Teacher)


def test_a_specialist_is_built_from_its_file(tmp_path):
    network = torch.jit.trace(torch.nn.Conv2d(3, 2, 1).eval(), torch.zeros(1, 3, 8, 8))
    network.save(str(tmp_path / "n.ts"))
    teacher = build_teacher({"name": "s", "kind": "specialist", "path": str(tmp_path / "n.ts"), "image_size": 16})
    assert teacher(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 2, 16, 16)


def test_an_unknown_kind_is_named_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        build_teacher({**LITE1, "kind": "oracle"})
    assert_one_sentence(error, "lite1", "oracle", *KINDS, *CROSS_FITTED_KINDS)
    with pytest.raises(ValueError, match="None"):
        validate_descriptions([{"name": "lite1"}])


def test_a_missing_name_and_a_name_used_twice_are_named():
    with pytest.raises(ValueError) as error:
        validate_descriptions([{"kind": "timm"}])
    assert_one_sentence(error, "no name")
    with pytest.raises(ValueError) as error:
        validate_descriptions([LITE1, {**LITE1, "model": "tf_efficientnet_lite2"}])
    assert_one_sentence(error, "lite1")
    validate_descriptions([LITE1, {**LITE1, "name": "other"}, {"name": "c", "kind": CROSS_FITTED_KINDS[0]}])


@pytest.mark.parametrize("change", [{"imagesize": 3}, {"model": None, "modle": "x"}])
def test_options_that_do_not_fit_are_named(change):
    description = {k: v for k, v in {**LITE1, **change}.items() if v is not None}
    with pytest.raises(ValueError) as error:
        build_teacher(description)
    assert_one_sentence(error, "lite1", "imagesize" if "imagesize" in change else "model")


def test_a_cross_fitted_teacher_cannot_be_built_alone():
    with pytest.raises(ValueError) as error:
        build_teacher({"name": "c", "kind": CROSS_FITTED_KINDS[0]})
    assert_one_sentence(error, "'c'", CROSS_FITTED_KINDS[0])


def test_missing_weights_are_a_checkpoint_error():
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        build_teacher({**LITE1, "weights": "absent.pth"})


def test_a_class_of_ones_own_is_a_kind(tmp_path, monkeypatch):
    (tmp_path / "own_teachers.py").write_text(
        "from amkd_monai.teachers.timm_encoder import TimmTeacher\n"
        "class Mine(TimmTeacher):\n    pass\n"
        "class Other:\n    pass\n"
    )
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_absent\nclass Mine:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = build_teacher({**LITE1, "kind": "own_teachers.Mine"})
    assert type(mine).__name__ == "Mine"
    wrong = {"own_teachers.Other": "Teacher", "own_teachers.Absent": "Absent", "absent.X": "absent"}
    for kind, word in (wrong | {"needs_more.Mine": "a_package_that_is_absent"}).items():
        with pytest.raises(ValueError) as error:
            build_teacher({**LITE1, "kind": kind})
        assert_one_sentence(error, kind, word)
