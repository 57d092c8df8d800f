"""Validation with empty references: they are counted apart and never enter the mean Dice."""

import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, from_engine
from monai.transforms import AsDiscreted, Compose

from amkd_monai.engines.handlers import EmptyReferences


def validate(cases):
    """Run an evaluator on (prediction, reference) pairs of class maps (H, W)."""
    data = [{"image": p[None, None].float(), "label": r[None, None].float()} for p, r in cases]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=data,
        network=torch.nn.Identity(),
        postprocessing=Compose([AsDiscreted(["pred", "label"], to_onehot=2)]),
        key_val_metric={
            "val_dice": MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))
        },
        val_handlers=[EmptyReferences()],
    )
    evaluator.run()
    return evaluator


def box(*rows):
    mask = torch.zeros(6, 8, dtype=torch.long)
    mask[list(rows), 1:5] = 1
    return mask


def test_false_positives_are_a_rate_of_their_own_and_leave_dice_alone():
    found = (box(1, 2), box(2, 3))  # Dice 1/2
    lesions_only = validate([found]).state.metrics
    assert lesions_only == {"val_dice": pytest.approx(0.5)}
    with_normals = validate([found, (box(), box()), (box(3), box()), (box(), box())]).state.metrics
    assert with_normals["val_dice"] == pytest.approx(0.5)
    assert with_normals["val_false_positive_rate"] == pytest.approx(1 / 3)
    assert with_normals["val_empty_references"] == 3


def test_a_missed_lesion_counts_as_nought_and_as_no_empty_reference():
    metrics = validate([(box(), box(1)), (box(1), box(1))]).state.metrics
    assert metrics == {"val_dice": pytest.approx(0.5)}


def test_every_validation_counts_anew():
    evaluator = validate([(box(1), box(1)), (box(3), box())])
    assert evaluator.state.metrics["val_false_positive_rate"] == 1
    evaluator.run()
    assert evaluator.state.metrics["val_empty_references"] == 1


def test_a_validation_without_any_foreground_is_an_error():
    with pytest.raises(ValueError, match="All 2 validation cases have an empty reference"):
        validate([(box(), box()), (box(1), box())])


def test_nothing_is_reported_where_no_reference_is_empty():
    engine = Engine(lambda engine, batch: [{"pred": torch.ones(2, 3, 3), "label": torch.ones(2, 3, 3)}])
    EmptyReferences().attach(engine)
    assert engine.run([0]).metrics == {}
