"""What calibration costs for a ViT-B: the solve of each kind of layer, and one whole block of a ViT-B/32.

    python scripts/bench_calibrate.py [--tasks 8] [--images 256] [--device cuda]

Weights are random and curvature is made up, with a decaying spectrum. A block is solved as `--calibrate` does it, with
all its passes over images and crops; a ViT-B has 12 of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.models.clip import CLIP
from hf_epimer.models.weights import parameters_of
from hf_epimer.numerics.regression import anchored_step
from hf_epimer.pipeline.calibration.step import RHO, SHARE, VIEWS, CalibrationTask, calibrate
from hf_epimer.tasks.images import Batch

LAYERS = {"attention": (768, 769), "fc1": (3072, 769), "fc2": (768, 3073)}
"""Outputs, and inputs with the bias."""


def decaying(size: int, generator: torch.Generator) -> Tensor:
    """Symmetric, positive, eigenvalues i^-1.2 in random directions."""
    directions, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return (directions * torch.arange(1, size + 1).float() ** -1.2) @ directions.mT


def solve(name: str, tasks: int, device: str, console: Console) -> None:
    """One layer's solve."""
    generator, (m, n) = torch.Generator().manual_seed(0), LAYERS[name]
    grams, outputs = (torch.stack([decaying(size, generator) for _ in range(tasks)]) for size in (n, m))
    crosses = torch.randn(tasks, m, n, generator=generator) @ grams * 0.1
    moved = [tensor.to(device) for tensor in (grams, crosses, outputs, torch.full((tasks,), 1 / tasks))]
    started = time.perf_counter()
    found = anchored_step(*moved, rho=RHO, share=SHARE)
    norm = float(found.x.norm())  # waits for the device
    seconds = time.perf_counter() - started
    console.print(f"{name}, {m} x {n}: {seconds:.1f} s, {found.steps} steps, norm {norm:.3g}")


def whole_block(tasks: int, images: int, device: str, console: Console) -> None:
    """One block of a ViT-B/32."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1)).eval()
    generator, factors = torch.Generator().manual_seed(0), {}
    for size in {m for m, _ in LAYERS.values()}:
        factors[size] = decaying(size, generator)
    curvature: dict[str, Tensor] = {}
    for stage in CLIP.stages:
        for name in stage.layers:
            full = f"{CLIP.prefix}{CLIP.blocks}.0.{name}.weight"
            size = len(tower.get_submodule(f"{CLIP.blocks}.0.{name}").weight)
            curvature |= {f"{full}.output_factor": factors[size], f"{full}.positions": torch.ones(50)}
    given = []
    for number in range(tasks):
        weights = {name: w + 0.01 * torch.randn_like(w) for name, w in parameters_of(tower, CLIP).items()}
        batches = [
            Batch(torch.randn(32, 3, 224, 224), torch.zeros(32), range(start, start + 32))
            for start in range(0, images, 32)
        ]
        given.append(CalibrationTask(StateDict(str(number), weights), StateDict(str(number), curvature), batches))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        calibrate(tower.to(device), given, [1 / tasks] * tasks, CLIP, Path(folder))
        seconds = time.perf_counter() - started
    console.print(f"one block, {tasks} tasks, {images} images each, seen {VIEWS} times: {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=256, help="per task; a multiple of 32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console(highlight=False)
    for name in LAYERS:
        solve(name, options.tasks, options.device, console)
    whole_block(options.tasks, options.images, options.device, console)


if __name__ == "__main__":
    main()
