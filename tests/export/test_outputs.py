"""A class is written under its picture so that it can be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from amkd_monai.export.predict import write_captioned


@pytest.mark.parametrize(("height", "width"), [(90, 60), (400, 1000)])
def test_the_picture_is_whole_and_the_caption_fits_below_it(tmp_path, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    bands = {}
    for caption in ("no DR  0.93", "severe  0.93", "a class whose name is longer than most of the others  0.93"):
        write_captioned(tmp_path / "x.png", image, caption)
        written = np.asarray(Image.open(tmp_path / "x.png"), int)
        factor = written.shape[1] // width
        picture, band = np.split(written, [height * factor])
        np.testing.assert_array_equal(picture[::factor, ::factor], image)
        letters = band.max(-1) > 128
        columns, rows = np.flatnonzero(letters.any(0)), np.flatnonzero(letters.any(1))
        assert columns[0] > 0 and columns[-1] < written.shape[1] - 1, "nothing is cut"
        assert rows[0] > 0 and rows[-1] < len(band) - 1
        assert len(caption) > 20 or rows[-1] - rows[0] >= 12, "pixels, the height of a letter"
        bands[caption] = band
    first, second, _ = bands.values()
    assert (first != second).any()
