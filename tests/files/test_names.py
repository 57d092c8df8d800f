"""Names, lists and tables as people have them."""

from __future__ import annotations

import os

import nibabel
import numpy as np
import pytest
from PIL import Image

from amkd_monai.files.cases import to_predict
from amkd_monai.files.names import channel_files, file_id, image_files, images_to_predict, table_rows
from amkd_monai.files.pictures import read_picture, write_png
from amkd_monai.files.volumes import Grid, write_mask_volume
from amkd_monai.storage import read_text

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path, format="PNG")
    return path


def test_ids_can_always_be_printed_and_told_apart(tmp_path):
    for name in ("plain.png", "UPPER.PNG", "ünï (1) ß.png", "line\nbreak,comma.png", "a.b.png"):
        save(tmp_path / name)
    raw = os.fsdecode(os.fsencode(tmp_path) + b"/pati\xebnt.png")
    save(tmp_path / "temporary.png").rename(raw)
    found = {file_id(file): file for file in image_files(tmp_path)}
    assert set(found) == {"plain", "UPPER", "ünï (1) ß", "line%0Abreak,comma", "a.b", "pati%EBnt"}
    for name, file in found.items():
        name.encode()
        assert "\n" not in name and read_picture(file).shape == PIXELS.shape


def test_volume_endings_count_as_one_in_any_case(tmp_path):
    for name in ("la_003.nii.gz", "LA_004.NII.GZ", "la_005.Nii"):
        assert file_id(tmp_path / name) in ("la_003", "LA_004", "la_005")


def test_dead_links_are_counted_and_named(tmp_path, caplog):
    save(tmp_path / "good.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "good.png")
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere.png")
    assert set(map(file_id, image_files(tmp_path))) == {"good", "link"}
    assert "1 dead link" in caplog.text and "dead" in caplog.text


def test_formats_that_are_not_read_are_named(tmp_path, caplog):
    for name in ("good.png", "scan.HDR", "IM0001", "photo.heic", "volume.nii.gz", "notes.txt"):
        save(tmp_path / name)
    assert set(images_to_predict(tmp_path)) == {"good"}
    assert "4 file(s)" in caplog.text and "notes" not in caplog.text
    assert all(name in caplog.text for name in ("scan.HDR", "IM0001", "photo.heic", "volume.nii.gz"))


def test_files_that_are_no_channel_beside_those_that_are_and_series_below_are_named(tmp_path, caplog):
    for name in ("a_0000.png", "a_0001.png", "lone.png"):
        save(tmp_path / "channels" / name)
    assert list(channel_files(tmp_path / "channels")) == ["a"] and ": lone." in caplog.text
    save(tmp_path / "channels" / "a_0001.jpg")
    with pytest.raises(ValueError, match=r"a_0001\.jpg and .*a_0001\.png"):
        channel_files(tmp_path / "channels")
    for name in ("one/1.dcm", "patient/study/two"):
        save(tmp_path / "hospital" / name)
    assert list(to_predict(tmp_path / "hospital", volumes=True)) == ["one"]
    assert "patient/study/two" in caplog.text and "1.dcm" not in caplog.text
    caplog.clear()
    assert not to_predict(tmp_path / "hospital" / "one", volumes=True) and not caplog.text, "its own slices are read"


def test_masks_and_predictions_are_no_images(tmp_path):
    for name in ("a", "a_mask", "a_mask_1", "a_overlay", "a_segmentation", "b_superpixels", "face_mask"):
        save(tmp_path / f"{name}.png")
    write_png(tmp_path / "gone_mask.png", PIXELS)
    write_png(tmp_path / "gone_overlay.png", PIXELS)
    assert list(images_to_predict(tmp_path)) == ["a", "b_superpixels", "face_mask"]
    grid = Grid((3, 4, 5), np.eye(4))
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "brain_mask.nii.gz")
    write_mask_volume(tmp_path / "v_mask.nii.gz", np.zeros((3, 4, 5)), grid)
    assert list(images_to_predict(tmp_path, (".nii.gz", ".nii"))) == ["brain_mask"]


def test_files_of_one_name_are_all_kept(tmp_path):
    for name in ("a.png", "a.jpg", "a.png.jpg", "b.png"):
        save(tmp_path / name)
    found = images_to_predict(tmp_path)
    assert {file.name for file in found.values()} == {"a.png", "a.jpg", "a.png.jpg", "b.png"}
    assert found["b"].name == "b.png" and len(found) == 4


ROWS = [("0007", "1"), ("b", "2")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize(
    "text",
    [
        "image_id,grade\n0007,1\nb,2\n",
        "image_id;grade\r\n0007;1\r\nb;2\r\n",
        "IMAGE_ID\tGrade\tmore, or less\n0007\t1\tx\nb\t2\ty\n",
        'Image_Id, grade\n"0007", 1\n b , 2 \n\n',
    ],
)
def test_tables_of_every_encoding_and_separator(tmp_path, encoding, text):
    content = text.encode(encoding)
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe" + content if encoding == "utf-16-le" else content)
    header, rows = table_rows(tmp_path / "t.csv")
    assert [name.lower() for name in header[:2]] == ["image_id", "grade"]
    assert [tuple(row[name] for name in header[:2]) for row in rows if any(row.values())] == ROWS


def test_tables_whose_cells_have_no_place_are_refused(tmp_path):
    for text, named in (("image,a,a\n1,0,1\n", "several columns a"), ("image,a\n1,0\n2,0,5\n", "line 3")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ValueError, match=named):
            table_rows(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("image,a\n1,0,\n")
    assert table_rows(tmp_path / "t.csv")[1] == [{"image": "1", "a": "0"}], "an empty cell more is nothing"


def test_a_text_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt.*UTF-8"):
        read_text(tmp_path / "latin.txt")
