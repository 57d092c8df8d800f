"""How long the page of a student takes from opening to its first mask, and how much a browser loads for it.

    python benchmarks/page.py                        # exports an untrained student of 256 px first
    python benchmarks/page.py --dist dist/mybundle   # a student that was exported with the format web
    python benchmarks/page.py --dist dist/demo --file IMAGE --picture docs/page.jpg    # and a picture of the page

Headless Chromium without a network opens the page from disk and gets a picture: WebAssembly, one thread. Wall time is
what a user waits. On a busy machine read the processor's time of the page's thread, which does all but compile. Then
the parts of the start are timed one by one in the open page. The exit code is 1 if a goal is missed."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from browser import Browser
from PIL import Image

MOST_SECONDS, MOST_MEGABYTES = 2.0, 15.0
COMMON = ("index.html", "page.css", "student.js", "files.js", "network.js", "page.js", "steps.js")
LOADED = {
    "8 bits, WebAssembly": ("network_int8.js", "runtime_wasm.js", "runtime_wasm_glue.js", "ort.wasm.min.js"),
    "32 bits, WebAssembly": ("network_float.js", "runtime_wasm.js", "runtime_wasm_glue.js", "ort.wasm.min.js"),
    "32 bits, WebGPU": ("network_float.js", "runtime_jspi.js", "runtime_jspi_glue.js", "ort.jspi.min.js"),
}
PARTS = """(async () => {
  const parts = {}, timed = async (name, run) => {
    const start = performance.now(), result = await run();
    parts[name] = Math.round(performance.now() - start);
    return result;
  };
  const image = checkImage([student.check_shape[0], 256, 256]);
  const binary = await timed("unpack WebAssembly", () => unpacked("runtime_wasm"));
  const model = await timed("unpack network", () => unpacked(student.networks[network.kind].file));
  await timed("compile WebAssembly", () => WebAssembly.compile(binary));
  const how = {executionProviders: ["wasm"], graphOptimizationLevel: network.kind === "int8" ? "disabled" : "all"};
  const session = await timed("create session", () => ort.InferenceSession.create(model, how));
  const given = {image: new ort.Tensor("float32", image.data, image.shape)};
  for (const name of ["first run", "second run"]) await timed(name, () => session.run(given));
  return Object.entries(parts).map(([name, ms]) => `${name} ${ms} ms`).join(", ");
})()"""


def exported(folder: Path) -> Path:
    """Export an untrained student with its page."""
    from inference import export

    from amkd_monai.export.page import runtime_archive, write_page

    dist = export(folder, 256, ("onnx", "ort-int8"), cases=1, calibration=2)[1]
    write_page(dist, runtime_archive())
    return dist


def spent(browser: Browser) -> float:
    """Seconds of processor that the page's thread has taken."""
    processes = psutil.Process(browser.process.pid).children(recursive=True)
    threads = [(p.pid, t) for p in processes if "--type=renderer" in p.cmdline() for t in p.threads()]
    return sum(thread.user_time + thread.system_time for pid, thread in threads if thread.id == pid)


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, help="folder written by export (default: one is made)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", type=Path, help="image to give (default: one is made)")
    parser.add_argument("--picture", type=Path, help="JPEG of the page with the last answer")
    arguments = parser.parse_args()
    wall, processor, kept = [], [], True
    with tempfile.TemporaryDirectory() as temporary:
        page = (arguments.dist or exported(Path(temporary))).resolve() / "web"
        made = Path(temporary) / "picture.png"
        Image.effect_mandelbrot((512, 384), (-2, -1.5, 1, 1.5), 80).convert("RGB").save(made)
        for name, files in LOADED.items():
            if not (page / files[0]).is_file():
                continue
            megabytes = sum((page / file).stat().st_size for file in (*COMMON, *files)) / 1e6
            kept &= megabytes <= MOST_MEGABYTES
            print(f"{name}: {megabytes:.1f} MB are loaded (at most {MOST_MEGABYTES:g})", flush=True)
        for number in range(arguments.rounds):
            browser = Browser(Path(temporary) / str(number))
            start, before = time.perf_counter(), spent(browser)
            browser.open((page / "index.html").as_uri())
            opened, ready = time.perf_counter() - start, spent(browser) - before
            browser.give((arguments.file or made).resolve())
            wall.append(time.perf_counter() - start)
            processor.append(spent(browser) - before)
            runtime = browser.evaluate("by('runtime').textContent.split('(')[0]")
            print(f"{runtime}: ready after {opened:.2f} s ({ready:.2f} s of CPU), ", end="")
            print(f"mask after {wall[-1]:.2f} s ({processor[-1]:.2f} s of CPU)", flush=True)
            if number == arguments.rounds - 1:
                if arguments.picture:
                    browser.picture(made)
                    shot = Image.open(made).convert("RGB").crop((0, 0, 1280, 880))
                    shot.resize((1024, 704)).save(arguments.picture, quality=80)
                print(f"parts, with the page open: {browser.evaluate(PARTS)}")
            browser.close()
    median, cpu = statistics.median(wall), statistics.median(processor)
    kept &= median <= MOST_SECONDS
    verdict = f"{platform.machine()}: {'kept' if kept else 'MISSED'}"
    print(f"median {median:.2f} s (at most {MOST_SECONDS:g}), {cpu:.2f} s of CPU, {verdict}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
