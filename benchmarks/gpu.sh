#!/bin/bash
# What one GPU gives: full-size teachers, a cached step against a plain one, training rate, synchronisations,
# torch.compile. At most 6 minutes; prints a table for docs/scaling.md.
#
#   benchmarks/gpu.sh                 on the GPU; without one it says so and stops
#   benchmarks/gpu.sh --tiny          every part once at toy sizes, on any machine: shows that the script runs
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
export PYTHONPATH=$PWD
exec timeout --kill-after 5 360 "$python" benchmarks/gpu.py "$@"
