"""What length and side make of one member of a crew: a network trained on all labels, scored on the test section.

python benchmarks/crew_member.py --shared ../shared --encoder tf_efficientnet_lite1 --side 192 --steps 400
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from amkd_monai.cache.build import images_of
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.frames import finer
from amkd_monai.engines.crew import EMA
from amkd_monai.engines.crossfit import Method
from amkd_monai.engines.prepare import open_bundle
from amkd_monai.networks import Student

ROOT = Path(__file__).resolve().parent.parent
STUDENT_SIDE = 128
MIRRORS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def main() -> None:
    """Train one network on COVID CT and print its Dice, plain and as the mean over mirrored images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/")
    parser.add_argument("--encoder", default="tf_efficientnet_lite1")
    parser.add_argument("--side", type=int, default=192, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=400, help="of 8 images")
    parser.add_argument("--output", type=Path, default=Path("runs/crew_member"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    folders = dict.fromkeys(("cache_dir", "output_dir", "ckpt_dir"), str(a.output))
    own = {"image_size": STUDENT_SIDE, "split_fractions": [0.5, 0.1, 0.4], "teachers": []}
    data = {"dataset_dir": str(a.shared / "data" / "COVID")}
    get = open_bundle(ROOT / "bundles" / "covid", {**own, **data, **folders}).get_parsed_content
    train, test = get("train#dataset"), get("datalist").test
    labels = DecodedDataset(test, train.transform, a.output, num_classes=2)
    chain = train.transform if a.side == STUDENT_SIDE else finer(train.transform, (a.side, a.side))
    seen, asked = (DecodedDataset(items, chain, a.output, num_classes=2) for items in (train.data, test))
    network = Student(encoder=a.encoder, num_classes=2)
    recipe = replace(get("recipe"), ema=EMA, min_steps=a.steps)
    Method(recipe, 1, 0, "cpu", f"{a.encoder} at {a.side}").fit(network, seen, np.arange(len(seen)), 0)
    true, size = np.stack([labels.labels[i][0] for i in range(len(labels))]) == 1, (STUDENT_SIDE, STUDENT_SIDE)
    with torch.inference_mode():
        image = images_of(asked, list(range(len(asked))), "cpu")
        maps = [network.eval()(image.flip(axes)).flip(axes).softmax(1)[:, 1:] for axes in MIRRORS]
    found = torch.stack([F.adaptive_avg_pool2d(m, size)[:, 0] for m in maps]).numpy()
    for name, p in (("plain", found[0]), ("mirrored", found.mean(0))):
        both, sums = ((p > 0.5) & true).sum((1, 2)), (p > 0.5).sum((1, 2)) + true.sum((1, 2))
        dice = (2 * both / sums)[true.any((1, 2))].mean()
        print(f"{a.encoder} at {a.side} px, {a.steps} steps, {name}: Dice {dice:.4f}")


if __name__ == "__main__":
    main()
