"""What stores of other lists of images hold already: the same teacher on the same images is not asked again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.cache.shards import ArraySpec
from amkd_monai.cache.store import FeatureStore, StoreError

logger = logging.getLogger("amkd_monai")


class EarlierStores:
    """Stores beside a new one whose arrays of a sample depend on the same, but for the list the sample stands in.

    Args:
        directory: folder of the new store, ``<teacher>-<key>``.
        sample_key: hash of all that an array of one view of one sample depends on beside its id and content hash;
            stores name theirs in their origin.
    """

    def __init__(self, directory: Path, sample_key: str) -> None:
        self._stores: list[tuple[FeatureStore, dict[tuple[str, str], int]]] = []
        teacher = directory.name.rpartition("-")[0]
        for manifest in sorted(directory.parent.glob("*/manifest.json")):
            if manifest.parent == directory or manifest.parent.name.rpartition("-")[0] != teacher:
                continue
            try:
                store = FeatureStore.open(manifest.parent, check="size")
                if store.origin.get("sample_key") != sample_key:
                    continue
                store = FeatureStore.open(manifest.parent)  # reads every hash
            except StoreError as error:
                logger.warning("nothing is taken over from an earlier store: %s", error)
                continue
            samples = zip(store.sample_ids, store.content_hashes, strict=True)
            self._stores.append((store, {sample: index for index, sample in enumerate(samples)}))

    @property
    def arrays(self) -> dict[str, ArraySpec] | None:
        """The arrays of the first such store; None where there is none."""
        return self._stores[0][0].arrays if self._stores else None

    def find(self, parameters: Any, sample: tuple[str, str], arrays: list[str]) -> dict[str, np.ndarray] | None:
        """Read the arrays of one view of a sample.

        Args:
            parameters: the view's parameters.
            sample: its id and content hash.
            arrays: names of the arrays.

        Returns:
            The arrays (1, *shape), or None where no store holds them.
        """
        for store, index_of in self._stores:
            index = index_of.get(sample)
            if index is None or parameters not in store.view_parameters:
                continue
            view = store.view_parameters.index(parameters)
            if (view, index // store.shard_size) in store.committed:
                return {name: store.read(name, [index], view) for name in arrays}
        return None
