"""The 3D student: trained on patches by the stock path, distilled, evaluated."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from bundle_runs import read_json, run, settings, workflow
from monai.networks.nets import DynUNet, SegResNet

from amkd_monai.data.sampling import Augmentation, PatchSampler
from amkd_monai.errors import root_cause
from amkd_monai.networks import VolumeStudent

SEGRESNET = partial(SegResNet, spatial_dims=3, init_filters=8, in_channels=1, out_channels=2)
DYNUNET = partial(
    DynUNet,
    **{"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [[1, 3, 3], 3, 3, 3, 3]},
    **{"strides": [1, [1, 2, 2], 2, 2, 2], "upsample_kernel_size": [[1, 2, 2], 2, 2, 2], "filters": [4, 8, 8, 16, 16]},
)


@pytest.mark.parametrize("network", [SEGRESNET, DYNUNET], ids=["SegResNet", "DynUNet"])
def test_slices_of_patches_give_the_answers_and_gradients_of_volumes(network):
    torch.manual_seed(0)
    student = VolumeStudent(network, slices=8)
    image = torch.rand(16, 3, 64, 32)
    volume = image[:, 1].reshape(2, 1, 8, 64, 32)
    logits, *maps = student.encode(image)
    expected = student(volume)
    torch.testing.assert_close(logits.reshape(2, 8, 2, 64, 32).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)
    assert [tuple(m.shape) for m in maps] == [(16, student.channels_at(s), 64 // s, 32 // s) for s in (8, 16)]
    parameters = [p for p in student.parameters() if p.ndim == 5]
    found = torch.autograd.grad(logits.square().mean(), [*maps, *parameters], retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in found[:2]), "the answer goes through the maps"
    for a, b in zip(found[2:], torch.autograd.grad(expected.square().mean(), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    again, other = VolumeStudent(network, 8, seed=0), VolumeStudent(network, 8, seed=1)
    key = next(iter(again.state_dict()))
    assert torch.equal(again.state_dict()[key], student.state_dict()[key])
    assert not torch.equal(other.state_dict()[key], student.state_dict()[key])
    with pytest.raises(ValueError, match="recipe#slices"):
        student.encode(image[:9])
    with pytest.raises(ValueError, match="classes"):
        VolumeStudent(network, 8, num_classes=3)(volume)


def test_patches_are_consecutive_slices_of_one_case_changed_alike():
    cases = np.repeat([0, 1, 2], [10, 3, 7])
    first, last = np.array([0, 10, 13])[cases], np.array([9, 12, 19])[cases]
    sampler = PatchSampler(np.ones(20, bool), np.ones(20, bool), 2, 0, first=first, last=last, slices=5)
    assert len(sampler) == 2
    for batch in sampler:
        for patch in np.reshape(batch, (2, 5)):
            assert len(set(cases[patch])) == 1 and set(np.diff(patch)) <= {0, 1}
            assert len(set(patch)) == min(5, np.sum(cases == cases[patch[0]]))
    change = Augmentation(rotation=0.3, scale=0.2, shift=0.1, gamma=0.4, gain=0.3, together=4)
    theta = change.sample(8, (8, 8), torch.Generator().manual_seed(0)).unflatten(0, (2, 4))
    assert torch.equal(theta, theta[:, :1].expand_as(theta)) and not torch.equal(theta[0], theta[1])
    shown = change.photometric(torch.full((8, 3, 2, 2), 0.5), torch.Generator().manual_seed(0)).unflatten(0, (2, 4))
    assert torch.equal(shown, shown[:, :1].expand_as(shown)) and not torch.equal(shown[0], shown[1])


def test_a_3d_student_learns_from_a_3d_specialist_and_is_evaluated(tmp_path, cache):
    network = {"_target_": "SegResNet", "spatial_dims": 3, "init_filters": 8, "in_channels": 1, "out_channels": 2}
    specialist = {"name": "specialist", "kind": "crossfit_volume_specialist", "slices": 16, "steps": 4}
    values = settings("msd_heart", tmp_path, cache, patch_slices=8, admission={"mode": "all"}, max_epochs=2)
    values |= {"teachers": [{**specialist, "network": network, "folds": 2}], "network_def#network#init_filters": 8}
    run("msd_heart", ("train", "volumes3d"), values)
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed"
    (teacher,) = record["distillation"]["teachers"]
    assert teacher["kind"] == "crossfit_volume_specialist" and teacher["outputs_admitted"]
    assert record["latest"]["loss_output"] > 0
    chain = ("train", "volumes3d", "evaluate", "volumes3d_evaluate")
    given = {k: v for k, v in values.items() if k not in ("teachers", "admission", "max_epochs")}
    made = run("msd_heart", chain, given)
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    assert metrics["overridden"] == {} if "overridden" in metrics else True
    assert metrics["summary"]["cases"] == len(made.parser.get_parsed_content("datalist").test)
    masks = {**given, "output_dir": str(tmp_path / "masks")}
    run("msd_heart", ("inference", "volumes3d_inference"), masks)
    assert list((tmp_path / "masks").glob("*_mask.nii.gz"))
    with pytest.raises(RuntimeError) as refused:
        workflow("msd_heart", ("train", "volumes3d"), {**values, "recipe#slices": 4}).run()
    assert "set recipe#slices to 8" in str(root_cause(refused.value))
