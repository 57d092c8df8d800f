"""The report handler on a MONAI evaluator: 2D, a volume from NIfTI, two ranks."""

import json
import logging
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import case_metrics
from monai.data import DataLoader, Dataset, DistributedSampler, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Flipd,
    Invertd,
    LoadImaged,
    Orientationd,
    Spacingd,
)
from monai.utils import ImageMetaKey

from amkd_monai.engines.handlers import CaseReport
from amkd_monai.metrics.summary import read_case_csv


class Bright(torch.nn.Module):
    """Segments what is brighter than 0.5; stands for a student."""

    def forward(self, image):
        return torch.cat([0.5 - image[:, :1], image[:, :1] - 0.5], dim=1)


def evaluate(items, report, load=None, post=(), sampler=None, **options):
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(
            Dataset(items, load), batch_size=2 if load is None else 1, num_workers=0, sampler=sampler
        ),
        network=Bright(),
        inferer=SimpleInferer(),
        postprocessing=Compose([AsDiscreted("pred", argmax=True), *post]),
        val_handlers=[report],
        **options,
    )
    evaluator.run()
    return evaluator


def square(size, low, high):
    mask = torch.zeros(1, *size)
    mask[0, low:high, low:high] = 1
    return mask


def images(count=2, **more):
    """2D items: the first found but one pixel too low, the second missed."""
    items = []
    for n in range(count):
        label = square((12, 15), 3, 8)
        image = torch.roll(label, 1, dims=1) if n % 2 == 0 else torch.zeros_like(label)
        image = MetaTensor(image, meta={ImageMetaKey.FILENAME_OR_OBJ: f"/data/images/polyp.{n}.jpg"})
        items.append(
            {
                "image": image,
                "label": MetaTensor(label),
                **{key: f"{value}{n}" for key, value in more.items()},
            }
        )
    return items


def test_report_of_2d_images(tmp_path, caplog):
    facts = {"split_hash": "abc", "data": tmp_path}
    with caplog.at_level(logging.INFO, logger="amkd_monai"):
        evaluator = evaluate(images(), CaseReport("kvasir_seg", tmp_path / "out", facts=facts))
    rows = read_case_csv(tmp_path / "out" / "per_case.csv")
    assert [(row["id"], row["class"], row["status"]) for row in rows] == [
        ("polyp.0", "polyp", "ok"),
        ("polyp.1", "polyp", "missed"),
    ]
    assert rows[0]["dice"] == pytest.approx(0.8)
    assert (rows[0]["hd95"], rows[0]["reference_volume"]) == (1.0, 25.0)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["summary"]["metrics"]["dice"]["mean"] == pytest.approx(0.4)
    assert report["summary"]["metrics"]["hd95"]["ci_low"] is None  # NaN: a single case
    assert report["summary"]["status"] == {"missed": 1, "ok": 1}
    assert (report["task"], report["unit"], report["nsd_tolerance"]) == ("kvasir_seg", "px", 2.0)
    assert (report["split_hash"], report["data"]) == ("abc", str(tmp_path))
    metrics = evaluator.state.metrics
    assert (metrics["dice_mean"], metrics["cases_missed"], metrics["dice_n"]) == (pytest.approx(0.4), 1, 2)
    tables = [record.message for record in caplog.records if "95 % CI" in record.message]
    assert len(tables) == 1
    assert tables[0].startswith("kvasir_seg, HD95 in px (2 cases; missed 1, ok 1)")


def test_empty_references_are_reported_apart(tmp_path, caplog):
    items = images(3)
    items[1]["label"] = items[1]["label"] * 0  # rightly nothing found
    items[2]["label"] = items[2]["label"] * 0  # something found where there is nothing
    with caplog.at_level(logging.INFO, logger="amkd_monai"):
        metrics = evaluate(items, CaseReport("kvasir_seg", tmp_path)).state.metrics
    assert (metrics["dice_mean"], metrics["dice_n"]) == (pytest.approx(0.8), 1)
    assert (metrics["cases_empty_both"], metrics["cases_false_positive"], metrics["false_positive_rate"]) == (1, 1, 0.5)
    assert json.loads((tmp_path / "metrics.json").read_text())["summary"]["empty_references"] == 2
    assert "empty references, in no mean above: 2, of which 1 with a false positive" in caplog.text


def test_figures_of_some_cases_never_replace_those_of_all(tmp_path):
    skipped = []
    facts = {"student_sha256": "a", "skipped_samples": skipped}
    evaluate(images(3), CaseReport("kvasir_seg", tmp_path, facts=facts))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    skipped.append({"id": "polyp.2", "reason": "polyp.2.jpg cannot be read."})
    with pytest.raises(ValueError, match=r"metrics\.json .*polyp\.2\.jpg") as error:
        evaluate(images(2), CaseReport("kvasir_seg", tmp_path, facts=facts))
    assert "output_dir" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    evaluate(images(2), CaseReport("kvasir_seg", tmp_path, facts={**facts, "student_sha256": "b"}))
    assert len(read_case_csv(tmp_path / "per_case.csv")) == 2, "figures of an earlier student"


def test_the_id_of_the_datalist_comes_first(tmp_path):
    evaluate(images(id="patient_"), CaseReport("kvasir_seg", tmp_path))
    assert [row["id"] for row in read_case_csv(tmp_path / "per_case.csv")] == ["patient_0", "patient_1"]


def test_slices_of_one_file_are_cases_of_their_own(tmp_path):
    items = images(id="slice_")
    items[1]["image"].meta[ImageMetaKey.FILENAME_OR_OBJ] = items[0]["image"].meta[ImageMetaKey.FILENAME_OR_OBJ]
    evaluate(items, CaseReport("kvasir_seg", tmp_path))
    assert [row["id"] for row in read_case_csv(tmp_path / "per_case.csv")] == ["slice_0", "slice_1"]


def test_a_second_run_starts_afresh(tmp_path):
    evaluator = evaluate(images(), CaseReport("kvasir_seg", tmp_path))
    assert evaluator.state.metrics["cases_missed"] == 1
    evaluator.network.forward = lambda image: torch.cat([-torch.ones_like(image), image + 1], dim=1)
    evaluator.run()
    assert evaluator.state.metrics["cases_missed"] == 0
    assert [row["pred_volume"] for row in read_case_csv(tmp_path / "per_case.csv")] == [12 * 15, 12 * 15]


def test_a_repeated_file_counts_once_and_a_repeated_name_is_an_error(tmp_path):
    evaluate([*images(), *images()[:1]], CaseReport("kvasir_seg", tmp_path))
    assert len(read_case_csv(tmp_path / "per_case.csv")) == 2
    items = images()
    items[1]["image"].meta[ImageMetaKey.FILENAME_OR_OBJ] = "/data/more/polyp.0.jpg"
    with pytest.raises(ValueError, match=r"Case 'polyp.0' has two rows"):
        evaluate(items, CaseReport("kvasir_seg", tmp_path))


@pytest.fixture
def volumes(tmp_path):
    """Two volumes as NIfTI with anisotropic voxels, rotated and flipped against the world axes."""
    items = []
    affine = np.array([[0, -1.25, 0, 10], [1.5, 0, 0, -4], [0, 0, 4.0, 7], [0, 0, 0, 1]])
    for n in range(2):
        label = np.zeros((10, 12, 7), np.uint8)
        label[2:7, 3 + n : 8, 1:5] = 1
        image = np.roll(label, 1, axis=0).astype(np.float32)
        item = {"image": tmp_path / f"la_{n:03}.nii.gz", "label": tmp_path / f"label_{n}.nii.gz"}
        for array, path in ((image, item["image"]), (label, item["label"])):
            nib.save(nib.Nifti1Image(array, affine), path)
        items.append({**item, "arrays": (image, label)})
    return items


def load():
    return Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])])


def test_report_of_volumes_in_mm(tmp_path, volumes):
    arrays = [item.pop("arrays") for item in volumes]
    evaluate(volumes, CaseReport("msd_heart", tmp_path), load())
    rows = read_case_csv(tmp_path / "per_case.csv")
    assert [row["id"] for row in rows] == ["la_000", "la_001"]
    for row, (image, label) in zip(rows, arrays, strict=True):
        pred, reference = torch.from_numpy(image > 0.5), torch.from_numpy(label)
        (expected,) = case_metrics(pred, reference, 2, (1.5, 1.25, 4.0), 2.0, ["left atrium"])
        assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert rows[0]["hd95"] == 1.5
    assert rows[0]["reference_volume"] == pytest.approx(5 * 5 * 4 * 1.5 * 1.25 * 4)
    assert json.loads((tmp_path / "metrics.json").read_text())["unit"] == "mm"


def test_inverted_predictions_lie_on_the_grid_of_the_label(tmp_path, volumes):
    for item in volumes:
        del item["arrays"]
    spatial = [Orientationd("image", "RAS", labels=None), Spacingd("image", (1.0, 1.0, 2.0))]
    preprocessing = Compose([load(), *spatial])
    invert = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=True)
    evaluate(volumes, CaseReport("msd_heart", tmp_path), preprocessing, post=[invert])
    rows = read_case_csv(tmp_path / "per_case.csv")
    assert all(row["dice"] > 0.7 and row["hd95"] <= 3 for row in rows)


def test_prediction_on_another_grid_is_an_error(tmp_path, volumes):
    for item in volumes:
        del item["arrays"]
    with pytest.raises(ValueError, match="Case la_000: prediction and label lie on different grids"):
        evaluate(volumes, CaseReport("msd_heart", tmp_path), load(), post=[Flipd("pred", spatial_axis=0)])


def test_errors(tmp_path):
    with pytest.raises(TypeError, match="decollate=True"):
        evaluate(images(), CaseReport("kvasir_seg", tmp_path), decollate=False)
    nameless = images()
    del (
        nameless[0]["image"].meta[ImageMetaKey.FILENAME_OR_OBJ],
        nameless[1]["image"].meta[ImageMetaKey.FILENAME_OR_OBJ],
    )
    with pytest.raises(ValueError, match="neither an 'id' nor a file name"):
        evaluate(nameless, CaseReport("kvasir_seg", tmp_path))
    with pytest.raises(ValueError, match=r"Case polyp.0: 'pred' must be one label map"):
        evaluate(images(), CaseReport("kvasir_seg", tmp_path), post=[AsDiscreted("pred", to_onehot=2)])
    with pytest.raises(ValueError, match=r"Case polyp.0: reference holds labels from 0 to 3"):
        evaluate([{**item, "label": item["label"] * 3} for item in images()], CaseReport("kvasir_seg", tmp_path))
    assert not (tmp_path / "metrics.json").exists()


def run_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    items = images(3)
    sampler = DistributedSampler(Dataset(items), shuffle=False)  # 3 cases on 2 ranks: one of them twice
    evaluator = evaluate(items, CaseReport("kvasir_seg", folder / f"rank_{rank}"), sampler=sampler)
    (folder / f"state_{rank}.json").write_text(json.dumps(evaluator.state.metrics))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_write_one_report(tmp_path):
    torch.multiprocessing.start_processes(run_rank, (tmp_path,), nprocs=2, start_method="fork")
    rows = read_case_csv(tmp_path / "rank_0" / "per_case.csv")
    assert [row["id"] for row in rows] == ["polyp.0", "polyp.1", "polyp.2"]
    assert not (tmp_path / "rank_1").exists()
    states = [json.loads((tmp_path / f"state_{rank}.json").read_text()) for rank in range(2)]
    assert states[0] == states[1]
    assert states[0]["dice_mean"] == pytest.approx((0.8 + 0.0 + 0.8) / 3)
    assert math.isclose(states[0]["cases_missed"], 1)
