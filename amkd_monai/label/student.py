"""A trained bundle opened for serving: predicts an image file as the bundle does, with its uncertainty."""

import copy
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Activationsd, Compose
from PIL import Image
from torch import Tensor

from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import read_item
from amkd_monai.data.transforms import SaveMaskd
from amkd_monai.engines import runs
from amkd_monai.files.cases import read_case
from amkd_monai.files.names import PICTURE_SUFFIXES, VOLUME_SUFFIXES, has_suffix
from amkd_monai.files.volumes import volume_grid, write_mask_volume
from amkd_monai.storage import atomic_path, file_sha256, size_and_time
from amkd_monai.terminal import logger
from amkd_monai.weights import load_state_dict, load_strict


class ServedStudent:
    """The student of a bundle with its preprocessing and postprocessing, all from ``configs/inference.json``.

    The transforms are given the image file and nothing else: what a server adds to a request never reaches them. The
    weights are read again when ``models/model.pt`` has changed.

    Attributes:
        task: of the bundle.
        model: the file of weights.
        suffixes: the kinds of file it takes.
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.model = Path(bundle), Path(bundle) / "models" / "model.pt"
        parser = ConfigParser()
        parser.read_config(str(self.bundle / "configs" / "inference.json"))
        parser["bundle_root"] = str(self.bundle)
        runs.adopt(parser, "serving", {})
        self.task = get_task(parser.get_parsed_content("task"))
        if count := len(self.task.channels):
            raise ValueError(f"{bundle} takes {count} files an image, the label server one: use `predict`.")
        self.suffixes = PICTURE_SUFFIXES if self.task.dimensions == 2 else VOLUME_SUFFIXES
        names = ("device", "network", "inferer", "preprocessing", "postprocessing")
        self._device, network, self._inferer, self._before, postprocessing = map(parser.get_parsed_content, names)
        self._network, after = network.eval(), postprocessing.transforms
        ends = [i for i, t in enumerate(after) if isinstance(t, SaveMaskd)]
        self._activation: Activationsd = after[0]
        self._after = Compose(after[1 : ends[0]] if ends else after[1:])
        self._loaded: list[int] = []
        self._lock = threading.Lock()

    def takes(self, image: str | Path) -> bool:
        """Whether a file is of the right kind, by its name."""
        return has_suffix(image, self.suffixes)

    def suitable(self, datastore: Any, images: Iterable[str]) -> dict[str, str]:
        """Map id to file of the images that it takes; a series that is no whole volume is named and left out."""
        found = dict[str, str]()
        for image in images:
            try:
                found[image] = datastore.get_image_uri(image)
            except ValueError as error:
                logger.warning("%s is left out: %s", image, error)
        return {image: file for image, file in found.items() if self.takes(file)}

    def identity(self) -> str:
        """SHA-256 of the file of the current weights."""
        return file_sha256(self.model)

    def replace(self, file: Path, record: Path | None = None) -> None:
        """Serve the weights of a file from now on, and keep those before as ``models/previous.pt``.

        ``record`` is of the run that trained them; without it, the record that is there stays.
        """
        load_strict(copy.deepcopy(self._network), load_state_dict(file), file)  # refuses before anything changes
        copies = {"previous.pt": self.model, self.model.name: file, runs.RECORD: record}
        for name, source in copies.items():
            if source is not None and source.is_file():
                with atomic_path(self.model.with_name(name)) as temporary:
                    shutil.copyfile(source, temporary)

    def answer(self, image: str | Path) -> Tensor:
        """Answer as offline inference does: a label map (H, W) or (D, H, W), uint8, or probabilities (C,).

        Those are of the classes or findings. An image that cannot be read or is of another kind is a ValueError.
        """
        result = torch.as_tensor(self._after(self._probabilities(image))["pred"]).cpu()
        if self.task.has_findings:
            return result[1]
        return result if self.task.is_classification else result[0]

    def uncertainty(self, image: str | Path) -> float:
        """Uncertainty of the student about an image, 0 (sure) to 1."""
        pred = self._probabilities(image)["pred"]
        return class_uncertainty(pred) if self.task.is_classification else mask_uncertainty(pred)

    @torch.no_grad()
    def _probabilities(self, image: str | Path) -> dict[str, Any]:
        if not self.takes(image):
            kind = "pictures" if self.task.dimensions == 2 else "volumes"
            raise ValueError(f"The model for {self.task.name} takes {kind} ({', '.join(self.suffixes)}), not {image}.")
        data = read_item({"image": str(image)}, self._before)
        batch = data["image"].as_tensor()[None].to(self._device)
        with self._lock:  # one image at a time: memory for one, and no change of weights meanwhile
            if (stamp := size_and_time(self.model)) != self._loaded:
                load_strict(self._network, load_state_dict(self.model), self.model)
                self._loaded = stamp
            data["pred"] = self._inferer(batch, self._network)[0].cpu()
        return dict(self._activation(data))


def mask_uncertainty(probabilities: Tensor) -> float:
    """One minus the Soft Dice Confidence, the Dice that the probabilities themselves predict for the mask.

    For each foreground class that is found, ``1 - 2 sum(p m) / (sum(p) + sum(m))`` with probability p and mask m; the
    mean of these classes. An image on which nothing is found has 1: it is worth a look.

    Source: Borges et al., "Soft Dice Confidence", 2024, https://arxiv.org/abs/2402.10665. ``probabilities`` is softmax,
    (C, H, W) or (C, D, H, W); channel 0 is background.
    """
    p = probabilities[1:].double().flatten(1)
    m = (probabilities.argmax(0).flatten() == torch.arange(1, len(probabilities))[:, None]).double()
    found = m.any(1)
    return float((1 - 2 * (p * m).sum(1) / (p.sum(1) + m.sum(1)))[found].mean()) if found.any() else 1.0


def class_uncertainty(probabilities: Tensor) -> float:
    """Entropy of class probabilities (C,), or the mean of findings' (2, F), as a part of the largest: 0 (sure) to 1."""
    p = probabilities.double()
    return float((-torch.xlogy(p, p).sum(0) / math.log(len(p))).mean())


def series_as_nifti(folder: str) -> str:
    """Write a DICOM series to a new NIfTI file as `predict` reads it; a gap or tilt, for example, is a ValueError."""
    (volume,), grid = read_case([folder])
    handle, name = tempfile.mkstemp(suffix=".nii.gz")
    os.close(handle)
    nibabel.save(nibabel.Nifti1Image(volume, grid.affine), name)
    return name


def write_mask(mask: np.ndarray, image: str | Path) -> Path:
    """Write a label map (H, W) or (D, H, W), uint8, to a new temporary file, which the caller removes.

    The mask of a volume is NIfTI with the affine of the file ``image``, the mask of a picture is PNG.
    """
    handle, name = tempfile.mkstemp(prefix="mask-", suffix=VOLUME_SUFFIXES[0] if mask.ndim == 3 else ".png")
    os.close(handle)
    if mask.ndim == 3:
        write_mask_volume(Path(name), mask, volume_grid(image))
    else:
        Image.fromarray(mask).save(name)
    return Path(name)
