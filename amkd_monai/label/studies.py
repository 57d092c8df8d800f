"""The folder of studies: MONAI Label's own datastore, with checks of what is uploaded; nothing uploaded is lost."""

import contextlib
import filecmp
import json
import logging
import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException

from amkd_monai.data.datasets import Task
from amkd_monai.files.masks import read_mask
from amkd_monai.files.names import VOLUME_SUFFIXES, has_suffix, some
from amkd_monai.files.pictures import picture_frame
from amkd_monai.files.volumes import read_label_volume, volume_grid
from amkd_monai.storage import atomic_write_bytes

logger = logging.getLogger("amkd_monai")


class Studies(LocalDatastore):
    """Images of one folder and the labels saved for them; refuses files that training could not read.

    An image is replaced only if the request says so (``{"overwrite": true}``), a final label by any other one. What is
    replaced is kept in ``replaced/<time>/``, an image together with its labels. Requests run in threads: one at a time
    changes the lists of images and labels. ``suffixes`` are the kinds of image that the served models take, ``tasks``
    say what a label may hold.
    """

    def __init__(self, folder: str, suffixes: Sequence[str], tasks: Sequence[Task]) -> None:
        self._suffixes, self._changing = tuple(suffixes), threading.RLock()
        self._of_images = [task for task in tasks if task.is_classification]
        masks = [task for task in tasks if not task.is_classification]
        self._counts = {n: sorted({len(task.classes) for task in masks if task.dimensions == n}) or [2] for n in (2, 3)}
        super().__init__(
            folder,
            extensions=[f"*{suffix}" for suffix in suffixes],
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )
        listed = {f"{name}{image.image.ext}" for name, image in self._datastore.objects.items()}
        found = {file.name for file in Path(self._datastore.image_path()).iterdir() if has_suffix(file, suffixes)}
        if hidden := sorted(found - listed):  # MONAI Label lists one image a name, and no ending in upper case
            logger.warning("%d image(s) in %s are not served, rename them: %s.", len(hidden), folder, some(hidden))

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an image; a file that cannot be read, a name with a folder in it, or one that exists is refused."""
        file, info = Path(image_filename), dict(image_info or {})
        overwrites = info.pop("overwrite", False) is True
        with self._changing:
            if Path(image_id).name != image_id or image_id.startswith("."):
                raise ValueError(f"'{image_id}' cannot be the name of an image: use one without a folder.")
            if not file.name.lower().endswith(self._suffixes):
                raise ValueError(f"'{file.name}' is of a kind that no model takes: {', '.join(self._suffixes)}.")
            (volume_grid if has_suffix(file, VOLUME_SUFFIXES) else picture_frame)(file)  # refuses what cannot be read
            if existing := self._files_of(image_id, self._to_id(file.name)[1]):
                if filecmp.cmp(existing[0], file, shallow=False):
                    return image_id
                if not overwrites:
                    remedy = 'choose another name, or replace it with {"overwrite": true}'
                    raise ValueError(f"There is another image '{image_id}': {remedy}.")
                self._keep(existing)
                self.refresh()
            return str(super().add_image(image_id, image_filename, info))

    def _files_of(self, image_id: str, suffix: str) -> list[Path]:
        """The image of this name in the folder, listed or not, those of other suffixes, and its labels."""
        known, folder = self._datastore.objects.get(image_id), Path(self._datastore.image_path())
        files = [folder / f"{image_id}{s}" for s in (*([known.image.ext] if known else []), suffix, *self._suffixes)]
        labels = known.labels.items() if known else ()
        files += [Path(self._datastore.label_path(tag)) / f"{image_id}{label.ext}" for tag, label in labels]
        return [file for file in dict.fromkeys(files) if file.is_file()]

    def _keep(self, files: Sequence[Path]) -> None:
        """Move files of the studies to a folder that is not listed."""
        folder = Path(self._datastore_path, "replaced", datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ"))
        for file in files:
            target = folder / os.path.relpath(file, self._datastore_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
        logger.info("%s: replaced, kept in %s", ", ".join(file.name for file in files), folder)

    def _update_datastore_file(self, lock: bool = True) -> None:
        """Write the lists whole or not at all: MONAI Label does not start on half of them."""
        content = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        with FileLock(self._lock_file) if lock else contextlib.nullcontext():
            atomic_write_bytes(self._datastore_config_path, content.encode())
            self._config_ts = Path(self._datastore_config_path).stat().st_mtime

    def refresh(self) -> None:
        """List what lies in the folder now."""
        with self._changing:
            super().refresh()

    def status(self) -> dict[str, Any]:
        """Return the numbers of images and labels."""
        with self._changing:
            return dict(super().status())

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Save a label: a mask on the image's grid, or JSON as :func:`read_label` takes it for a model served."""
        if label_tag not in (DefaultLabelTag.FINAL.value, DefaultLabelTag.ORIGINAL.value):
            raise ValueError(f"There is no tag '{label_tag}': use final or original.")
        image = self.get_image_uri(image_id)
        if not image:
            raise ImageNotFoundException(f"There is no image '{image_id}' in the studies.")
        try:
            self._check_label(Path(image), Path(label_filename))
        except ValueError as error:
            raise ValueError(f"The label for {image_id} is refused: {error}") from error
        with self._changing:
            known = self._datastore.objects[image_id].labels.get(label_tag)
            suffixes = {self._to_id(Path(label_filename).name)[1], *([known.ext] if known else [])}
            there = [Path(self._datastore.label_path(label_tag)) / f"{image_id}{suffix}" for suffix in suffixes]
            changed = [f for f in there if f.is_file() and not filecmp.cmp(f, label_filename, shallow=False)]
            if changed and label_tag == DefaultLabelTag.FINAL.value:
                self._keep(changed)
            return str(super().save_label(image_id, label_filename, label_tag, label_info))

    def _check_label(self, image: Path, label: Path) -> None:
        if label.suffix == ".json":
            if all(read_label(label, task) is None for task in self._of_images):
                said, kind = _content(label)
                known = " or ".join(", ".join(task.classes) for task in self._of_images if task.kind == kind)
                what = "are not all and only the findings" if isinstance(said, dict) else "is not among the classes"
                names = said if isinstance(said, str) else ", ".join(said)
                raise ValueError(f"'{names}' {what} {known or '(none is served)'}.")
            return
        is_volume = has_suffix(image, VOLUME_SUFFIXES)
        counts = self._counts[3 if is_volume else 2]
        for count in counts:
            try:
                if is_volume:
                    read_label_volume(label, volume_grid(image), count)
                else:
                    read_mask([label], image, count)
                return
            except ValueError:
                if count == counts[-1]:  # no model understands it
                    raise


def read_label(label: Path, task: Task) -> int | None:
    """Read a label of a whole image: the class, or the number whose bits are its findings; None if of another task.

    It is JSON: ``{"class": name}``, or ``{"findings": {name: true or false}}`` with each finding of the task; else a
    ValueError.
    """
    said, kind = _content(label)
    if kind != task.kind:
        return None
    if isinstance(said, dict):
        return sum(said[n] << i for i, n in enumerate(task.classes)) if said.keys() == {*task.classes} else None
    return task.classes.index(said) if said in task.classes else None


def _content(label: Path) -> tuple[str | dict[str, bool], str]:
    """The class, or the presence of each finding, in a label file, and the kind of task that it is for."""
    try:
        content = json.loads(label.read_text(encoding="utf-8"))
        if content.keys() == {"findings"}:
            there = {False: False, True: True}
            return {name: there[value] for name, value in content["findings"].items()}, "multilabel"
        return str(content["class"]), "classification"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        forms = '{"class": "melanoma"} or {"findings": {"mass": true, "effusion": false}}'
        raise ValueError(f"a label of a whole image must be JSON such as {forms}.") from error
