"""The student as a page that opens from disk or any static server: format ``web``.

The folder ``web/`` holds the page, whose files lie beside this module, ONNX Runtime Web, and the networks. A page from
disk may not fetch files, so that binary files become scripts: compressed, two bytes in each letter of UTF-16.
"""

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pooch

from amkd_monai import __version__
from amkd_monai.export.runners import runner
from amkd_monai.files.names import MARK
from amkd_monai.files.pictures import CLASS_COLOURS
from amkd_monai.files.steps import softmax
from amkd_monai.storage import atomic_path, read_json
from amkd_monai.terminal import logger

RUNTIME = "onnxruntime-web"
RELEASE = "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Version of the package of npm, and SHA-512 of its archive as npm states it."""
ESCAPE = 0xE000  # letter before one that a string cannot hold, whose highest bit is turned
PAGE = Path(__file__).with_name("web")
NETWORKS = {"float": ("onnx", 1e-3), "int8": ("ort-int8", 0.1)}
"""Format by the page's name, and how far its probabilities may be from those of ONNX Runtime on this machine.

8 bits: kernels round differently, and one level of a layer moves the probabilities of some pixels by hundredths.
"""
CHECKED, CHECK_SIDE = 64, 96
"""Probabilities of each network that the page compares before it answers anything, and the sides of that image, px."""


def runtime_archive(given: str | Path | None = None) -> Path:
    """Return the archive of ONNX Runtime Web: the given file, that of the user's cache, or npm's, which is kept there.

    A file of another SHA-512 is a ValueError; none, where npm does not get it, is a FileNotFoundError.
    """
    name = f"{RUNTIME}-{RELEASE}.tgz"
    if given:
        if not _is_intact(file := Path(given).expanduser()):
            raise ValueError(f"{file} is not npm's archive {name}: its SHA-512 differs: get it by `npm pack`.")
        return file
    kept = Path(pooch.os_cache("amkd_monai")) / name
    if _is_intact(kept):
        return kept
    logger.info("%s %s is fetched by npm and kept in %s.", RUNTIME, RELEASE, kept.parent)
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", f"{RUNTIME}@{RELEASE}", "--ignore-scripts", "--pack-destination", folder]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
            fetched = _is_intact(Path(folder) / name)
        except (OSError, subprocess.SubprocessError) as error:
            logger.debug("npm ended with an error.", exc_info=error)
            fetched = False
        if not fetched:
            raise FileNotFoundError(
                f"The format web needs {RUNTIME} {RELEASE}, which npm did not get: run `npm pack {RUNTIME}@{RELEASE}` "
                f"where there is npm and a network, and give the file by --web-runtime {name}."
            )
        with atomic_path(kept) as temporary:
            shutil.copyfile(Path(folder) / name, temporary)
    return kept


def _is_intact(file: Path) -> bool:
    return file.is_file() and base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode() == INTEGRITY


def write_page(folder: Path, archive: Path) -> None:
    """Write ``web/`` into the folder of an export from its other files; without an ONNX network a ValueError."""
    files = ("configs/predict.json", "configs/metadata.json", "docs/export.json")
    predict, metadata, facts = (read_json(folder / name) for name in files)
    card = (folder / "docs" / "README.md").read_text(encoding="utf-8")
    calibration = re.search(r"^- (Calibration: (?:.+\n)+?)(?=\n|- )", card, re.MULTILINE)
    found = {kind: form for kind, (form, _) in NETWORKS.items() if form in predict["models"]}
    if not found:
        raise ValueError("The format web needs the format onnx or ort-int8, and neither was written.")
    if (channels := predict["channels"]) > 1:
        raise ValueError(f"The format web opens one file an image, this student takes {channels}: leave it out.")
    page, networks = folder / "web", dict[str, Any]()
    shape = [facts["input_shape"][0], *(min(side, CHECK_SIDE) for side in facts["input_shape"][-2:])]
    shutil.copytree(PAGE, page)
    for kind, form in found.items():
        model = folder / predict["models"][form]
        content, planes = (_rounded(model), 4) if kind == "float" else (fused(model), 1)
        _write_script(page, f"network_{kind}", content, planes)
        answer = softmax(runner(form, model, 1)(check_image(shape)), 1).ravel()
        places = [i * (answer.size - 1) // (CHECKED - 1) for i in range(CHECKED)]
        check = [round(float(answer[i]), 7) for i in places]
        networks[kind] = {"file": f"network_{kind}", "check": check, "tolerance": NETWORKS[kind][1]}
    with tarfile.open(archive) as stored:
        for name in ("wasm", "jspi") if "float" in networks else ("wasm",):
            base = "ort-wasm-simd-threaded" + ("" if name == "wasm" else f".{name}")
            for suffix, script in (("wasm", f"runtime_{name}"), ("mjs", f"runtime_{name}_glue")):
                _write_script(page, script, _member(stored, f"{base}.{suffix}"))
            (page / f"ort.{name}.min.js").write_bytes(_member(stored, f"ort.{name}.min.js"))
    student = {
        **{key: predict[key] for key in ("version", "kind", "dimensions", "classes", "steps", "largest_component")},
        **{"name": predict["task"], "batch_size": predict["batch_size"]},
        **{"title": metadata["name"], "about": metadata["description"], "card": card, "mark": MARK},
        "warnings": re.findall(r"^\*\*(This student was .+)\*\*$", card, re.MULTILINE),
        "calibration": " ".join(calibration[1].split()) if calibration else "",
        "colours": CLASS_COLOURS,
        **{"networks": networks, "check_shape": shape, "runtime": f"{RUNTIME} {RELEASE}"},
        "origin": f"Exported by amkd_monai {__version__}.",
    }
    (page / "student.js").write_text(f'"use strict";\nconst student = {json.dumps(student)};\n', encoding="ascii")


def check_image(shape: list[int]) -> np.ndarray:
    """The image (1, C, H, W) of sine waves on which the page compares its probabilities."""
    c, y, x = (np.arange(n, dtype=np.float64) for n in shape)
    waves = 0.5 + 0.25 * np.sin(y[:, None] / 7 + c[:, None, None]) + 0.25 * np.cos(x / 11)
    return waves[None].astype(np.float32)


def _rounded(model: Path) -> bytes:
    """Return an ONNX network whose weights have 20 of 24 bits, which compress by a tenth of the file."""
    import onnx

    network = onnx.load(model)
    for tensor in network.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            bits = onnx.numpy_helper.to_array(tensor).view(np.uint32)
            rounded = (bits + np.uint32(8)) & np.uint32(0xFFFFFFF0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(rounded.view(np.float32), tensor.name))
    return bytes(network.SerializeToString())


def fused(model: Path) -> bytes:
    """Return an ONNX network of 8 bits with the nodes that ONNX Runtime makes of it when it opens it.

    Made here, they spare the browser this work, which is most of the time in which the page opens.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # of no one processor
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/fused.onnx"
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        return Path(options.optimized_model_filepath).read_bytes()


def _member(stored: tarfile.TarFile, name: str) -> bytes:
    stream = stored.extractfile(f"package/dist/{name}")
    assert stream is not None, name  # the archive is that of the SHA-512
    return stream.read()


def _write_script(page: Path, name: str, content: bytes, planes: int = 1) -> None:
    """Write bytes as a script; ``planes`` of 4 stores the bytes of numbers apart, which compresses floats better."""
    numbers = np.frombuffer(content + bytes(-len(content) % planes), np.uint8).reshape(-1, planes)
    body = gzip.compress(numbers.T.tobytes(), 6, mtime=0)
    letters = np.frombuffer(body + bytes(len(body) % 2), "<u2")
    forbidden = ((letters >= 0xD800) & (letters <= ESCAPE)) | np.isin(letters, list(map(ord, '"\\\r\n')))
    text = np.repeat(letters, 1 + forbidden)
    second = np.flatnonzero(forbidden) + np.arange(1, np.count_nonzero(forbidden) + 1)
    text[second - 1], text[second] = ESCAPE, text[second] ^ 0x8000
    head = f'packed.{name} = {{size: {len(content)}, length: {len(body)}, planes: {planes}, text: "'
    whole = "\ufeff".encode("utf-16-le") + head.encode("utf-16-le") + text.tobytes() + '"};\n'.encode("utf-16-le")
    (page / f"{name}.js").write_bytes(whole)
