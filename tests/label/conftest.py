"""Small students trained on phantoms, as bundles; real images as studies; what offline inference says of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel
import numpy as np
import pytest
from bundle_runs import run, settings
from helpers import ROOT, shared_data
from label_server import Answer, LabelServer, label_python, png
from own_data import rimmed_pictures
from PIL import Image

from amkd_monai.bundles.new import new_bundle
from amkd_monai.metrics.summary import read_case_csv

MODELS = ("msd_heart", "busi", "aptos2019")


@dataclass
class Lab:
    """A server with its bundles and studies; images are named by their ids."""

    bundles: dict[str, Path]
    studies: Path
    images: dict[str, list[str]]
    work: Path
    server: LabelServer

    def file(self, image: str) -> Path:
        return next(self.studies.glob(f"{image}.*"))

    def put_image(self, name: str, content: bytes, file: str = "x.png", **params: Any) -> Answer:
        return self.server.send(f"/datastore/image?image={name}", "PUT", json.dumps(params), file=(file, content))

    def put_label(self, name: str, content: bytes, file: str = "mask.png", tag: str = "final") -> Answer:
        return self.server.send(f"/datastore/label?image={name}&tag={tag}", "PUT", label=(file, content))

    def mask(self, image: str, share: float = 7 / 8) -> bytes:
        """A mask of the lower part of a picture."""
        width, height = Image.open(self.file(image)).size
        mask = np.ones((height, width), np.uint8)
        mask[: round(height * (1 - share))] = 0
        return png(mask)

    def kept(self) -> dict[tuple[str, ...], bytes]:
        """Content of the replaced files, by their path in the studies."""
        folder = self.studies / "replaced"
        return {f.relative_to(folder).parts[1:]: f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    def offline(self, model: str, folder: Path) -> Path:
        """Run the bundle's own inference over the studies of one model; return the folder of its answers."""
        data = folder / "data"
        data.mkdir()
        for image in self.images[model]:
            shutil.copy(self.file(image), data)
        values = {"bundle_root": str(self.bundles[model]), "dataset_dir": str(data), "output_dir": str(folder / "out")}
        run(model, ("inference",), {**values, "cache_dir": str(folder / "cache")})
        return folder / "out"

    def offline_mask(self, model: str, image: str, folder: Path) -> np.ndarray:
        file = next(self.offline(model, folder).glob(f"{image}_mask.*"))
        return np.asarray(Image.open(file)) > 0 if file.suffix == ".png" else nibabel.load(file).get_fdata() > 0

    def offline_classes(self, model: str, folder: Path) -> dict[str, dict]:
        return {row["id"]: row for row in read_case_csv(self.offline(model, folder) / "predictions.csv")}


def _studies(folder: Path) -> dict[str, list[str]]:
    folder.mkdir()
    shutil.copy(shared_data("MSD-Heart", "Task02_Heart_half", "imagesTr", "la_003.nii.gz"), folder)
    eyes = sorted(shared_data("APTOS2019_standin_IDRiD", "train_images").glob("*.png"))[:6]
    breasts = shared_data("BUSI", "Dataset_BUSI_with_GT", "malignant")
    scans = sorted(file for file in breasts.glob("*.png") if "mask" not in file.name)[:6]
    for file in eyes:
        shutil.copy(file, folder)
    for number, file in enumerate(scans):
        shutil.copy(file, folder / f"busi{number}.png")
    return {
        "msd_heart": ["la_003"],
        "busi": [f"busi{number}" for number in range(len(scans))],
        "aptos2019": [file.stem for file in eyes],
    }


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Bundles trained for one epoch, by name."""
    label_python()
    folder = tmp_path_factory.mktemp("bundles")
    trained = {name: folder / name for name in MODELS}
    for name, bundle in trained.items():
        run(name, ("train",), settings(name, bundle, folder / "cache" / name, teachers=[], max_epochs=1))
        shutil.copytree(ROOT / "bundles" / name / "configs", bundle / "configs")
    config = trained["aptos2019"] / "configs" / "train.json"
    config.write_text(config.read_text().replace('"teachers": "auto"', '"teachers": "imagenet"'))
    named = ["background", "rim", "polyp"], "(patient[0-9]+)_"
    own, _ = new_bundle("rims", rimmed_pictures(folder / "polyps", 8), folder, *named)
    small = {"teachers": [], "max_epochs": 1, "image_size": 64, "recipe#min_steps": 12, "bundle_root": str(own)}
    monai.bundle.run(run_id="training", config_file=str(own / "configs" / "train.json"), **small)
    killed = Path(shutil.copytree(folder / "busi", folder / "killed"))  # a student of its own for the kills
    return {**trained, "rims": own, "killed": killed}


@pytest.fixture(scope="session")
def lab(tmp_path_factory, bundles):
    folder = tmp_path_factory.mktemp("lab")
    images = _studies(folder / "studies")
    server = LabelServer(list(bundles.values()), folder / "studies", folder / "work")
    server.start()
    yield Lab(bundles, folder / "studies", images, folder / "work", server)
    server.stop()
