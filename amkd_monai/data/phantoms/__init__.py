"""Generated data in the official layouts: a demonstration that runs everywhere, never a result.

In every data set the target has neighbours of its own brightness, so a threshold does not find it. All draws come from
one seed. A data set appears under its final name only when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from amkd_monai.data.phantoms.aptos2019 import write_aptos2019
from amkd_monai.data.phantoms.busi import write_busi
from amkd_monai.data.phantoms.covid import write_covid, write_covid_volumes
from amkd_monai.data.phantoms.isic2017 import write_isic2017
from amkd_monai.data.phantoms.kvasir_seg import write_kvasir_seg
from amkd_monai.data.phantoms.msd_heart import write_msd_heart
from amkd_monai.data.phantoms.tools import is_phantom
from amkd_monai.tasks import get_task

WRITERS: dict[str, Callable[..., Path]] = {
    "aptos2019": write_aptos2019,
    "busi": write_busi,
    "covid": write_covid,
    "covid_volumes": write_covid_volumes,
    "isic2017": write_isic2017,
    "isic2017_lesion": write_isic2017,  # the same folder
    "kvasir_seg": write_kvasir_seg,
    "msd_heart": write_msd_heart,
}
"""By task: writes the data set into a root and returns its own folder in there."""


def write_phantom(task_name: str, root: Path) -> Path:
    """Write the phantoms of a task into `root` unless they are there; return the data set folder.

    Args:
        task_name: a key of `amkd_monai.tasks.TASKS`.
        root: folder in which the folder of the data set (its official name) is made.

    Raises:
        ValueError: no such task.
        FileExistsError: the folder is there and does not hold phantoms.
    """
    folder = Path(root) / get_task(task_name).folder
    return folder if is_phantom(folder) else WRITERS[task_name](Path(root))
