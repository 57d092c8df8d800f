"""What the foundation teachers cost: seconds, parameters, GFLOPs, memory, and what bfloat16 changes.

python benchmarks/teachers.py                                    # all, random weights, one process per teacher
python benchmarks/teachers.py --only usfm --images 5 --device cuda
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

TEACHERS: dict[str, tuple[dict, int]] = {
    "medsam": ({"kind": "medsam", "grid_limit": 64}, 1024),
    "retfound": ({"kind": "retfound"}, 224),
    "retfound_dinov2": ({"kind": "retfound", "variant": "dinov2_meh"}, 224),
    "usfm": ({"kind": "usfm"}, 224),
    "biomedparse": ({"kind": "biomedparse", "token_ids": [[49406, 12639, 49407]]}, 1024),
}
"""Description and side of the input image in pixels."""

HEADER = ("teacher", "input", "parameters", "GFLOP", "s/image float32", "bfloat16", "cosine", "peak MB")


def measure(name: str, images: int, device: str) -> dict[str, float | str]:
    """Run one teacher in this process; cost does not depend on the weights, so they may be random."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from amkd_monai.memory import own_peak
    from amkd_monai.teachers.base import build_teacher

    def clock() -> float:
        if device == "cpu":
            return time.process_time()  # what other programs take does not count
        torch.cuda.synchronize()
        return time.perf_counter()

    description, size = TEACHERS[name]
    teacher = build_teacher({"name": name, **description, "weights": "random"}).to(device)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    flops = FlopCounterMode(display=False)

    def run(precision: str) -> tuple[torch.Tensor, float]:
        teacher.precision, start = precision, clock()
        for _ in range(images):
            grid = teacher(image).grid
        return grid.double().flatten(), (clock() - start) / images

    with torch.inference_mode():
        with flops:  # it cannot count under autocast
            exact, float32 = run("float32")
        peak = own_peak() if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
        rounded, bfloat16 = run("bfloat16")
    return {
        "parameters": sum(p.numel() for p in teacher.parameters()) / 1e6,
        "gflop": flops.get_total_flops() / images / 1e9,
        "float32": float32,
        "bfloat16": bfloat16,
        "cosine": float(torch.nn.functional.cosine_similarity(exact, rounded, dim=0)),
        "peak": peak,
        "device": torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} thread(s)",
    }


def main() -> None:
    """Measure each teacher in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TEACHERS, help="one teacher")
    parser.add_argument("--images", type=int, default=2, help="timed images per precision")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="measure --only in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments.only, arguments.images, arguments.device)))
        return
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    device = ""
    for name in [arguments.only] if arguments.only else TEACHERS:
        command = [sys.executable, __file__, "--json", "--only", name]
        command += ["--images", str(arguments.images), "--device", arguments.device]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        device, side = found["device"], TEACHERS[name][1]
        print(
            f"| {name} | {side} x {side} | {found['parameters']:.1f} M | {found['gflop']:.0f} | {found['float32']:.2f} "
            f"| {found['bfloat16']:.2f} | {found['cosine']:.6f} | {found['peak']:.0f} |",
            flush=True,
        )
    print(f"\n{device}")


if __name__ == "__main__":
    main()
