"""Every part of the method can be switched on by the bundle's config, and the published system runs as a preset."""

from __future__ import annotations

import csv

import pytest
import torch
from bundle_runs import read_json, run, settings, workflow
from ignite.engine import Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TEACHER = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]
ALL_LOSSES = {"output": 1.0, "feature": 0.2, "reconstruction": 0.2, "contrastive": 0.1}


def history_of(folder):
    return list(csv.DictReader((folder / "eval" / "history.csv").open()))


def small(folder, cache, **overrides):
    values = {"teachers": TEACHER, "admission": {"mode": "all"}, "max_epochs": 2, **overrides}
    return settings("kvasir_seg", folder, cache, **values)


def check_epochs(folder, rows, latest):
    """TensorBoard has every figure of every epoch, and the run record the last known value of each."""
    board = EventAccumulator(str(folder)).Reload()
    for name in rows[0].keys() - {"epoch"}:
        known = [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
        events = [(e.step, e.value) for e in board.Scalars(f"epoch/{name}")]
        assert [step for step, _ in events] == [epoch for epoch, _ in known], name
        assert [value for _, value in events] == pytest.approx([value for _, value in known], rel=1e-5), name
        assert latest[name] == pytest.approx(known[-1][1])
    assert latest["epoch"] == len(rows) and "train_loss" in board.Tags()["scalars"]


LEARNED = {"gate": "learned", "return_code": "learned", "losses": ALL_LOSSES, "loss_gate": "agreement"}
LEARNED |= {"loss_gate_options": {"every": 2}, "contrastive": {"negatives": 6}, "max_epochs": 3}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, cache):
    """A run with all that is learned, left alone."""
    folder = tmp_path_factory.mktemp("learned")
    run("kvasir_seg", ("train",), small(folder, cache, **LEARNED))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        LEARNED,
        {"gate": "uniform", "return_code": "learned", "losses": ALL_LOSSES},
        {"gate": "reliability", "return_code": "learned", "losses": ALL_LOSSES, "views": 2, "cache_dtype": "int8"},
    ],
    ids=["learned", "training-free", "views"],
)
def test_a_run_with_every_loss_trains_and_records(options, tmp_path, cache, learned):
    folder = learned if options is LEARNED else tmp_path
    if folder is tmp_path:
        run("kvasir_seg", ("train",), small(folder, cache, **options))
    rows = history_of(folder)
    for row in rows:
        assert float(row["weight_task"]) == 1
        for name in ALL_LOSSES:
            assert 0 < float(row[f"loss_{name}"]) < 100 and float(row[f"weight_{name}"]) > 0
            assert float(row[f"effective_teachers_{name}"]) == pytest.approx(1)
            assert float(row[f"weighted_{name}"]) > 0
        if options["gate"] == "learned":
            assert 0 <= float(row["gate_auc"]) <= 1 and float(row["loss_gate"]) >= 0
    assert float(rows[-1]["loss_feature"]) < float(rows[0]["loss_feature"])
    assert all(float(rows[0][f"gradient_{name}"]) > 0 for name in ("task", *ALL_LOSSES))
    record = read_json(folder / "eval" / "run.json")
    assert record["method"]["return_code"] == options["return_code"]
    check_epochs(folder / "eval", rows, record["latest"])
    keys = torch.load(folder / "models" / "distillation.pt", weights_only=True)["distiller"]
    for part in {"learned": ("teacher_gate", "codes", "contrast", "loss_gate.agreement")}.get(
        options["gate"], ("codes",)
    ):
        assert any(key.startswith(part) for key in keys), part


@pytest.mark.parametrize("bundle", ["kvasir_seg", "msd_heart", "aptos2019"])
def test_the_published_system_runs_as_a_preset(bundle, tmp_path, cache):
    values = settings(bundle, tmp_path, cache, teachers=TEACHER, **{"recipe#min_steps": 4})
    run(bundle, ("train", "paper"), values)
    rows = history_of(tmp_path)
    assert all(0 < float(row["weight_task"]) < 1 for row in rows)
    assert {f"loss_{n}" for n in ("task", "output", "feature", "reconstruction", "contrastive")} <= set(rows[0])
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["gate"] == "paper" and record["method"]["loss_gate"] == "paper"
    assert record["recipe"]["learning_rate"] == record["recipe"]["encoder_learning_rate"] == 1e-3
    assert record["recipe"]["weight_decay"] == 1e-4


def test_a_broken_off_run_resumes_to_the_same_student(learned, tmp_path, cache):
    whole, broken = learned, tmp_path
    started = workflow("kvasir_seg", ("train",), small(broken, cache, **LEARNED))

    def stop(engine):
        raise KeyboardInterrupt

    trainer = started.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_STARTED(once=trainer.state.epoch_length * 2 + 2), stop)
    with pytest.raises(KeyboardInterrupt):
        started.run()
    run("kvasir_seg", ("train",), small(broken, cache, resume=True, **LEARNED))
    first, second = (
        torch.load(f / "models" / "distillation.pt", weights_only=True)["distiller"] for f in (whole, broken)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert history_of(whole) == history_of(broken)


def test_an_unknown_mode_is_refused_in_one_sentence(tmp_path, cache):
    from amkd_monai.errors import root_cause

    for options in ({"loss_gate": "oracle"}, {"return_code": "oracle"}, {"gate_options": {"oracle": 1}}):
        with pytest.raises(RuntimeError) as caught:
            run("kvasir_seg", ("train",), small(tmp_path, cache, **options))
        text = str(root_cause(caught.value))
        assert "oracle" in text and text.endswith(".") and "\n" not in text
