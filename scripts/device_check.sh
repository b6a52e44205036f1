#!/usr/bin/env bash
# What a GPU does with ViT-B/32 and eight tasks, on random weights and pictures, in under five minutes:
#
#   1. a whole merge by the command: Fisher information and Gram matrices of every task, EpiMer, calibration, accuracies
#   2. calibration beside FeatCal, after its paper, on the same pictures
#   3. a pass for the same statistics beside a training step
#
#     scripts/device_check.sh [DEVICE] [tiny]          # cuda where none is named; tiny: whether it runs, on any machine
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
python=${PYTHON:-python}
zoo=() size=() batch=()
if [ "${2:-}" = tiny ]; then
    zoo=(--tasks 2 --images 8 --blocks 1) size=("${zoo[@]}" --width 96) batch=(--batch-size 2)
fi

against() { # NAME PRINTED ROW COLUMN AIM: a figure, and what is aimed at
    awk -v row="$3" -v column="$4" -v said="$1: %s, where $5 is aimed at\n" '$1 == row { printf said, $column }' <<<"$2"
}

merge=$("$python" scripts/bench_calibrate.py --device "$device" --method epimer --evaluate "${zoo[@]}" | tee >(cat >&2))
speed=$("$python" scripts/peers/speed.py --device "$device" "${size[@]}" | tee >(cat >&2))
"$python" scripts/bench_fisher.py --device "$device" --runs 2 --contenders "diagonal + gram" "${batch[@]}"
against "seconds of the whole merge" "$merge" process 2 120
against "calibration's by FeatCal's" "$speed" float32 4 0.5
against "the same, with passes in bfloat16" "$speed" bfloat16 4 0.5
echo "seconds of this check: $SECONDS, where 300 is aimed at"
