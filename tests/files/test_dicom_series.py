"""DICOM series: every slice is looked at; a folder gives whole volumes or one sentence."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from helpers import needs

from amkd_monai.files.cases import is_series
from amkd_monai.files.dicom import find_series, read_series
from amkd_monai.files.dicom_seg import write_captures, write_segmentation
from amkd_monai.files.names import is_prediction
from amkd_monai.files.volumes import reorder

itk = needs("SimpleITK")
VOLUME = np.random.default_rng(0).integers(0, 900, (14, 17, 8)).astype(np.int16)  # (X, Y, Z) along RAS
STORED = VOLUME[::-1, ::-1].transpose(2, 1, 0)  # slices, rows, columns along LPS
UID = "1.2.826.0.1.3680043.2.1125.77"
AXIAL = (1, 0, 0, 0, 1, 0)


def write(path, plane, position, direction=AXIAL, number=1, series=".1", tags=(), **options):
    writer = itk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetUseCompression(options.get("compress", False))
    image = itk.GetImageFromArray(np.ascontiguousarray(plane[None]))
    image.SetSpacing((2.5, 1.25, 2.0))
    values = {
        "0008|0060": "MR",
        "0020|000e": UID + series,
        "0020|000d": UID,
        "0008|0018": f"{UID}{series}.{number}",
        "0020|0032": "\\".join(f"{c:.4f}" for c in position),
        "0020|0037": "\\".join(map(str, direction)),
        "0020|0013": str(number),
        **dict(tags),
    }
    for key, value in values.items():
        image.SetMetaData(key, value)
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.Execute(image)


def series(folder, planes=STORED, keep=None, step=2.0, lean=0.0, **options):
    folder.mkdir(exist_ok=True)
    for z in keep if keep is not None else range(len(planes)):
        place = (-60.0, -30.0 + lean * z, 10.0 + step * z)
        write(folder / f"{9 - z}.dcm", planes[z], place, number=z + 1, **options)
    return folder


def in_turns(folder, *tags):
    for first, own in enumerate(tags):
        series(folder, keep=range(first, 8, len(tags)), tags=own)
    return folder


def read(folder):
    (slices,) = find_series(folder)
    return read_series(folder, slices)


def right(folder, expected=VOLUME, atol=0.0):
    array, grid = read(folder)
    np.testing.assert_allclose(reorder(array, grid, "RAS"), expected, atol=atol)
    np.testing.assert_allclose(grid.reordered("RAS").spacing, (2.5, 1.25, 2.0), rtol=1e-5)
    np.testing.assert_allclose(grid.reordered("RAS").affine[:3, 3], (60 - 13 * 2.5, 30 - 16 * 1.25, 10), atol=1e-3)


def test_a_whole_series_is_its_volume_as_itk_reads_it(tmp_path):
    folder = series(tmp_path / "s")
    right(folder)
    reader = itk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    array, grid = read(folder)
    np.testing.assert_array_equal(array, itk.GetArrayFromImage(image).transpose(2, 1, 0))
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ np.array(image.GetOrigin()), grid.affine[:3, 3], atol=1e-3)


def test_foreign_files_and_single_slices_of_another_direction_are_left_out(tmp_path, caplog):
    folder = series(tmp_path / "s")
    for number in range(7):
        (folder / f"a{number}.txt").write_text("a note of some length " * 9)
    write(folder / "zz.dcm", STORED[3], (0, -60, 150), (0, 1, 0, 0, 0, -1), 99)
    right(folder)
    assert "7 file(s)" in caplog.text and "1 slice(s)" in caplog.text


def test_two_directions_of_several_slices_are_two_volumes(tmp_path):
    folder = series(tmp_path / "s")
    for number in range(4):
        write(folder / f"c{number}.dcm", STORED[3], (-60, 10.0 * number, 150), (1, 0, 0, 0, 0, -1), 90 + number)
    found = find_series(folder)
    assert sorted(map(len, found)) == [4, 8]
    for slices in found:
        assert read_series(folder, slices)[0].shape[2] == len(slices)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda f: series(f, keep=[0, 1, 2, 5, 6, 7]), r"6 slices and 2 missing"),
        (lambda f: (series(f), write(f / "x.dcm", STORED[2], (-60, -30, 14.0), number=50))[0], "9 slices of which 1 "),
        (
            lambda f: (series(f), write(f / "x.dcm", STORED[2][:, :-2], (-60, -30, 26.0), number=50))[0],
            "9 slices with several .*sizes",
        ),
        (lambda f: series(f, lean=0.5), "gantry tilt"),
        (
            lambda f: (series(f, keep=range(6)), write(f / "x.dcm", STORED[6], (-60, -30, 22.9), number=50))[0],
            "distance",
        ),
        (lambda f: series(f, keep=[3]), "1 slices alone"),
        (lambda f: in_turns(f, {}, {"0018|0081": "2"}), "echo"),
        (lambda f: in_turns(f, {"0018|0081": "2.3"}, {"0018|0081": "4.6"}), "echo"),
        (lambda f: in_turns(f, {"0020|0100": "19"}, {"0020|0100": "20"}), "time point"),
        (lambda f: in_turns(f, {"0018|9087": "0"}, {"0018|9087": "1000"}), "b-value"),
        (
            lambda f: (
                series(f, keep=[0, 1, 2, 4, 5, 6, 7]),
                write(f / "x.dcm", STORED[3], (-20, -30, 16.0), number=50),
            )[0],
            "in line",
        ),
    ],
)
def test_what_is_no_whole_volume_is_refused_with_a_number(tmp_path, build, words):
    folder = build(tmp_path / "s")
    with pytest.raises(ValueError, match=words):
        read(folder)


@pytest.mark.parametrize(("tag", "values"), [("0018|0081", ("4.60", "4.6", "4.606")), ("0018|9087", ("995", "1000"))])
def test_a_volume_may_be_measured_with_values_that_are_nearly_one(tmp_path, tag, values):
    right(in_turns(tmp_path / "s", *({tag: value} for value in values)))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"])
def test_values_that_a_table_gives_are_refused(tmp_path, syntax):
    pydicom = needs("pydicom")
    folder = series(tmp_path / "s")
    for file in folder.iterdir():
        slice_, table = pydicom.dcmread(file), pydicom.Dataset()
        table.ModalityLUTType = "US"
        for name, values in (("LUTDescriptor", [4, 0, 16]), ("LUTData", [9, 6, 3, 0])):
            table[name] = pydicom.DataElement(name, "US", values)
        slice_.ModalityLUTSequence, slice_.file_meta.TransferSyntaxUID = [table], syntax
        slice_.save_as(file)
    with pytest.raises(ValueError, match=r"8 slices .*ModalityLUTSequence"):
        read(folder)


def test_values_that_are_not_in_the_lowest_bits_are_refused(tmp_path):
    folder = series(tmp_path / "s", STORED.astype(np.uint16) << 4)
    right(folder, VOLUME * 16.0)
    for file in folder.iterdir():
        bits = rb"(\x28\x00\x01\x01(?:US\x02\x00|\x02\x00\x00\x00))\x10"  # BitsStored; HighBit stays 15
        content, changed = re.subn(bits, b"\\1\x0c", file.read_bytes())
        assert changed == 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"8 slices of which some .*HighBit"):
        read(folder)


def test_files_without_preamble_are_read(tmp_path):
    folder = series(tmp_path / "s")
    for file in folder.iterdir():
        content = file.read_bytes()
        assert content[128:132] == b"DICM"
        file.write_bytes(content[132:])
    right(folder)


def test_modality_values_and_inverted_grey_are_honoured(tmp_path):
    rescaled = (("0028|1052", "-1024"), ("0028|1053", "2"), ("0008|0060", "CT"))
    right(series(tmp_path / "ct", STORED * 2 - 1024, tags=rescaled), VOLUME * 2.0 - 1024)
    signed = series(tmp_path / "signed", (STORED - 500).astype(np.int16))
    right(signed, VOLUME - 500.0)
    right(series(tmp_path / "unsigned", STORED.astype(np.uint16) + 33000), VOLUME + 33000.0)
    flipped = (65535 - STORED.astype(np.int64)).astype(np.uint16)
    ct = {"tags": (("0008|0060", "CT"), ("0028|1052", "-1024"), ("0028|1053", "1"))}
    for name, stored, options, expected in (
        ("unsigned", flipped, {}, VOLUME),
        ("signed", -1 - STORED, {}, VOLUME),
        ("in units", STORED - 1024, ct, VOLUME - 1024.0),
    ):
        folder = series(tmp_path / f"inverted {name}", stored, **options)
        for file in folder.iterdir():
            content = file.read_bytes()
            assert content.count(b"MONOCHROME2") == 1
            file.write_bytes(content.replace(b"MONOCHROME2", b"MONOCHROME1"))
        right(folder, expected)


def test_slices_inverted_on_scales_of_their_own_keep_the_values_of_pet_and_are_refused_of_others(tmp_path):
    for name, kind in (("pet", "PT"), ("mr", "MR")):
        folder = tmp_path / name
        folder.mkdir()
        for z, plane in enumerate(STORED):
            tags = (("0008|0060", kind), ("0028|1052", "0"), ("0028|1053", str(1 + z % 2)))
            file, place = folder / f"{z}.dcm", (-60.0, -30.0, 10.0 + 2 * z)
            write(file, plane * 2, place, number=z + 1, tags=tags)
        right(folder, VOLUME * 2.0)
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes().replace(b"MONOCHROME2", b"MONOCHROME1"))
    right(tmp_path / "pet", VOLUME * 2.0)
    with pytest.raises(ValueError, match=r"8 slices .*scales"):
        read(tmp_path / "mr")


@pytest.mark.parametrize("tag", ["0010|0020", "0020|000d"])
def test_patients_or_studies_under_one_series_uid_are_never_mixed(tag, tmp_path):
    for number in (1, 2):
        keep = range(number - 1, len(STORED), 2)
        series(tmp_path / "s", keep=keep, tags=((tag, f"{UID}.{number}"),))
    found = [read_series(tmp_path / "s", slices)[0] for slices in find_series(tmp_path / "s")]
    assert sorted(array.shape for array in found) == [(14, 17, 4)] * 2
    for array in found:
        assert any((array == STORED[start::2].T).all() for start in (0, 1))


def test_compressed_slices_are_read(tmp_path):
    folder = series(tmp_path / "s", compress=True)
    assert sum(f.stat().st_size for f in folder.iterdir()) != sum(
        f.stat().st_size for f in series(tmp_path / "plain").iterdir()
    )
    right(folder)


def test_small_noise_of_the_header_splits_no_series(tmp_path):
    folder = series(tmp_path / "s", keep=range(7))
    write(folder / "x.dcm", STORED[7], (-60, -30, 24.0), (1, 0.0004, 0, -0.0004, 1, 0), number=50)
    assert [len(slices) for slices in find_series(folder)] == [8]


def test_names_of_any_bytes_are_read(tmp_path):
    folder = series(tmp_path / "s")
    for file in folder.iterdir():
        file.rename(os.fsdecode(os.fsencode(folder) + b"/pati\xebnt" + file.name.encode()))
    right(folder)


def test_a_damaged_slice_is_named(tmp_path):
    folder = series(tmp_path / "s")
    file = folder / "5.dcm"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cannot be read \(5\)|missing"):
        array, _ = read(folder)
        np.testing.assert_array_equal(array.shape, VOLUME.shape)
        raise AssertionError(f"read as {array[:, :, 4]}")


def test_a_folder_without_dicom_has_no_series(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 500)
    assert find_series(tmp_path) == []


def with_a_frame_of_reference(folder, direction):
    """pydicom, and the slices, volume and grid of a series that other DICOM objects can refer to."""
    needs("highdicom")
    series(folder, direction=direction, tags={"0020|0052": UID + ".9"})
    (slices,) = find_series(folder)
    return needs("pydicom"), slices, *read_series(folder, slices)


@pytest.mark.parametrize("direction", [AXIAL, (0, 1, 0, 1, 0, 0)])
def test_a_segmentation_lies_on_the_slices_it_was_made_from(direction, tmp_path):
    pydicom, slices, volume, grid = with_a_frame_of_reference(tmp_path / "s", direction)
    mask = (volume > 300).astype(np.uint8) + (volume > 600)
    files, classes = [item.file for item in slices], ("background", "left atrium", "rim of it")
    write_segmentation(tmp_path / "mask.dcm", mask, grid, files, classes)
    read = pydicom.dcmread(tmp_path / "mask.dcm")
    other = itk.GetArrayFromImage(itk.ReadImage(tmp_path / "mask.dcm"))  # by GDCM, which shares no code with it
    np.testing.assert_array_equal(other > 0, read.pixel_array > 0)
    assert read.Modality == "SEG" and read.FrameOfReferenceUID == UID + ".9"
    types = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in read.SegmentSequence]
    assert [(t.CodeValue, t.CodingSchemeDesignator) for t in types] == [("82471001", "SCT"), ("CLASS2", "99AMKD")]
    (referenced,) = read.ReferencedSeriesSequence
    sources = {item.ReferencedSOPInstanceUID: item for item in referenced.ReferencedInstanceSequence}
    assert referenced.SeriesInstanceUID == UID + ".1" and len(sources) == len(STORED)
    measures = read.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert list(measures.PixelSpacing) == [1.25, 2.5]
    seen = set()
    for frame, groups in zip(read.pixel_array, read.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        uid = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        z = int(uid.rsplit(".", 1)[1]) - 1
        assert list(groups.PlanePositionSequence[0].ImagePositionPatient) == [-60, -30, 10 + 2 * z]
        np.testing.assert_array_equal(frame, (STORED[z] > 300) * 1 + (STORED[z] > 600) == number)
        seen.add((z, number))
    assert len(seen) == 2 * len(STORED)


def test_dicom_that_a_prediction_writes_is_no_slice_and_replaces_no_other_file(tmp_path):
    _, slices, volume, grid = with_a_frame_of_reference(tmp_path / "s", AXIAL)
    files, mask = [item.file for item in slices], (volume > 300).astype(np.uint8)

    def write_both(segmentation, captures):
        write_segmentation(segmentation, mask, grid, files, ("background", "x"))
        write_captures(captures, mask, mask, grid, files, lambda a, _: np.repeat(a[..., None], 3, -1))

    for _ in range(2):
        write_both(tmp_path / "s" / "s_mask.dcm", tmp_path / "s_captures")
        ((*found,),) = find_series(tmp_path / "s")
        assert {item.file for item in found} == set(files)
        assert is_prediction(tmp_path / "s" / "s_mask.dcm") and not is_series(tmp_path / "s_captures")
    before = files[0].read_bytes()
    with pytest.raises(ValueError, match=re.escape(str(files[0]))):
        write_both(files[0], tmp_path / "other")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "s"))):
        write_both(tmp_path / "x.dcm", tmp_path / "s")
    assert files[0].read_bytes() == before


@pytest.mark.parametrize("direction", [AXIAL, (0, 1, 0, 1, 0, 0)])
def test_captures_are_a_series_of_pictures_of_its_slices(direction, tmp_path):
    pydicom, slices, volume, grid = with_a_frame_of_reference(tmp_path / "s", direction)
    mask, levels = (volume > 300).astype(np.uint8), (volume // 4).astype(np.uint8)
    files = [item.file for item in slices]
    for _ in range(2):  # another answer replaces them
        write_captures(
            tmp_path / "c", mask, levels, grid, files, lambda a, b: np.stack([a, 255 * b, 0 * a], -1).astype(np.uint8)
        )
    found = [pydicom.dcmread(file) for file in sorted((tmp_path / "c").iterdir())]
    assert len(found) == len(STORED) and len({item.SeriesInstanceUID for item in found} | {UID + ".1"}) == 2
    for item in found:
        assert item.StudyInstanceUID == UID and item.SOPClassUID.name == "Secondary Capture Image Storage"
        z = int(item.SourceImageSequence[0].ReferencedSOPInstanceUID.rsplit(".", 1)[1]) - 1
        np.testing.assert_array_equal(item.pixel_array[..., 0], STORED[z] // 4)
        np.testing.assert_array_equal(item.pixel_array[..., 1] > 0, STORED[z] > 300)
        assert list(item.PatientOrientation) == (["L", "P"] if direction == AXIAL else ["P", "L"])
        assert list(item.PixelSpacing) == [1.25, 2.5] and "not for clinical use" in item.SeriesDescription


@pytest.mark.parametrize(
    ("name", "value"),
    [("ImagePositionPatient", [-60, -27, 16]), ("PixelSpacing", [2.5, 1.25])],
    ids=["moved", "spacing"],
)
def test_a_slice_off_the_grid_of_its_series_is_refused(name, value, tmp_path):
    pydicom, slices, volume, grid = with_a_frame_of_reference(tmp_path / "s", AXIAL)
    files = [item.file for item in slices]
    changed = pydicom.dcmread(files[3])
    setattr(changed, name, value)
    changed.save_as(files[3])
    with pytest.raises(ValueError, match=changed.SOPInstanceUID):
        write_segmentation(tmp_path / "mask.dcm", (volume > 300).astype(np.uint8), grid, files, ("no", "yes"))
    assert not (tmp_path / "mask.dcm").exists()


def test_a_segmentation_needs_what_it_refers_to(tmp_path):
    needs("highdicom")
    folder = series(tmp_path / "s")
    (slices,) = find_series(folder)
    volume, grid = read_series(folder, slices)
    with pytest.raises(ValueError, match=r"\.dcm lacks FrameOfReferenceUID"):
        write_segmentation(tmp_path / "m.dcm", volume > 9, grid, [item.file for item in slices], ("background", "x"))
    assert not (tmp_path / "m.dcm").exists()
