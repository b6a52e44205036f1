#!/usr/bin/env bash
# What an accelerator does with ViT-B/32 and eight tasks: statistics, calibration and evaluation through one merge on
# random weights and pictures, then EpiMer and TSV-M from files. A few minutes.
#
#     scripts/device_check.sh [DEVICE]          # cuda where none is named
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
python=${PYTHON:-python}

"$python" scripts/bench_calibrate.py --device "$device" --evaluate
"$python" scripts/bench_merge.py --device "$device" --runs 2 --methods "tsv-m, rank 32" "epimer, rank 32"
