"""One student is trained on several data sets, compared, fine-tuned, resumed, and learns another one later."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest
import torch
from bundle_runs import SHARED, SMALL, read_json, run, settings, workflow
from helpers import ROOT
from ignite.engine import Events
from own_data import rimmed_pictures
from toy_task import TASK, write

from amkd_monai.bundles.new import new_bundle
from amkd_monai.data.datasets import TASKS, get_task
from amkd_monai.engines.multitask import teachers_of
from amkd_monai.errors import root_cause

TEACHER = {"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}
PAIR = ["kvasir_seg", "aptos2019"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def small(folder, cache, **overrides):
    values = {"teachers": [], "scale_steps": 3, "steps_per_epoch": 4, "only": PAIR}
    return settings(SHARED, folder, cache, **{**values, **overrides})


def entries(*names, **further):
    """The small entries of some tasks, with further settings for each."""
    return {name: {**SMALL[SHARED]["tasks"][name], **further} for name in names}


def table(path):
    return list(csv.DictReader(path.open()))


def refusal(values, configs=("train",), bundle=SHARED):
    """The sentence with which a run is refused."""
    with pytest.raises((RuntimeError, ValueError, OSError)) as caught:
        run(bundle, configs, values)
    text = str(root_cause(caught.value))
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.fixture(scope="module")
def everything(tmp_path_factory, cache):
    """All six tasks, 72 steps of all of them with one teacher; what validation said before, and the run's folder."""
    folder = tmp_path_factory.mktemp("everything")
    values = small(folder, cache, only=None, teachers=[TEACHER], tasks_per_step=6, steps_per_epoch=72, max_epochs=1)
    values |= {"recipe#learning_rate": 3e-3, "recipe#encoder_learning_rate": 1e-3}
    training = workflow(SHARED, ("train",), values)
    assert training.check_properties() == []
    evaluator = training.parser.get_parsed_content("validate#evaluator")
    evaluator.run(1)
    untrained = dict(evaluator.state.metrics)
    evaluator.state.best_metric, evaluator.state.best_metric_epoch = -1, -1
    training.parser.get_parsed_content("kept_student").best = -1.0
    training.run()
    return folder, values, untrained


def test_all_six_tasks_improve_over_their_untrained_state_in_one_run(everything):
    folder, _, untrained = everything
    (row,) = table(folder / "eval" / "history.csv")
    tasks = read_json(folder / "eval" / "run.json")["tasks"]
    assert len(tasks) == 6
    for task in tasks:
        name = f"{task}/val_{get_task(task).primary_metric}"
        assert float(row[name]) > untrained[name], name
        assert float(row[f"{task}/weight_task"]) == 1 and 0 < float(row[f"{task}/teacher_feature_lite1"]) <= 1
        assert float(row[f"{task}/gradient_task"]) > 0 and float(row[f"{task}/gradient_feature"]) > 0
    values = [float(row[f"{t}/val_{get_task(t).primary_metric}"]) for t in tasks]
    assert float(row["mean_over_tasks"]) == pytest.approx(sum(values) / 6)
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert not any("align" in k or "teacher" in k or "distiller" in k for k in state)
    assert float(state["calibration.aptos2019.temperature"]) == pytest.approx(float(row["aptos2019/temperature"]))


def test_it_is_evaluated_on_each_task_and_single_students_start_from_it(everything, cache, tmp_path):
    folder, values, _ = everything
    bundle, start = PAIR[1], str(folder / "models" / "model.pt")
    single = settings(bundle, tmp_path, cache / bundle, teachers=[], max_epochs=1, init_from=start)
    run(bundle, ("train",), single)
    assert read_json(tmp_path / "eval" / "run.json")["method"]["init_from"] == start
    text = refusal({**single, "split_seed": 1, "folds": 3}, bundle=bundle)
    assert "test image(s) of aptos2019" in text and "earlier " in text
    before = {"name": "before", "kind": "student", "weights": start}
    for options in ({**single, "teachers": [TEACHER]}, {**single, "init_from": None, "teachers": [before]}):
        assert f"{start} has learnt" in refusal(options, bundle=bundle), "no held-out score would be one"
    run(SHARED, ("train", "evaluate"), {**values, "only": PAIR})
    for task in PAIR:
        metrics = read_json(folder / "eval" / task / "metrics.json")["summary"]["metrics"]
        assert metrics[get_task(task).primary_metric]["ci_low"] <= 1


def test_one_head_predicts(everything, cache, tmp_path):
    folder, _, _ = everything
    images = write(tmp_path / "new", count=2) / "images"
    for task, written in (("kvasir_seg", "0?_mask.png"), ("aptos2019", "predictions.csv")):
        values = {"bundle_root": str(ROOT / "bundles" / SHARED), "task": task, "dataset_dir": str(images)}
        values |= {"output_dir": str(tmp_path / task), "ckpt_dir": str(folder / "models"), "cache_dir": str(cache)}
        values["entry"] = {"bundle": task, "image_size": 64}
        run(SHARED, ("inference",), values)
        assert len(list((tmp_path / task).glob(written))) == (2 if task == "kvasir_seg" else 1)
    assert len(table(tmp_path / "aptos2019" / "predictions.csv")) == 2


def test_the_published_system_runs_as_a_preset(cache, tmp_path):
    values = small(tmp_path, cache, teachers=[TEACHER], max_epochs=1)
    del values["admission"]  # the preset has its own
    run(SHARED, ("train", "paper"), values)
    (row,) = table(tmp_path / "eval" / "history.csv")
    for task in PAIR:
        assert 0 < float(row[f"{task}/weight_task"]) < 1
        assert all(float(row[f"{task}/loss_{n}"]) > 0 for n in ("output", "feature", "reconstruction", "contrastive"))
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["gate"] == "paper" and record["method"]["loss_gate"] == "paper"
    assert record["recipe"]["learning_rate"] == record["recipe"]["encoder_learning_rate"] == 1e-3


def killed_at(iteration, values):
    """Train in a forked process that is killed when an iteration starts."""
    child = os.fork()
    if child == 0:
        try:
            training = workflow(SHARED, ("train",), values)
            trainer = training.parser.get_parsed_content("train#trainer")
            kill = Events.ITERATION_STARTED(once=iteration)
            trainer.add_event_handler(kill, lambda _: os.kill(os.getpid(), signal.SIGKILL))
            training.run()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_run_that_was_killed_resumes_to_the_same_student(tmp_path, cache):
    options = {"only": [*PAIR, "msd_heart"], "teachers": [TEACHER], "tasks_per_step": 2, "max_epochs": 3}
    options |= {"gate": "learned", "loss_gate": "agreement", "return_code": "learned"}
    options["losses"] = {"output": 1.0, "feature": 0.2, "reconstruction": 0.2}
    options["loss_gate_options"] = {"every": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(SHARED, ("train",), small(whole, cache, **options))
    killed_at(6, small(broken, cache, **options))  # in the second epoch of four steps
    killed_at(11, small(broken, cache, resume=True, **options))
    run(SHARED, ("train",), small(broken, cache, resume=True, **options))
    for name in ("model.pt", "distillation.pt"):
        a, b = (torch.load(f / "models" / name, weights_only=True) for f in (whole, broken))
        a, b = (s.get("distiller", s) for s in (a, b))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert table(whole / "eval" / "history.csv") == table(broken / "eval" / "history.csv")
    assert "another tasks" in refusal(small(broken, cache, resume=True, **options, tasks=entries(*options["only"])))


def test_a_seventh_data_set_joins_later(tmp_path, cache, monkeypatch):
    """An entry is all that a data set needs; the previous student is one teacher of the new one."""
    monkeypatch.setitem(TASKS, "discs", TASK)
    first, second = tmp_path / "first", tmp_path / "second"
    values = small(first, cache)
    run(SHARED, ("train",), values)
    before = torch.load(first / "models" / "model.pt", weights_only=True)

    discs = {**entries("kvasir_seg")["kvasir_seg"], "task": "discs", "dataset_dir": str(write(tmp_path / "Discs"))}
    old = {"name": "before", "kind": "student", "weights": str(first / "models" / "model.pt")}
    more = {"tasks": {**entries(*PAIR), "discs": discs}, "teachers": [old], "init_parts": "known"}
    values = small(second, cache, **more, init_from=old["weights"])
    run(SHARED, ("train",), {**values, "only": ["discs"], "max_epochs": 4})
    after = torch.load(second / "models" / "model.pt", weights_only=True)
    heads = [k for k in before if k.startswith(("heads.", "calibration."))]
    assert all(torch.equal(before[k], after[k]) for k in heads), "heads without data are carried on as they are"
    assert "heads.discs.weight" in after
    history = table(second / "eval" / "history.csv")
    assert float(history[-1]["discs/val_dice"]) > 0.3
    assert float(history[-1]["discs/loss_feature"]) < float(history[0]["discs/loss_feature"])

    del values["init_from"], values["init_parts"]
    for name in PAIR:  # phantoms, named: tasks without data are left out where another one has some
        values["tasks"][name]["dataset_dir"] = str(next((cache / name / "phantoms").glob("*/")))
    run(SHARED, ("train", "evaluate"), {**values, "only": None})
    assert {file.parent.name for file in second.glob("eval/*/metrics.json")} == {*PAIR, "discs"}


class MasksAndFeatures(torch.nn.Module):
    """A specialist for masks: logits and a feature map."""

    def forward(self, image):
        small = torch.nn.functional.avg_pool2d(image, 8)
        return small[:, :2] * 4, small


def test_a_teacher_of_one_task_answers_there_and_gives_features_everywhere(tmp_path, cache):
    torch.jit.script(MasksAndFeatures()).save(str(tmp_path / "masks.ts"))
    masks = {"name": "masks", "kind": "specialist", "path": str(tmp_path / "masks.ts"), "tasks": ["kvasir_seg"]}
    values = small(tmp_path, cache, teachers=[masks], admission={"mode": "all"}, max_epochs=1)
    run(SHARED, ("train",), values)
    tasks = read_json(tmp_path / "eval" / "run.json")["tasks"]
    (of_masks,), (of_classes,) = (tasks[t]["distillation"]["teachers"] for t in PAIR)
    assert of_masks["answers"] == "its own" and of_classes["answers"].startswith("linear probe")


def test_a_described_bundle_of_three_classes_is_a_task_like_others(tmp_path, cache):
    bundle, _ = new_bundle("rims", rimmed_pictures(tmp_path / "polyps", 10), tmp_path / "bundles")
    phantoms = get_task("kvasir_seg").write_phantom(cache / "kvasir_seg" / "phantoms")
    tasks = {**entries("kvasir_seg", dataset_dir=str(phantoms)), "rims": {"bundle": str(bundle), "image_size": 64}}
    values = small(tmp_path, cache, tasks=tasks, only=None, max_epochs=1)
    run(SHARED, ("train",), values)
    (row,) = table(tmp_path / "eval" / "history.csv")
    assert 0 < float(row["rims/val_dice"]) < 1 and 0 < float(row["kvasir_seg/val_dice"]) < 1
    run(SHARED, ("train", "evaluate"), values)
    scored = table(tmp_path / "eval" / "rims" / "per_case.csv")
    assert {row["class"] for row in scored} >= {"class 1", "class 2"}
    metrics = tmp_path / "eval" / "rims" / "metrics.json"
    assert read_json(metrics)["description"]["classes"][2] == "class 2"

    def changed(name, old, new):
        file = bundle / "configs" / f"{name}.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    inference = {"bundle_root": values["bundle_root"], "task": "rims", "entry": {"bundle": str(bundle)}}
    inference |= {"dataset_dir": str(tmp_path / "polyps" / "images"), "output_dir": str(tmp_path / "masks")}
    inference |= {"ckpt_dir": values["ckpt_dir"], "cache_dir": str(cache)}
    changed("inference", '"a_max": 255.0', '"a_max": 510.0')
    assert "a_max" in refusal(inference, ("inference",)) and not (tmp_path / "masks").exists()
    changed("task", '"class 1",\n    "class 2"', '"class 2",\n    "class 1"')
    assert "class 2" in refusal(values, ("train", "evaluate"))


def test_a_default_of_a_bundle_that_changes_later_is_that_of_the_training(tmp_path, cache):
    bundle, _ = new_bundle("rims", rimmed_pictures(tmp_path / "polyps", 10), tmp_path / "bundles")
    file, scores = bundle / "configs" / "train.json", []
    values = small(tmp_path, cache, tasks={"rims": {"bundle": str(bundle)}}, only=None, max_epochs=1)
    for size, configs in ((64, ("train",)), (64, ("train", "evaluate")), (32, ("train", "evaluate"))):
        file.write_text(json.dumps({**read_json(file), "image_size": size}))
        run(SHARED, configs, values)
        scores += [(tmp_path / "eval" / "rims" / "per_case.csv").read_text()] if len(configs) > 1 else []
    assert scores[0] == scores[1]


def test_a_test_image_of_one_task_is_no_training_image_of_another(tmp_path, cache):
    pictures = rimmed_pictures(tmp_path / "polyps", 10)
    tasks = {name: {"bundle": str(new_bundle(name, pictures, tmp_path)[0]), "image_size": 64} for name in ("a", "b")}
    tasks["b"]["split_seed"] = 1
    text = refusal(small(tmp_path, cache, tasks=tasks, only=None))
    assert "test image(s) of a" in text and " of b" in text


def test_the_matrix_of_teachers_and_tasks():
    specialist = {"name": "s", "kind": "crew", "tasks": ["a"]}
    masks = {"name": "m", "kind": "specialist", "tasks": ["a"]}

    def row(task):
        return [(t["name"], t.get("own_answers", True)) for t in teachers_of(task, [TEACHER, specialist, masks])]

    assert row("a") == [("lite1", True), ("s", True), ("m", True)]
    assert row("b") == [("lite1", True), ("m", False)]
    assert not any("tasks" in t for t in teachers_of("a", [masks]))


def test_bad_input_is_refused_in_one_sentence(tmp_path, cache):
    twice = {**entries(*PAIR), "again": {**entries("kvasir_seg")["kvasir_seg"]}}
    text = refusal(small(tmp_path, cache, tasks=twice))
    assert "'kvasir_seg' and 'again'" in text and "task kvasir_seg" in text
    text = refusal(small(tmp_path, cache, tasks=entries(*PAIR, **{"network_def#num_classes": 3})))
    assert "'kvasir_seg' has 3 classes" in text and "2 (background, polyp)" in text
    text = refusal(small(tmp_path, cache, tasks=entries(*PAIR, oracle=3)))
    assert "'kvasir_seg' has no setting 'oracle'" in text
    assert "no task 'brain'" in refusal(small(tmp_path, cache, only=["brain"]))
    assert "no folder" in refusal(small(tmp_path, cache, dataset_dir=str(tmp_path / "nowhere")))
    assert "has no" in refusal(small(tmp_path, cache, tasks={"kvasir_seg": {"bundle": "oracle"}}, only=None))


def test_a_data_set_that_becomes_empty_is_named(tmp_path, cache):
    tasks = entries(*PAIR)
    tasks["kvasir_seg"]["split_fractions"] = [1.0, 0.0, 0.0]
    text = refusal(small(tmp_path, cache, tasks=tasks))
    assert text.startswith("Task 'kvasir_seg': ") and "empty" in text


def test_tasks_without_data_are_announced_and_left_out(tmp_path, cache, caplog):
    tasks = entries(*PAIR, "busi")
    tasks["kvasir_seg"]["dataset_dir"] = str(next((cache / "kvasir_seg" / "phantoms").glob("*/")))
    run(SHARED, ("train",), small(tmp_path, cache, tasks=tasks, only=None, max_epochs=1))
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["missing_tasks"] == ["aptos2019", "busi"] and list(record["tasks"]) == ["kvasir_seg"]
    assert sum("continues without it" in message for message in caplog.messages) == 2


def test_a_checkpoint_with_other_heads_is_refused(everything, tmp_path, cache):
    folder, _, _ = everything
    text = refusal(small(tmp_path, cache, init_from=str(folder / "models" / "model.pt")))
    assert "missing: none; surplus: " in text and "busi" in text and "encoder" in text
