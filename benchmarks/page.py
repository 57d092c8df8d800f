"""How long the page of a student takes from opening to its first mask, and how much a browser loads for it.

    python benchmarks/page.py

An untrained student of 256 px is exported. Headless Chromium without a network opens its page from disk and gets a
phantom: WebAssembly, one thread. The exit code is 1 if a goal is missed."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from browser import Browser
from inference import export

from amkd_monai.data.datalist import inference_datalist
from amkd_monai.export.page import runtime_archive, write_page

MOST_SECONDS, MOST_MEGABYTES = 2.0, 15.0
COMMON = ("index.html", "page.css", "student.js", "files.js", "network.js", "page.js", "steps.js")
LOADED = {
    "8 bits, WebAssembly": ("network_int8.js", "runtime_wasm.js", "runtime_wasm_glue.js", "ort.wasm.min.js"),
    "32 bits, WebAssembly": ("network_float.js", "runtime_wasm.js", "runtime_wasm_glue.js", "ort.wasm.min.js"),
    "32 bits, WebGPU": ("network_float.js", "runtime_jspi.js", "runtime_jspi_glue.js", "ort.jspi.min.js"),
}


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds, seconds, kept = parser.parse_args().rounds, [], True
    with tempfile.TemporaryDirectory() as temporary:
        dist = export(Path(temporary), 256)[1]
        write_page(dist, runtime_archive())
        page, picture = dist / "web", Path(inference_datalist("kvasir_seg", cache_dir=Path(temporary))[0]["image"])
        for name, files in LOADED.items():
            megabytes = sum((page / file).stat().st_size for file in (*COMMON, *files)) / 1e6
            kept &= megabytes <= MOST_MEGABYTES
            print(f"{name}: {megabytes:.1f} MB are loaded (at most {MOST_MEGABYTES:g})", flush=True)
        for number in range(rounds):
            browser = Browser(Path(temporary) / str(number))
            start = time.perf_counter()
            browser.open((page / "index.html").as_uri())
            opened = time.perf_counter() - start
            browser.give(picture.resolve())
            seconds.append(time.perf_counter() - start)
            runtime = browser.evaluate("by('runtime').textContent")
            browser.close()
            print(f"{runtime[:20]}: ready after {opened:.2f} s, first mask after {seconds[-1]:.2f} s", flush=True)
    kept &= statistics.median(seconds) <= MOST_SECONDS
    print(f"median {statistics.median(seconds):.2f} s (at most {MOST_SECONDS:g}): {'kept' if kept else 'MISSED'}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
