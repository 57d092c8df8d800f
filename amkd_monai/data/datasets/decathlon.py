"""Layout of the Medical Segmentation Decathlon: `dataset.json`, `imagesTr/`, `labelsTr/`, `imagesTs/`.

Source: Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 2022,
http://medicaldecathlon.com. Archives hold macOS `._*.nii.gz` files next to the volumes. In Task02_Heart two training
images (la_005, la_026) were seen to be byte-identical while their labels differ.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from amkd_monai.data.datasets.layout import Layout, checked
from amkd_monai.data.splits import Item, group_identical_images
from amkd_monai.files.names import file_id, read_text

logger = logging.getLogger("amkd_monai")


@dataclass(frozen=True)
class Decathlon(Layout):
    """One task of the decathlon; 20 labelled hearts are too few for one fixed test section.

    Attributes:
        title: name of the data set in messages.
        classes: names of the labels, in lower case.
        validation_fraction: see :class:`Layout`; small, as labelled volumes are few.
    """

    title: str
    classes: tuple[str, ...]
    validation_fraction: float | None = 0.1

    expected = "dataset.json with the folders imagesTr/ and labelsTr/ beside it"
    predict_in = ("imagesTs", "imagesTr")  # read, as the "test" list of dataset.json may be empty
    volumes = True

    def is_in(self, folder: Path) -> bool:
        """Whether there is a `dataset.json`."""
        return (folder / "dataset.json").is_file()

    def hint(self, root: Path) -> str:
        """Tell that only `dataset.json` is missing."""
        alone = (root / "imagesTr").is_dir() and (root / "labelsTr").is_dir()
        return "dataset.json alone is missing, copy it from the archive" if alone else ""

    def find_items(self, root: str | Path, cache_dir: str | Path | None = None) -> list[Item]:
        """List the volumes and labels that `dataset.json` names, sorted by id; byte-identical images share a group."""
        root, file = Path(root), Path(root) / "dataset.json"
        self.check(root)
        try:
            content = json.loads(read_text(file))
            listed = [
                [root / entry[key].replace("\\", "/") for key in ("image", "label")] for entry in content["training"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{file} is not JSON with a list "training" of "image" and "label": copy it again from the archive.'
            ) from error
        labels = content.get("labels", {})
        found = tuple(str(labels[key]).lower() for key in sorted(labels)) or self.classes
        if found != self.classes:  # all tasks of the decathlon share one layout
            logger.warning("%s names the classes %s, %s expects %s.", file, found, self.title, self.classes)
        items: dict[str, Item] = {}
        for image, label in listed:
            if image.name.startswith("."):
                continue
            if missing := [path for path in (image, label) if not path.is_file()]:
                raise FileNotFoundError(f"{missing[0]} is listed in {file} but missing: unpack the archive again.")
            name = file_id(image)
            if name in items:
                raise ValueError(f"{file} lists the volume '{name}' twice: keep one entry.")
            item = {"image": str(image), "label": str(label), "id": name, "group": name}
            items[name] = checked(item, image, [label], volumes=True)
        if not items:
            raise ValueError(f'The list "training" of {file} is empty: copy it again from the archive.')
        return group_identical_images(items.values())
