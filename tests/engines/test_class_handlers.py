"""Handlers of class runs: they score, calibrate, report and write what the evaluator answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from amkd_monai.engines.handlers import CalibrateClasses, CaseReport, ClassPredictions, ClassScore, KeptStudent
from amkd_monai.metrics.summary import read_case_csv
from amkd_monai.networks import ClassStudent, FindingStudent

N = 40


def answers(classes, seed=0, sharpness=4.0):
    """Logits that are right more often than not, and far too sure."""
    rng = np.random.default_rng(seed)
    label = np.arange(N) % classes
    z = sharpness * (rng.normal(size=(N, classes)) + np.eye(classes)[label])
    return torch.from_numpy(z).float(), torch.from_numpy(label)


def evaluator(z, label):
    """An engine over batches of 8 whose output is decollated."""

    def step(engine, rows):
        engine.state.batch = [{"id": f"c{i:02d}"} for i in rows]
        return [{"pred": z[i].softmax(0), "label": label[i]} for i in rows]

    return Engine(step)


def run(engine):
    engine.run([range(i, i + 8) for i in range(0, N, 8)])


def test_the_score_is_that_of_the_whole_epoch_by_the_tasks_metric():
    for task, classes in (("aptos2019", 5), ("isic2017", 3)):
        z, label = answers(classes)
        engine = evaluator(z, label)
        ClassScore(task).attach(engine, "score")
        run(engine)
        p = z.softmax(1).numpy()
        if task == "aptos2019":
            expected = cohen_kappa_score(label, p.argmax(1), weights="quadratic")
        else:
            expected = np.mean([roc_auc_score(label == c, p[:, c]) for c in (1, 2)])
        assert engine.state.metrics["score"] == pytest.approx(expected, abs=1e-6)


def test_the_temperature_is_the_likeliest_one_and_is_saved_with_the_student(tmp_path):
    z, label = answers(3)
    student = ClassStudent(num_classes=3, weights="random")
    student.temperature.fill_(5.0)
    engine = evaluator(z, label)
    CalibrateClasses(student).attach(engine)
    ClassScore("isic2017").attach(engine, "val_mean_auc")
    engine.state.key_metric_name = "val_mean_auc"
    KeptStudent(student, tmp_path / "model.pt").attach(engine)
    run(engine)
    candidates = np.geomspace(0.25, 8, 400)
    likely = [float(torch.nn.functional.cross_entropy(z / t, label)) for t in candidates]
    fitted = float(torch.load(tmp_path / "model.pt", weights_only=True)["temperature"])
    assert fitted == pytest.approx(candidates[int(np.argmin(likely))], rel=0.02) and fitted > 1.5
    run(engine)
    assert float(student.temperature) == pytest.approx(fitted), "a second validation doesn't build on the first"


@pytest.mark.parametrize("findings", [False, True])
def test_unsure_answers_are_saved_near_to_the_frequencies_of_the_batches(findings):
    rng = torch.Generator().manual_seed(1)
    frequencies = np.array([[0.9, 0.4, 0.5], [0.1, 0.6, 0.5]]) if findings else np.array([0.7, 0.2, 0.1])
    p = torch.from_numpy(frequencies).float()
    draws = torch.rand((400, 3), generator=rng) < p[1] if findings else torch.multinomial(p.expand(400, 3), 1)[:, 0]
    z = 0.5 * torch.randn((400, *p.shape), generator=rng) + p.log()  # noise about what is frequent
    student = (FindingStudent if findings else ClassStudent)(num_classes=3, weights="random")
    label = draws.long() @ (1 << torch.arange(3)) if findings else draws
    for _ in range(2):  # the second validation builds on nothing of the first
        engine = evaluator(z, label)
        CalibrateClasses(student, frequencies).attach(engine)
        run(engine)
        assert float(student.temperature) > 3 and not student.offsets[:1].any()
        calibrated = (z / student.temperature + student.offsets).softmax(1).mean(0)
        torch.testing.assert_close(calibrated, p, atol=0.03, rtol=0)
    CalibrateClasses(student).attach(engine := evaluator(z, label))
    run(engine)
    assert not student.offsets.any()


def test_a_validation_that_says_nothing_is_refused(tmp_path):
    z, _ = answers(3)
    engine = evaluator(z, torch.zeros(N, dtype=torch.long))
    ClassScore("isic2017").attach(engine, "val_mean_auc")
    engine.state.key_metric_name = "val_mean_auc"
    KeptStudent(ClassStudent(num_classes=3, weights="random"), tmp_path / "model.pt").attach(engine)
    with pytest.raises(ValueError, match="val_mean_auc"):
        run(engine)


def test_a_report_holds_the_probabilities_of_every_case(tmp_path):
    z, label = answers(5)
    engine = evaluator(z, label)
    CaseReport("aptos2019", tmp_path, facts={"student": "x"}).attach(engine)
    run(engine)
    rows = read_case_csv(tmp_path / "per_case.csv")
    assert [r["id"] for r in rows] == [f"c{i:02d}" for i in range(N)]
    columns = ["p_no_dr", "p_mild", "p_moderate", "p_severe", "p_proliferative"]
    np.testing.assert_allclose([[r[c] for c in columns] for r in rows], z.softmax(1).numpy(), atol=1e-6)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["task"] == "aptos2019" and report["student"] == "x"
    assert report["summary"]["metrics"]["qwk"]["value"] == pytest.approx(engine.state.metrics["qwk"])
    assert sum(row["count"] for row in report["summary"]["reliability"]) == N


def test_an_answer_that_is_no_probability_names_its_case(tmp_path):
    z, label = answers(5)
    engine = Engine(lambda e, rows: [{"id": "c7", "pred": z[0], "label": label[0]}])
    CaseReport("aptos2019", tmp_path).attach(engine)
    with pytest.raises(ValueError, match="Case c7: 'pred' must be 5 probabilities"):
        engine.run([[{"id": "c7"}]])


def test_predictions_need_no_label(tmp_path):
    z, label = answers(3)
    engine = evaluator(z, label)
    ClassPredictions("isic2017", tmp_path).attach(engine)
    run(engine)
    run(engine)
    rows = read_case_csv(tmp_path / "predictions.csv")
    assert len(rows) == N and set(rows[0]) == {
        "id", "class", "prediction", "p_nevus", "p_melanoma", "p_seborrheic_keratosis"
    }  # fmt: skip
    assert [r["prediction"] for r in rows] == z.argmax(1).tolist()
