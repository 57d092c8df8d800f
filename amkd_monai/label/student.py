"""A trained bundle opened for serving: an image file in, the bundle's own answer out."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.transforms import Activationsd, Compose

from amkd_monai.atomic import TEMPORARY_MARK, atomic_path
from amkd_monai.data.readable import read_item
from amkd_monai.data.transforms import SaveMaskd
from amkd_monai.engines import runs
from amkd_monai.files.names import PICTURE_SUFFIXES, VOLUME_SUFFIXES, has_suffix
from amkd_monai.label.uncertainty import class_uncertainty, mask_uncertainty
from amkd_monai.tasks import get_task
from amkd_monai.weights import load_state_dict, load_strict, state_hash


class ServedStudent:
    """The student of a bundle with its preprocessing and postprocessing, all from ``configs/inference.json``.

    The transforms are given the image file and nothing else: what a server adds to a request never reaches them. The
    weights are read again when ``models/model.pt`` has changed.

    Args:
        bundle: folder of the bundle.

    Attributes:
        task: what is asked.
        model: the file of weights.
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.model = Path(bundle), Path(bundle) / "models" / "model.pt"
        parser = ConfigParser()
        parser.read_config(str(self.bundle / "configs" / "inference.json"))
        parser["bundle_root"] = str(self.bundle)
        runs.adopt(parser, "serving", {})
        self.task = get_task(parser.get_parsed_content("task"))
        self.device: torch.device = parser.get_parsed_content("device")
        self._network = parser.get_parsed_content("network").eval()
        self._inferer = parser.get_parsed_content("inferer")
        self._before: Compose = parser.get_parsed_content("preprocessing")
        after = parser.get_parsed_content("postprocessing").transforms
        ends = [i for i, t in enumerate(after) if isinstance(t, SaveMaskd)]
        self._activation: Activationsd = after[0]
        self._after = Compose(after[1 : ends[0]] if ends else after[1:])
        self._loaded: tuple[int, int] | None = None
        self._known: tuple[tuple[int, int], str] | None = None
        self._lock = threading.Lock()

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The kinds of file it takes."""
        return PICTURE_SUFFIXES if self.task.dimensions == 2 else VOLUME_SUFFIXES

    def takes(self, image: str | Path) -> bool:
        """Whether a file is of the right kind, by its name."""
        return has_suffix(image, self.suffixes)

    def identity(self) -> str:
        """SHA-256 of the weights that lie there now."""
        stamp = self._stamp()
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, state_hash(load_state_dict(self.model))
        return self._known[1]

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed while it replaced the weights has left beside them."""
        for file in self.model.parent.glob(f".*{TEMPORARY_MARK}*"):
            file.unlink()

    def replace(self, file: Path, record: Path | None = None) -> None:
        """Serve the weights of a file from now on, and keep those before as ``models/previous.pt``.

        Args:
            file: the weights.
            record: of the run that trained them; None keeps the record that is there.

        Raises:
            CheckpointError: the file does not fit the network; nothing has changed then.
        """
        load_strict(copy.deepcopy(self._network), load_state_dict(file), file)
        copies = {"previous.pt": self.model, self.model.name: file, runs.RECORD: record}
        for name, source in copies.items():
            if source is not None and source.is_file():
                with atomic_path(self.model.with_name(name)) as temporary:
                    shutil.copyfile(source, temporary)

    def copy_record(self, folder: Path) -> None:
        """Put the record of the student's run into a folder in which it is trained further."""
        folder.mkdir(parents=True, exist_ok=True)
        if (record := self.model.with_name(runs.RECORD)).is_file():
            shutil.copyfile(record, folder / runs.RECORD)

    def answer(self, image: str | Path) -> torch.Tensor:
        """Answer as offline inference does.

        Returns:
            A label map (H, W) or (D, H, W), uint8, on the grid of the file, or the probability of each class (C,).

        Raises:
            ValueError: the file is of another kind, or damaged.
        """
        data = self._probabilities(image)
        result: torch.Tensor = torch.as_tensor(self._after(data)["pred"]).cpu()
        return result if self.task.is_classification else result[0]

    def uncertainty(self, image: str | Path) -> float:
        """How unsure the student is about an image, 0 (sure) to 1; see :mod:`amkd_monai.label.uncertainty`."""
        pred = self._probabilities(image)["pred"]
        return class_uncertainty(pred) if self.task.is_classification else mask_uncertainty(pred)

    @torch.no_grad()
    def _probabilities(self, image: str | Path) -> dict[str, Any]:
        data = self._read(image)
        batch = data["image"].as_tensor()[None].to(self.device)
        with self._lock:  # one image at a time: memory for one, and no change of weights meanwhile
            data["pred"] = self._inferer(batch, self._current())[0].cpu()
        return dict(self._activation(data))

    def _read(self, image: str | Path) -> dict[str, Any]:
        kind = "pictures" if self.task.dimensions == 2 else "volumes"
        if not self.takes(image):
            raise ValueError(f"The model for {self.task.name} takes {kind} ({', '.join(self.suffixes)}), not {image}.")
        return read_item({"image": str(image)}, self._before)

    def _current(self) -> torch.nn.Module:
        """The network with the weights that lie there now; the caller holds the lock."""
        stamp = self._stamp()
        if stamp != self._loaded:
            load_strict(self._network, load_state_dict(self.model), self.model)
            self._loaded = stamp
        return self._network

    def _stamp(self) -> tuple[int, int]:
        found = self.model.stat()
        return found.st_mtime_ns, found.st_size
