"""What length and side make of one member of a crew: a network trained on a run's labels, scored on other images.

python benchmarks/crew_member.py --shared ../shared --side 192 --steps 400    # COVID CT, its test section
python benchmarks/crew_member.py --shared ../shared --bundle kvasir_seg --data data/Kvasir-SEG \
    --asked pools/kvasir --side 192 --steps 800 --seed 3                      # Kvasir-SEG, further images of it
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
PER_FORWARD = 16


def main() -> None:
    """Train one network and print its Dice, plain and as the mean over mirrored images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and pools/")
    parser.add_argument("--bundle", default="covid")
    parser.add_argument("--data", default="data/COVID", help="folder in the shared one")
    parser.add_argument(
        "--asked", help="folder in the shared one whose first 160 images are asked; else the test section"
    )
    parser.add_argument("--labelled", type=int, help="labels to learn from; else all")
    parser.add_argument("--encoder", default="tf_efficientnet_lite1")
    parser.add_argument("--side", type=int, default=192, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=400, help="of 8 images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/crew_member"))
    a = parser.parse_args()
    torch.set_num_threads(1)

    def opened(data: str, **values: object) -> Callable[[str], Any]:
        folders = dict.fromkeys(("cache_dir", "output_dir", "ckpt_dir"), str(a.output))
        own = {"image_size": STUDENT_SIDE, "teachers": [], "dataset_dir": str(a.shared / data)}
        return open_bundle(ROOT / "bundles" / a.bundle, {**own, **folders, **values}).get_parsed_content

    get = opened(a.data, split_fractions=[0.5, 0.1, 0.4], **({"labelled": a.labelled} if a.labelled else {}))
    train = get("train#dataset")
    test = opened(a.asked)("train#dataset").data[:160] if a.asked else get("datalist").test
    labels = DecodedDataset(test, train.transform, a.output, num_classes=2)
    chain = train.transform if a.side == STUDENT_SIDE else finer(train.transform, (a.side, a.side))
    seen, asked = (DecodedDataset(items, chain, a.output, num_classes=2) for items in (train.data, test))
    network = Student(encoder=a.encoder, num_classes=2)
    recipe = replace(get("recipe"), ema=EMA, min_steps=a.steps)
    learned = np.flatnonzero(seen.has_label)
    Method(recipe, 1, a.seed, "cpu", f"{a.encoder} at {a.side}").fit(network, seen, learned, 0)
    true, size = np.stack([labels.labels[i][0] for i in range(len(labels))]) == 1, (STUDENT_SIDE, STUDENT_SIDE)
    found = []
    with torch.inference_mode():
        for start in range(0, len(asked), PER_FORWARD):
            image = images_of(asked, list(range(len(asked)))[start : start + PER_FORWARD], "cpu")
            maps = [network.eval()(image.flip(axes)).flip(axes).softmax(1)[:, 1:] for axes in MIRRORS]
            found.append(torch.stack([F.adaptive_avg_pool2d(m, size)[:, 0] for m in maps]))
    answers = torch.cat(found, 1).numpy()
    for name, p in (("plain", answers[0]), ("mirrored", answers.mean(0))):
        both, sums = ((p > 0.5) & true).sum((1, 2)), (p > 0.5).sum((1, 2)) + true.sum((1, 2))
        dice = (2 * both / sums)[true.any((1, 2))].mean()
        print(f"{a.encoder} at {a.side} px, {len(learned)} labels, {a.steps} steps, {name}: Dice {dice:.4f}")


if __name__ == "__main__":
    main()
