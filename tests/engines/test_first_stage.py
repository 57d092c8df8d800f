"""In the first stage a student learns teachers' answers alone; labels, and labelled samples alone, come afterwards."""

from __future__ import annotations

import pytest
import torch
from test_prepare import LITE1, discs, load, prepare

from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.distillation import DistillationConfig, Distiller
from amkd_monai.engines.trainer import DistillationTrainer, Recipe
from amkd_monai.networks import Student


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first_stage")
    items = discs(folder, 12)
    items[8:] = [{key: value for key, value in item.items() if key != "label"} for item in items[8:]]
    validation = DecodedDataset(discs(folder, 4, seed=1), load, folder / "cache")
    return DecodedDataset(items, load, folder / "cache"), validation, folder


def states(data, targets, change, first_stage=0.5, epochs=2, losses=None):
    """The student's weights after each epoch, and the samples it saw; ``change`` is made to the labels of batches."""
    recipe = Recipe(batch_size=4, min_steps=3, first_stage=first_stage)
    alone = DistillationConfig(
        gate="uniform", losses=losses or {"output": 1.0}, loss_gate="scaled"
    )  # gates learn from labels
    distiller = Distiller(Student(seed=0), targets.teachers, config=alone)
    loader = recipe.loader(data[0], 0, use_unlabelled=True)
    trainer = DistillationTrainer("cpu", epochs, loader, distiller, recipe.optimizer(distiller), targets)
    trainer.logger.setLevel("WARNING")
    prepared, seen, found = trainer.prepare_distillation_batch, [], []

    def prepare_changed(raw):
        seen.append((trainer.state.epoch, raw["index"].tolist()))
        batch = prepared(raw)
        batch.label.copy_(change(batch.label))
        return batch

    trainer.prepare_distillation_batch = prepare_changed
    weights = distiller.student.encoder.state_dict
    trainer.add_event_handler("EPOCH_COMPLETED", lambda _: found.append({k: v.clone() for k, v in weights().items()}))
    trainer.run()
    return found, seen


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_labels_are_learnt_behind_the_first_stage_only(data):
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    (as_they_are, seen), (inverted, _) = (states(data, targets, of) for of in (lambda x: x, lambda x: 1 - x))
    assert equal(as_they_are[0], inverted[0]) and not equal(as_they_are[1], inverted[1])
    of_epoch = {epoch: {i for at, rows in seen if at == epoch for i in rows} for epoch in (1, 2)}
    assert of_epoch[1] & {8, 9, 10, 11} and not of_epoch[2] & {8, 9, 10, 11}


@pytest.mark.parametrize(("mode", "first_stage", "loss"), [("none", 0.5, "feature"), ("all", 0.0, "output")])
def test_labels_are_learnt_throughout_without_answers_or_stages(data, mode, first_stage, loss):
    targets = prepare(data, [LITE1], admission_options={"mode": mode})
    found = [states(data, targets, of, first_stage, 1, {loss: 1.0})[0][0] for of in (lambda x: x, lambda x: 1 - x)]
    assert not equal(*found)
