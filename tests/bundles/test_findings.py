"""Several findings per picture: from a table of 0 and 1 to scores, export and prediction, against scikit-learn."""

from __future__ import annotations

import csv

import monai.bundle
import numpy as np
import onnxruntime
import pytest
from bundle_runs import read_json
from own_data import FINDINGS, finding_pictures
from sklearn.metrics import accuracy_score, brier_score_loss, recall_score, roc_auc_score

from amkd_monai.__main__ import main
from amkd_monai.bundles.new import new_bundle
from amkd_monai.data.check import check_data
from amkd_monai.data.datalist import datalist, find_items
from amkd_monai.data.datasets import get_task
from amkd_monai.export.predict import Predictor, predict
from amkd_monai.label.student import ServedStudent
from amkd_monai.metrics.compare import compare_runs
from amkd_monai.metrics.summary import read_case_csv

CREW = {"name": "crew", "kind": "crew", "folds": 2, "images": 48, "members": [{"seed": 0}], "image_size": 1}
TEACHERS = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}, CREW]
QUICK = {
    "max_epochs": 2,
    "teachers": TEACHERS,
    "admission": {"mode": "all"},
    "recipe#batch_size": 8,
    "recipe#min_steps": 8,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return finding_pictures(tmp_path_factory.mktemp("findings"))


def bits(number):
    return [int(number) >> place & 1 for place in range(3)]


def test_findings_are_trained_scored_exported_and_predicted(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "chest", "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "columns that are no findings: image, patient, age" in said and "mass " in said
    assert main(["data", "check", "bundles/chest"]) == 0, capsys.readouterr()
    bundle = tmp_path / "bundles" / "chest"
    train, evaluate, infer = (str(bundle / "configs" / f"{n}.json") for n in ("train", "evaluate", "inference"))
    monai.bundle.run(run_id="training", config_file=train, **QUICK)
    monai.bundle.run(config_file=[train, evaluate], **QUICK)
    record, summary = read_json(bundle / "eval" / "run.json"), read_json(bundle / "eval" / "metrics.json")["summary"]
    teachers = record["distillation"]["teachers"]
    assert [t["name"] for t in teachers] == ["lite1", "crew"] and all(t["macro_auroc"] > 0.6 for t in teachers)

    with (data / "labels.csv").open() as file:
        truth = {row["image"]: [int(row[name]) for name in FINDINGS] for row in csv.DictReader(file)}
    cases = read_case_csv(bundle / "eval" / "per_case.csv")
    y = np.array([truth[f"{int(row['id']):02d}"] for row in cases])
    p = np.array([[row["p_mass"], row["p_fluid_level"], row["p_stripes"]] for row in cases])
    assert [bits(row["label"]) for row in cases] == y.tolist()
    assert [bits(row["prediction"]) for row in cases] == (p >= 0.5).astype(int).tolist()
    found = {name: value["value"] for name, value in summary["metrics"].items()}
    expected = {
        f"{name}_auc": roc_auc_score(y[:, k], p[:, k]) for k, name in enumerate(("mass", "fluid_level", "stripes"))
    }
    expected |= {
        "macro_auroc": roc_auc_score(y, p, average="macro"),
        "brier": 2 * brier_score_loss(y.ravel(), p.ravel()),
    }
    expected |= {"accuracy": accuracy_score(y.ravel(), p.ravel() >= 0.5)}
    expected["mass_sensitivity"] = recall_score(y[:, 0], p[:, 0] >= 0.5)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert summary["classes"] == dict(zip(FINDINGS, y.sum(0).tolist(), strict=True))
    page = (bundle / "eval" / "report.html").read_text()
    assert "Fluid level" in page and "Confusion" not in page
    same = compare_runs(
        bundle / "eval" / "per_case.csv",
        {"b": bundle / "eval" / "per_case.csv"},
        task=get_task(bundle / "configs" / "task.json"),
    )
    assert {row["test"] for row in same} <= {"DeLong", "bootstrap"} and all(row["difference"] == 0 for row in same)

    monai.bundle.run(config_file=infer, dataset_dir=str(data / "images"))
    offline = {int(row["id"]): row for row in read_case_csv(bundle / "eval" / "predictions" / "predictions.csv")}
    assert main(["export", "bundles/chest", "--to", "out", "--formats", "ts,onnx,hub,triton", "--cases", "4"]) == 0
    assert predict(Predictor(tmp_path / "out"), data / "images", tmp_path / "answers") == 0
    table = {int(row["id"]): row for row in read_case_csv(tmp_path / "answers" / "predictions.csv")}
    assert len(table) == len(offline) == 64
    for case, row in table.items():
        values = [row[f"p_{name}"] for name in ("mass", "fluid_level", "stripes")]
        assert values == pytest.approx(
            [offline[case][f"p_{name}"] for name in ("mass", "fluid_level", "stripes")], abs=2e-3
        )
        named = "|".join(name for name, value in zip(FINDINGS, values, strict=True) if value >= 0.5) or "none"
        assert row["class"] == named
    plain = {"bundle_root": str(tmp_path / "out"), "output_dir": str(tmp_path / "plain")}
    monai.bundle.run(
        config_file=str(tmp_path / "out/configs/inference.json"), dataset_dir=str(data / "images"), **plain
    )
    with (tmp_path / "plain" / "predictions.csv").open() as file:
        rows = {row[0].split("/")[-1].removesuffix(".png"): [float(v) for v in row[1:]] for row in csv.reader(file)}
    assert rows["07"] == pytest.approx([table[7][f"p_{n}"] for n in ("mass", "fluid_level", "stripes")], abs=2e-3)
    network = onnxruntime.InferenceSession(str(tmp_path / "out" / "models" / "model.onnx"))
    assert "dims: [2, 3]" in (tmp_path / "out" / "triton" / "out" / "config.pbtxt").read_text()
    assert network.get_outputs()[0].shape[1:] == [2, 3]
    assert main(["evaluate", "out", "--data", str(data), "--output", "scores", "--seen", "apart"]) == 0
    again = {row["id"]: row for row in read_case_csv(tmp_path / "scores" / "per_case.csv")}
    for row in cases:
        assert again[row["id"]]["label"] == row["label"] and again[row["id"]]["p_mass"] == pytest.approx(
            row["p_mass"], abs=2e-3
        )
    assert Predictor(tmp_path / "out").answer(data / "images" / "07.png").shape == (3,)
    served = ServedStudent(bundle).answer(data / "images" / "07.png").tolist()
    assert served == pytest.approx([offline[7][f"p_{n}"] for n in ("mass", "fluid_level", "stripes")], abs=1e-5)


def test_tables_of_findings_are_read_or_refused_by_row_and_column(data, tmp_path, capsys):
    root = tmp_path / "xray"
    (root / "images").mkdir(parents=True)
    for number in range(12):
        (root / "images" / f"{number}.png").write_bytes((data / "images" / f"{number:02d}.png").read_bytes())

    def table(labels, header="Image Index,Finding Labels,Patient ID"):
        lines = [f"{number}.png,{label},{number // 2}" for number, label in enumerate(labels)]
        (root / "labels.csv").write_text("\n".join([header, *lines]))

    table(["No Finding", "Mass|Pleural Effusion", "Mass", "Pleural Effusion"] * 3)
    bundle, facts = new_bundle("words", root, tmp_path / "b")
    task = get_task(bundle / "configs" / "task.json")
    assert task.has_findings and task.classes == ("Mass", "Pleural Effusion") and "none of them 3" in "\n".join(facts)
    items = {item["id"]: item for item in find_items(task, root)}
    assert [items[str(n)]["label"] for n in range(4)] == [0, 3, 1, 2] and items["3"]["group"] == "1"
    found = datalist(task, root)
    groups = [{item["group"] for item in section} for section in (found.train, found.validation, found.test)]
    assert not groups[0] & groups[1] and not groups[1] & groups[2] and not groups[0] & groups[2]

    table(["none", "Mass|rib", "", "Mass"] * 3)
    problems = check_data(task, root).problems
    assert any("1.png" in p and "rib" in p for p in problems) and any("'2.png'" in p for p in problems)
    assert any("No image" in p and "Pleural Effusion" in p for p in problems)

    for odd in ("2", "", "nan"):
        table(["1,0,1", f"1,{odd},0", *["1,0,0", "1,1,1"] * 5], "image,mass,rib,device,patient")
        with pytest.raises(ValueError, match=f"rib and has '{odd}'"):
            new_bundle("odd", root, tmp_path / "b")
    table(["nan", "a||b", *["a", "b"] * 5], "image,label,patient")
    with pytest.raises(ValueError, match=r"a\|\|b"):
        new_bundle("odd", root, tmp_path / "b")
    table(["nan", *["a", "b", "a|b"] * 3], "image,label,patient")
    task = get_task(new_bundle("said", root, tmp_path / "b")[0] / "configs" / "task.json")
    assert task.classes == ("a", "b") and any("0.png" in problem for problem in check_data(task, root).problems)

    table(["a;b", "a", "b"] * 4, "image,label,patient")
    with pytest.raises(ValueError, match="'a;b'"):
        new_bundle("odd", root, tmp_path / "b")
    table(["0.0", "10.0", "2.0"] * 4, "image,label,patient")
    task = get_task(new_bundle("decimals", root, tmp_path / "b")[0] / "configs" / "task.json")
    assert task.classes == ("0", "2", "10") and {i["id"]: i["label"] for i in find_items(task, root)}["4"] == 2

    table(["1,0,1", "1,1,0", "1,0,0", "1,0,1"] * 3, "image,mass,rib,device,patient")
    bundle, _ = new_bundle("columns", root, tmp_path / "b", classes=["rib", "mass"], groups="patient")
    task = get_task(bundle / "configs" / "task.json")
    assert [item["label"] for item in find_items(task, root)][:3] == [2, 3, 2]
    problems = check_data(task, root).problems
    assert any("Every image" in p and "mass" in p for p in problems)
    table(["1,0,1", "1,2,0", "1,,0", "1,0,1"] * 3, "image,mass,rib,device,patient")
    problems = check_data(task, root).problems
    assert sum("'1.png'" in p for p in problems) == 1 and sum("'2.png'" in p for p in problems) == 1
    with pytest.raises(ValueError, match="rib"):
        new_bundle("wrong", root, tmp_path / "b", classes=["rib", "mass"])
    with pytest.raises(ValueError, match="ribs"):
        new_bundle("wrong", root, tmp_path / "b", classes=["ribs", "mass"])


def test_a_table_of_findings_counts_before_the_folder_of_its_pictures(data, tmp_path):
    root = tmp_path / "xray"
    for folder in ("img", "more"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        (root / "img" / f"{number}.png").write_bytes((data / "images" / f"{number:02d}.png").read_bytes())
    (root / "labels.csv").write_text(
        "\n".join(["file,mass,rib", *(f"img/{n}.png,{n % 2},{n % 3 % 2}" for n in range(12))])
    )
    bundle, _ = new_bundle("one", root, tmp_path / "b")
    task = get_task(bundle / "configs" / "task.json")
    assert task.has_findings and [i["label"] for i in find_items(task, root)] == [
        n % 2 + 2 * (n % 3 % 2) for n in range(12)
    ]
    (root / "img" / "11.png").rename(root / "more" / "11.png")
    with pytest.raises(ValueError, match="--kind classification or --kind multilabel"):
        new_bundle("two", root, tmp_path / "b")
    bundle, _ = new_bundle("folders", root, tmp_path / "b", kind="classification")
    assert get_task(bundle / "configs" / "task.json").classes == ("img", "more")
    (root / "labels.csv").write_text("file,mass,age\nimg/1.png,1,50\nimg/2.png,,60\nimg/3.png,0,61\n")
    bundle, _ = new_bundle("ages", root, tmp_path / "b")
    assert get_task(bundle / "configs" / "task.json").classes == ("img", "more")
