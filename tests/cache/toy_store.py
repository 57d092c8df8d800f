"""A small feature store; run as a script, the builder process that tests kill: DIRECTORY PART [hold | unlocked]."""

import sys
import time

import numpy as np

from amkd_monai.cache.store import EVERYTHING, ArraySpec, FeatureStore, Part, build_missing

N = 50
SHARDS = 26  # two views of 13


def open_store(directory, n=N, **changes):
    arguments = {
        "key": {"teacher": "toy", "size": 8},
        "sample_ids": [f"case_{i}" for i in range(n)],
        "content_hashes": [f"hash of {i}" for i in range(n)],
        "arrays": {"grid": ArraySpec((3, 4, 4)), "codes": ArraySpec((3, 4, 4), "int8")},
        "views": 2,
        "shard_size": 4,
    }
    return FeatureStore.create_or_open(directory, **{**arguments, **changes})


def features(view, indices):
    grid = np.stack([np.random.default_rng([view, index]).normal(size=(3, 4, 4)) for index in indices])
    return {"grid": grid, "codes": grid}


def build(store, wait_s=0.0, part=EVERYTHING):
    build_missing(store, lambda view, shard, report: features(view, store.samples_of(shard)), part, wait_s=wait_s)
    return store


if __name__ == "__main__":
    own = open_store(sys.argv[1])
    print("ready", flush=True)
    if "hold" in sys.argv:
        with own.building():
            print("holding", flush=True)
            time.sleep(60)
    if "unlocked" in sys.argv:
        for at in own.shards:
            own.write_shard(*at, features(at[0], own.samples_of(at[1])))
            own.tidy()
    build(own, wait_s=20.0, part=Part.parse(sys.argv[2]))
