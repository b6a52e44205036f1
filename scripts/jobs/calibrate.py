# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-epimer[plots]>=0.1"]
# ///
"""Merge on a rented GPU: the plain command, calibrated, measured beside its base and the fine-tuned models, and pushed.

    hf jobs uv run --flavor l4x1 --secrets HF_TOKEN scripts/jobs/calibrate.py org/a org/b --push-to org/m

The comment at the top is for uv, which makes the environment (PEP 723). Words are those of `hf-epimer merge` and stand
after, so they win over what is chosen here; without a GPU it runs on the CPU.
"""

from __future__ import annotations

import sys

import torch

from hf_epimer.cli.main import main

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = ("--method", "epimer-core", "--calibrate", "--evaluate", "--compare", "--device", DEVICE)

if __name__ == "__main__":
    sys.exit(main(["merge", *CHOSEN, *sys.argv[1:]]))
