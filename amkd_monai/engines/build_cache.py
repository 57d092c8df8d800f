"""The stores of a run's image teachers, built by the run itself or ahead of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from amkd_monai.cache.build import cache_teacher
from amkd_monai.cache.parts import EVERYTHING, Part
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.engines.runs import expand
from amkd_monai.teachers.base import Teacher
from amkd_monai.teachers.registry import CROSS_FITTED_KINDS, build_teacher, validate_descriptions


@dataclass(frozen=True)
class CacheOptions:
    """How stores are built.

    Attributes:
        cache_dir: folder of all stores.
        device: where teachers run.
        views: stored views of every training image (:mod:`amkd_monai.cache.views`).
        dtype: of feature maps, ``float16`` or ``int8``.
        weights_dir: folder searched first for the weights of foundation teachers.
        batch_size: images per forward, halved when memory runs out; None for
            :data:`amkd_monai.cache.build.BATCH_SIZE` of the device.
    """

    cache_dir: str
    device: torch.device | str = "cpu"
    views: int = 1
    dtype: str = "float16"
    weights_dir: str | None = None
    batch_size: int | None = None


def cache_image_teacher(
    description: Mapping[str, Any],
    train: DecodedDataset,
    validation: DecodedDataset,
    options: CacheOptions,
    part: Part = EVERYTHING,
) -> tuple[Teacher, FeatureStore, FeatureStore]:
    """Build an image teacher and its stores of the training and the validation section, the latter of one view.

    Raises:
        ValueError: options or answers that do not fit.
        CheckpointError: a teacher's weights are missing or wrong.
    """
    teacher = build_teacher(description, options.weights_dir)
    stores = [
        cache_teacher(
            teacher,
            dataset,
            options.cache_dir,
            options.device,
            options.batch_size,
            views=views,
            dtype=options.dtype,
            part=part,
            description=description,
        )
        for dataset, views in ((train, options.views), (validation, 1))
    ]
    return teacher, stores[0], stores[1]


def image_teachers(descriptions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The teachers that answer image by image, so that their features can be computed ahead of a run."""
    return [description for description in descriptions if description["kind"] not in CROSS_FITTED_KINDS]


def build_cache(
    bundle: str | Path,
    settings: Mapping[str, Any],
    configs: Sequence[str] = (),
    part: Part = EVERYTHING,
    batch_size: int | None = None,
) -> list[Path]:
    """Build the stores that a bundle's training will ask for.

    Args:
        bundle: folder with ``configs/train.json``.
        settings: top-level settings that the run changes, such as ``dataset_dir`` or ``views``.
        configs: further config files on top of ``train.json``.
        part: what this process computes.
        batch_size: as in :class:`CacheOptions`.

    Returns:
        The folders of the stores.

    Raises:
        ValueError: not a training bundle, or an unknown setting.
    """
    bundle = Path(bundle).expanduser()
    train = bundle / "configs" / "train.json"
    if not train.is_file():
        raise ValueError(f"{bundle} is no training bundle, it lacks configs/train.json: give a folder of bundles/.")
    parser = ConfigParser()
    parser.read_config([str(train), *configs])
    if unknown := [key for key in settings if key not in parser.config]:
        raise ValueError(f"{bundle} has no setting '{unknown[0]}': use a top-level name of its train.json.")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    for key, value in {"bundle_root": str(bundle), "device": own, **settings}.items():
        parser[key] = value
    expand(parser)
    data = ("train#dataset", "validation_data", "teachers")
    names = (*data, "cache_dir", "device", "views", "cache_dtype", "weights_dir")
    training, validation, teachers, *options = (parser.get_parsed_content(name) for name in names)
    validate_descriptions(teachers)
    stored = replace(CacheOptions(*options), batch_size=batch_size)
    stores: list[FeatureStore] = []
    for description in image_teachers(teachers):
        stores += cache_image_teacher(description, training, validation, stored, part)[1:]
    return [store.directory for store in stores]
