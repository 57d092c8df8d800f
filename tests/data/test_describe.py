import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Lambdad, RandFlipd, ScaleIntensityRanged
from toy_images import photo_chain, volume_chain, write_photo

from amkd_monai.data.decoded import describe
from amkd_monai.data.transforms import load_mask


def odd_pixels(image):
    chosen = {"a", "bc", "def"}
    return [(lambda v: v + 1)(v) for v in image if v in chosen or (lambda w: w > 2)(v)]


def nested_chain(size=(24, 40)):
    return Compose([Compose([Compose([photo_chain(size)])]), Lambdad("image", odd_pixels)])


def text(value):
    return json.dumps(describe(value), sort_keys=True)


def test_equal_chains_have_equal_descriptions():
    for make in (photo_chain, volume_chain, nested_chain):
        assert text(make()) == text(make())


def test_use_and_random_state_do_not_matter(tmp_path):
    chain = Compose([RandFlipd("image", prob=0.5, spatial_axis=0)])
    before = text(chain)
    chain.set_random_state(seed=7)
    chain({"image": torch.zeros(1, 4, 4)})
    assert text(chain) == before
    chain = photo_chain()
    before = text(chain)
    chain(write_photo(tmp_path, "a"))
    assert text(chain) == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (photo_chain(), photo_chain((24, 48))),
        (photo_chain(), photo_chain(image_mode="nearest")),
        (photo_chain(), volume_chain()),
        (volume_chain(), volume_chain(own=True)),
        (load_mask(), load_mask(codes="nonzero")),
        (load_mask(), load_mask(classes=3)),
        (load_mask(codes={"1": 1}), load_mask(codes={"1": "ignore"})),
        (nested_chain(), nested_chain((24, 48))),
        (photo_chain(), Compose(photo_chain().transforms[:-1])),
        (RandFlipd("image", prob=0.5), RandFlipd("image", prob=0.6)),
        (ScaleIntensityRanged("image", 0, 255, 0, 1), ScaleIntensityRanged("image", 0, 254, 0, 1)),
        (Lambdad("image", lambda x: x + 1), Lambdad("image", lambda x: x + 2)),
        (Lambdad("image", lambda x: x.min()), Lambdad("image", lambda x: x.max())),
        (Lambdad("image", lambda x: [v + 1 for v in x]), Lambdad("image", lambda x: [v + 2 for v in x])),
        (Lambdad("image", lambda x, by=1: x + by), Lambdad("image", lambda x, by=2: x + by)),
        (Lambdad("image", torch.sigmoid), Lambdad("image", torch.tanh)),
        (Lambdad("image", np.log1p), Lambdad("image", np.sqrt)),
        (functools.partial(np.clip, a_max=1), functools.partial(np.clip, a_max=2)),
        (np.zeros(3), np.ones(3)),
        ({"a": 1}, {"a": 2}),
        (torch.float32, torch.float16),
    ],
)
def test_a_changed_option_changes_the_description(one, other):
    assert text(one) != text(other)


def adding(amount):
    return lambda x: x + amount


def test_what_a_function_has_captured_matters():
    assert text(adding(1)) != text(adding(2))
    assert text(adding(1)) == text(adding(1))


def test_values_that_json_cannot_hold_are_described():
    loop = []
    loop.append(loop)
    for value in (np.inf, torch.tensor([1.0, np.nan]), {1, 2}, Path("x"), np.float32(1), loop, torch.device("cpu")):
        json.dumps(describe(value), allow_nan=False)
