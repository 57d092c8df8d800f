"""The page answers as `predict`, in a browser without a network, and lives on after files that it cannot use."""

from __future__ import annotations

import base64
import csv
import gzip
import itertools
import json
import shutil
import struct
import zlib

import nibabel as nib
import numpy as np
import onnx
import onnxruntime
import pytest
from browser import Browser
from helpers import shared_data, without
from own_data import FINDINGS
from PIL import Image, ImageCms, PngImagePlugin
from test_predict import turn
from test_reading import pictures, volumes

from amkd_monai.__main__ import main
from amkd_monai.export.page import check_image, fused, runtime_archive, write_page
from amkd_monai.export.predict import Predictor
from amkd_monai.files.pictures import read_picture
from amkd_monai.files.steps import prepare
from amkd_monai.storage import read_json


@pytest.fixture(scope="module")
def archive():
    try:
        return runtime_archive()
    except FileNotFoundError as error:
        without("npm", str(error))


@pytest.fixture(scope="module")
def page(exported, request, archive, tmp_path_factory):
    """Open the page of a student of 32 bits, of a task or of findings, in a browser, once."""
    opened = {}

    def get(task):
        if task not in opened:
            folder = tmp_path_factory.mktemp("page")
            dist = folder / "dist"
            if task == "findings":
                formats = ["--formats", "ts,onnx,ort-int8", "--accept-loss", "--calibration", "4"]
                bundle = request.getfixturevalue("finding_bundle")
                assert main(["export", str(bundle), "--to", str(dist), *formats]) == 0
            else:
                shutil.copytree(exported(task)[0] / "dist" / task, dist)
            write_page(dist, archive)
            browser = Browser(folder / "browser")
            opened[task] = browser, dist
            browser.open((dist / "web" / "index.html").as_uri())
            assert "8 bits, WebAssembly" in browser.evaluate("by('runtime').textContent")
            browser.evaluate(BITS_32)
        return opened[task]

    yield get
    for browser, _ in opened.values():
        asked = [url for url in browser.asked if not url.startswith(("file:", "blob:", "data:"))]
        complaints = [text for text in browser.complaints if "No available adapters" not in text]
        browser.close()
        assert not asked and not complaints


BITS_32 = "opened('float', 'wasm').then((other) => { networks = { 8: network, 32: other }; network = other; })"


def test_a_browser_loads_less_than_15_megabytes_and_8_with_the_network_of_8_bits(page):
    browser, dist = page("kvasir_seg")
    names = {url.rpartition("/")[2] for url in browser.asked if url.startswith("file:")}
    sizes = {name: (dist / "web" / name).stat().st_size for name in names}
    assert sum(sizes.values()) - sizes["network_float.js"] < 8e6
    assert sum(sizes.values()) - sizes["network_int8.js"] < 15e6


def test_the_network_of_8_bits_is_fused_for_the_page_and_answers_as_the_exported_one(exported):
    model = exported("kvasir_seg")[0] / "dist" / "kvasir_seg" / "models" / "model_int8.onnx"
    given, image = fused(model), check_image([3, 64, 96])
    assert len(onnx.load_from_string(given).graph.node) < len(onnx.load(model).graph.node) / 2
    answers = []
    for network, level in ((given, "ORT_DISABLE_ALL"), (str(model), "ORT_ENABLE_EXTENDED")):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        answers += onnxruntime.InferenceSession(network, options).run(None, {"image": image})
    np.testing.assert_array_equal(*answers)


def dice(a, b):
    whole = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero((a == b) & (a > 0)) / whole if whole else 1.0


def predicted(dist, images, output, *options):
    assert main(["predict", "--model", str(dist), str(images), "--output", str(output), *options]) == 0
    return output


@pytest.mark.parametrize("bits", [32, 8])
def test_masks_of_real_pictures_are_those_of_predict(page, tmp_path, bits):
    """With 8 bits the last bit of the first layer, one of 32 bits, decides where this barely trained student doubts."""
    browser, dist = page("kvasir_seg")
    found = sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))[:4]
    found += sorted(shared_data("BUSI").rglob("*1).png"))[:2]
    images = tmp_path / "images"
    images.mkdir()
    for file in found:
        shutil.copyfile(file, images / file.name.replace(" ", "_"))
    files = sorted(images.iterdir())
    predicted(dist, images, tmp_path / "predict", *(["--int8"] if bits == 8 else []))
    browser.evaluate(f"void (network = networks[{bits}])")
    browser.give(*files)
    browser.evaluate("void (network = networks[32])")
    browser.click("save_all")
    predictor = Predictor(dist, bits == 8, 1)
    for file in files:
        name = f"{file.stem}_mask.png"
        saved, expected = (np.asarray(Image.open(p)) for p in (browser.download(name), tmp_path / "predict" / name))
        browser.downloads.joinpath(name).unlink()
        assert saved.shape == expected.shape and set(np.unique(saved)) <= {0, 255}
        if bits == 32:
            assert dice(saved, expected) >= 0.999, file.name
        answer, (back,) = predictor.probabilities(read_picture(file).transpose(2, 0, 1).astype(np.float32))
        clear = np.abs(back(answer)[1] - 0.5) > (0.1 if bits == 8 else 0.01)
        assert clear.mean() > 0.2 and (saved == expected)[clear].all(), file.name
    assert browser.evaluate("by('figures').textContent").startswith("polyp")


def test_masks_of_volumes_are_those_of_predict_in_every_order(page, tmp_path):
    browser, dist = page("msd_heart")
    image = nib.load(sorted(shared_data("MSD-Heart").rglob("imagesTr/la_*.nii.gz"))[0])
    small = nib.Nifti1Image(np.asanyarray(image.dataobj)[::3, ::3, ::4], image.affine @ np.diag([3, 3, 4, 1]))
    images = tmp_path / "images"
    images.mkdir()
    nib.save(image, images / "real.nii.gz")
    nib.save(small, images / "small.nii")
    for name, volume in volumes(small).items():
        nib.save(volume, images / f"{name}.nii.gz")
    nib.save(nib.Nifti2Image(small.dataobj, small.affine), images / "second.nii.gz")
    tilted = turn(0, 2, 0.5) @ turn(1, 2, 0.6) @ small.affine
    nib.save(nib.Nifti1Image(small.dataobj, tilted), images / "tilted.nii.gz")
    files = sorted(images.iterdir())
    predicted(dist, images, tmp_path / "predict")
    browser.give(*files)
    assert browser.evaluate("entries.map((e) => e.said)") == ["left atrium"] * len(files)
    browser.click("save_all")
    for file in files:
        name = file.name.split(".")[0] + "_mask.nii.gz"
        saved, expected = (nib.load(p) for p in (browser.download(name), tmp_path / "predict" / name))
        assert dice(np.asanyarray(saved.dataobj), np.asanyarray(expected.dataobj)) >= 0.999, file.name
        np.testing.assert_allclose(saved.affine, expected.affine, rtol=1e-6)
        for key in ("qform_code", "sform_code", "xyzt_units", "dim"):
            np.testing.assert_array_equal(saved.header[key], expected.header[key], err_msg=f"{file.name} {key}")
    voxels = np.count_nonzero(np.asanyarray(nib.load(tmp_path / "predict" / "small_mask.nii.gz").dataobj))
    browser.evaluate("show(entries.find((e) => e.id === 'small'))")
    volume = voxels * abs(np.linalg.det(small.affine[:3, :3])) / 1000
    shown = browser.evaluate("figuresOf(shown)[0][1].find(([key]) => key === 'volume')[1]")
    assert float(shown.removesuffix(" ml").replace(",", "")) == pytest.approx(volume, rel=5e-3)


def both_tables(browser, dist, images, tmp_path):
    """The rows that the page saves and those of `predict`."""
    predicted(dist, images, tmp_path / "predict")
    browser.give(*sorted(images.iterdir()))
    browser.click("save_all")
    files = browser.download("predictions.csv"), tmp_path / "predict" / "predictions.csv"
    return [list(csv.DictReader(file.open())) for file in files]


def test_classes_are_those_of_predict(page, tmp_path):
    browser, dist = page("aptos2019")
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted(shared_data("APTOS2019_standin_IDRiD", "train_images").iterdir())[:3]:
        shutil.copyfile(file, images / file.name)
    saved, expected = both_tables(browser, dist, images, tmp_path)
    assert len(saved) == 3
    for ours, theirs in zip(saved, expected, strict=True):
        assert ours.keys() == theirs.keys() and (ours["id"], ours["class"]) == (theirs["id"], theirs["class"])
        for key in list(ours)[2:]:
            assert float(ours[key]) == pytest.approx(float(theirs[key]), abs=2e-3)
    assert "temperature" in browser.evaluate("by('calibration').textContent")


def test_findings_are_those_of_predict(page, finding_bundle, tmp_path):
    browser, dist = page("findings")
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted((finding_bundle.parent / "data" / "images").iterdir())[:12]:
        shutil.copyfile(file, images / file.name)
    saved, expected = both_tables(browser, dist, images, tmp_path)
    said = browser.evaluate("entries.map((entry) => entry.said)")
    columns = ["p_mass", "p_fluid_level", "p_stripes"]
    assert len(saved) == 12 and len({row["class"] for row in saved}) > 2
    for ours, theirs, sentence in zip(saved, expected, said, strict=True):
        assert list(ours) == list(theirs) == ["id", "class", *columns]
        assert (ours["id"], ours["class"]) == (theirs["id"], theirs["class"])
        values = [float(theirs[name]) for name in columns]
        assert [float(ours[name]) for name in columns] == pytest.approx(values, abs=2e-3)
        shown = [f"{n} {float(ours[c]):.2f}" for n, c in zip(FINDINGS, columns, strict=True) if float(ours[c]) >= 0.5]
        assert sentence == (", ".join(shown) or "none")
    cells = "[...by('figures').querySelectorAll('tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    browser.evaluate("show(entries[3])")
    for (name, probability, _, verdict), column in zip(browser.evaluate(cells), columns, strict=True):
        value = float(saved[3][column])
        assert name.lower().replace(" ", "_") == column[2:] and float(probability) == pytest.approx(value, abs=6e-4)
        assert verdict == ("present" if value >= 0.5 else "absent")
    assert browser.evaluate("student.networks.float.check.length") == 64
    wrong = "(student.networks.int8.check[63] += 0.5, openStudent().catch((error) => error.message))"
    assert "answers otherwise" in browser.evaluate(wrong)


def odd_pictures(picture, folder):
    """Pictures of many modes in files of every kind that the page reads."""
    grey = picture.mean(2).astype(np.uint8)
    deep = grey.astype(np.uint16) * 129 + np.arange(grey.size, dtype=np.uint16).reshape(grey.shape) % 97
    alpha = np.arange(grey.size).reshape(grey.shape).astype(np.uint8)
    stored = {name: image for name, image in pictures(picture).items() if name.endswith(".png")}
    stored |= {"deep.png": Image.fromarray(deep), "soft.png": Image.fromarray(np.dstack([picture, alpha]))}
    stored |= {"grey.jpg": Image.fromarray(grey), "plain.bmp": Image.fromarray(picture)}
    stored["grey_alpha.png"] = Image.fromarray(np.dstack([grey, alpha]), "LA")
    for name, image in stored.items():
        image.save(folder / name, **({"exif": image.info["exif"]} if "exif" in image.info else {}))
    palette = Image.fromarray(picture).quantize(30)
    palette.save(folder / "palette_alpha.png", transparency=bytes(range(0, 240, 8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(folder / "turned.jpg", exif=exif, quality=95, subsampling=0)
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    Image.fromarray(picture).save(folder / "xmp.png", pnginfo=xmp)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"XYZr"), (b"bXYZ", b"rXYZ"), (b"XYZr", b"bXYZ")):  # red and blue change places
        profile = profile.replace(old, new)
    Image.fromarray(picture).save(folder / "profile.jpg", icc_profile=profile, quality=90)
    Image.fromarray(picture).save(folder / "profile.png", icc_profile=profile)
    (folder / "interlaced.png").write_bytes(interlaced(picture))
    return sorted(folder.iterdir())


def interlaced(picture):
    """A PNG of Adam's seven passes, which Pillow reads but does not write."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = b"".join(
        b"\0" + row.tobytes() for x, y, dx, dy in passes for row in np.ascontiguousarray(picture[y::dy, x::dx])
    )
    head = struct.pack(">IIBBBBB", picture.shape[1], picture.shape[0], 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


INPUT = """(async () => {
  const { array, grid } = await readInput(by("files").files[NUMBER]), [image] = prepare(array, student.steps, grid);
  const bytes = new Uint8Array(image.data.buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return [image.shape, btoa(text)];
})()"""


@pytest.mark.parametrize("task", ["kvasir_seg", "aptos2019"])
def test_preprocessing_is_that_of_predict_over_odd_pictures(page, tmp_path, task):
    browser, dist = page(task)
    source = {"kvasir_seg": "Kvasir-SEG/images", "aptos2019": "APTOS2019_standin_IDRiD/train_images"}[task]
    picture = Image.open(sorted(shared_data(source).iterdir())[0]).convert("RGB").resize((211, 164))
    files = odd_pictures(np.asarray(picture), tmp_path)
    browser.give(*files)
    own, each = read_json(dist / "configs" / "predict.json")["steps"], {"lower": 1, "upper": 97, "channel_wise": True}
    for (number, file), steps in itertools.product(enumerate(files), (own, [{"step": "scale_percentiles", **each}])):
        asked = INPUT.replace("NUMBER", str(number)).replace("student.steps", json.dumps(steps))
        shape, text = browser.evaluate(asked)
        found = np.frombuffer(base64.b64decode(text), np.float32).reshape(shape)
        expected = prepare(read_picture(file).transpose(2, 0, 1).astype(np.float32), steps)[0]
        assert found.shape == expected.shape, file.name
        off = np.abs(found - expected)
        if file.suffix == ".jpg":  # two decoders may round otherwise
            assert off.max() < 0.02 and off.mean() < 1e-3, file.name
        else:
            assert off.max() < 1e-5, file.name


def test_files_that_cannot_be_used_get_a_sentence_and_the_page_lives_on(page, tmp_path):
    browser, _ = page("kvasir_seg")
    source = sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))[0]
    good, picture = source.read_bytes(), Image.open(source).convert("RGB").resize((128, 96))
    picture.save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    wrong = {
        "empty.png": (b"", "empty"),
        "text.png": (b"hello, I am no picture", "pictures"),
        "short.jpg": (good[: len(good) // 2], "cut short"),
        "short.png": (png[: len(png) // 2], "cut short"),
        "damaged.png": (png[:200] + b"x" + png[201:], "damaged"),
        "volume.nii.gz": (gzip.compress(b"n" * 900), "pictures"),
    }
    for name, (content, _) in wrong.items():
        (tmp_path / name).write_bytes(content)
    for name, image in {
        "blank.png": Image.new("RGB", (64, 64), (9, 9, 9)),
        "print.jpg": picture.convert("CMYK"),
        "x.tif": picture,
    }.items():
        image.save(tmp_path / name)
    wrong |= {"blank.png": (0, "levels"), "print.jpg": (0, "CMYK"), "x.tif": (0, "TIFF")}
    browser.evaluate("entries.length = 0")
    browser.give(*(tmp_path / name for name in wrong), tmp_path / "a.png")
    said = dict(browser.evaluate("entries.map((e) => [e.file.name, e.said])"))
    for name, (_, word) in wrong.items():
        assert word in said[name] and said[name].count(". ") == 0, (name, said[name])
    seen = "getComputedStyle(document.querySelector('.refused button')).opacity"
    assert browser.evaluate(seen) == "1", "the sentence is no pale text of a button that is off"
    assert "larger than 1 GiB" in browser.evaluate("readInput({ size: 2 ** 31 }).catch((error) => error.message)")
    assert browser.evaluate("entries.at(-1).state") == "done"
    assert "1 of 10 predicted" in browser.evaluate("by('status').textContent")


def test_a_student_of_another_version_or_that_answers_otherwise_is_refused_by_name(page):
    browser, dist = page("kvasir_seg")
    assert "another version" in browser.evaluate("(student.version = 2, openStudent().catch((e) => e.message))")
    wrong = "(student.version = 3, student.networks.int8.check[3] += 0.5, openStudent().catch((e) => e.message))"
    assert "answers otherwise" in browser.evaluate(wrong)
    assert {"web", "models"} <= {path.name for path in dist.iterdir()}


def test_the_page_works_by_keyboard_and_at_400_pixels(page, tmp_path):
    browser, _ = page("kvasir_seg")
    browser.give(sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))[0])
    for width in (1280, 400):
        browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        for words in ("NOT FOR CLINICAL USE", "generated phantoms"):
            assert words in browser.evaluate("document.querySelector('.banner').textContent")
        assert browser.evaluate("document.querySelector('.banner').getBoundingClientRect().top") >= 0
    reached = []
    browser.evaluate("document.activeElement.blur()")
    for _ in range(40):
        for kind in ("keyDown", "keyUp"):
            browser("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "canvas":
            for kind in ("keyDown", "keyUp"):
                browser("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
            assert "probability" in browser.evaluate("by('reading').textContent")
    wanted = {
        "files",
        "save_all",
        "canvas",
        "opacity",
        "outline",
        "shading",
        "pixel",
        "save",
        "save_picture",
        "SUMMARY",
    }
    assert wanted <= {*reached}
    browser.evaluate("(by('pixel').value = 0.5, by('pixel').dispatchEvent(new Event('input')))")
    assert "mm²" in browser.evaluate("by('figures').textContent")


def test_an_archive_that_is_another_one_is_refused(tmp_path):
    other = tmp_path / "other.tgz"
    other.write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-512"):
        runtime_archive(other)
