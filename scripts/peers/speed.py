"""Seconds of calibration and of FeatCal, which calibrate the same merge on the same pictures.

    python scripts/peers/speed.py [--device cuda] [--tasks 8] [--images 256] [--blocks 12] [--width 768]

A ViT-B/32 by default. Weights, task vectors and pictures are random and in memory: seconds do not depend on them, and
nothing is fetched or decoded. Both go through everything once with few pictures before, for what a device does in its
first seconds. Calibration goes through them in float32, as FeatCal does, and once more with passes in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from featcal import featcal
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.models.clip import CLIP
from hf_epimer.models.transfer import has_room
from hf_epimer.models.weights import parameters_of
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.pipeline.calibration.states import BATCH
from hf_epimer.pipeline.calibration.step import calibrate
from hf_epimer.tasks.images import Batch
from hf_epimer.types import Precision

Pictures = list[list[Tensor]]
"""Of every task, in batches [n, 3, h, w]."""


def seconds(tower: nn.Module, tuned: Sequence[TensorSource], pictures: Pictures) -> dict[str, float]:
    """What calibration, in both precisions, and FeatCal take for copies of a tower, which is the base as well.

    Args:
        tuned: theta_t.
    """
    base = StateDict("base", {name: value.detach().cpu() for name, value in parameters_of(tower, CLIP).items()})
    positions, width = base.shapes[f"{CLIP.prefix}embeddings.position_embedding.weight"]
    heard = StateDict("heard", {f"{name}.positions": torch.ones(positions) for name in base.shapes})

    def ours(merge: nn.Module, shown: Pictures, precision: Precision) -> None:
        with tempfile.TemporaryDirectory() as workspace:
            tasks = [
                CalibrationTask(model, 1 / len(tuned), heard, _batches(of_task))
                for model, of_task in zip(tuned, shown, strict=True)
            ]
            nbytes = 8 * positions * width * sum(len(batch) for of_task in shown for batch in of_task)
            in_memory = has_room(next(merge.parameters()).device, nbytes)
            calibrate(merge, base, tasks, CLIP, Path(workspace), in_memory=in_memory, precision=precision)

    def theirs(merge: nn.Module, shown: Pictures) -> None:
        featcal(merge, base, tuned, shown)

    found = {}
    runs: dict[str, Callable[[nn.Module, Pictures], None]]
    runs = {"float32": partial(ours, precision="no"), "bfloat16": partial(ours, precision="bf16"), "FeatCal": theirs}
    for name, run in runs.items():
        run(copy.deepcopy(tower), [of_task[:1] for of_task in pictures])
        found[name] = _timed(run, copy.deepcopy(tower), pictures)
    return found


def _timed(run: Callable[[nn.Module, Pictures], None], tower: nn.Module, pictures: Pictures) -> float:
    device = next(tower.parameters()).device
    started = time.perf_counter()
    run(tower, pictures)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _batches(pictures: Sequence[Tensor]) -> list[Batch]:
    """Pictures without labels, which nobody reads."""
    return [Batch(pixels, torch.zeros(len(pixels)), range(len(pixels))) for pixels in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=256, help="per task")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 12, the number of heads")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "num_hidden_layers": options.blocks}
    tower = CLIPVisionModel(CLIPVisionConfig(**{**CLIP.fields, **sizes})).eval()
    weights = {name: value.detach() for name, value in parameters_of(tower, CLIP).items()}
    tuned = [
        StateDict(f"task {n}", {name: (w + 0.002 * torch.randn_like(w)).half() for name, w in weights.items()})
        for n in range(options.tasks)
    ]
    side = int(CLIP.fields["image_size"])
    pictures = [list(torch.randn(options.images, 3, side, side).split(BATCH)) for _ in tuned]
    found = seconds(tower.to(options.device), tuned, pictures)
    console = Console(highlight=False)
    for name, taken in found.items():
        console.print(f"{name:<16} {taken:8.1f} s {taken / found['FeatCal']:8.2f} of FeatCal's")


if __name__ == "__main__":
    main()
