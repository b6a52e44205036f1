"""Seconds that calibration's solve takes for the layers of a ViT-B, on made-up curvature with a decaying spectrum.

python scripts/bench_calibrate.py [--tasks 8] [--device cuda]
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from torch import Tensor

from hf_epimer.calibrating import RHO, SHARE
from hf_epimer.numerics.regression import anchored_step

LAYERS = {"attention": (768, 769), "fc1": (3072, 769), "fc2": (768, 3073)}
"""Outputs, and inputs with the bias."""


def decaying(size: int, generator: torch.Generator) -> Tensor:
    """Symmetric, positive, eigenvalues i^-1.2 in random directions."""
    directions, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return (directions * torch.arange(1, size + 1).float() ** -1.2) @ directions.mT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    generator, tasks = torch.Generator().manual_seed(0), options.tasks
    for name, (m, n) in LAYERS.items():
        grams, outputs = (torch.stack([decaying(size, generator) for _ in range(tasks)]) for size in (n, m))
        crosses = torch.randn(tasks, m, n, generator=generator) @ grams * 0.1
        moved = [tensor.to(options.device) for tensor in (grams, crosses, outputs, torch.full((tasks,), 1 / tasks))]
        started = time.perf_counter()
        found = anchored_step(*moved, rho=RHO, share=SHARE)
        norm = float(found.x.norm())  # waits for the device
        seconds = time.perf_counter() - started
        Console().print(f"{name}, {m} x {n}: {seconds:.1f} s, {found.steps} steps, norm {norm:.3g}", highlight=False)


if __name__ == "__main__":
    main()
