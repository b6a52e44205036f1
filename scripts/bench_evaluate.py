"""Seconds of an evaluation by part: from JPEG to pixels, passes in bfloat16 and in float32, the whole command.

    python scripts/bench_evaluate.py [--model vit-b-32] [--images 256]

Weights are random, and pictures noise of 500 x 400: enough for seconds, not for accuracy. They are labelled with what
the model takes them for, so that `evaluate` has no reason to compare it with its base.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from bench_calibrate import VISION, make_zoo
from datasets import Dataset

from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import resolve_model
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import find_task
from hf_epimer.types import Precision


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def parts(folder: Path) -> None:
    """Seconds of each part, in this process; afterwards the pictures are labelled with their guesses."""
    base, source = (resolve_model(ModelRef(str(folder / name))) for name in ("base", "task0"))
    samples = read_samples(find_task(str(folder / "task0.json")), "train")
    model = classifier_for(load_tower(source.folder(), base), source, base, samples.task, samples.class_names)
    seconds, batches = timed(lambda: list(ImageBatches(samples, model.pixels, 64)))
    print(f"pictures to pixels {seconds:8.2f} s", flush=True)

    def passes(precision: Precision) -> list[torch.Tensor]:
        return [model.top1(batch.inputs, precision) for batch in batches]

    precision: Precision
    for precision in ("bf16", "no"):
        model.top1(batches[0].inputs, precision)
        seconds, guesses = timed(partial(passes, precision))
        print(f"passes, {precision:<10} {seconds:8.2f} s", flush=True)
    rows = Dataset.from_list(list(samples.rows), features=samples.rows.features)
    labelled = rows.remove_columns("label").add_column("label", torch.cat(guesses).tolist())
    labelled.cast_column("label", samples.rows.features["label"]).to_parquet(folder / "data/task0/train.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=VISION, default="vit-b-32")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--zoo", type=Path, help=argparse.SUPPRESS)  # by the script itself, in a process of its own
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.zoo:
        return parts(options.zoo)
    with tempfile.TemporaryDirectory() as made:
        folder, environment = Path(made), os.environ | {"HF_HOME": f"{made}/home"}
        make_zoo(folder, Namespace(model=options.model, blocks=None, tasks=1, images=options.images))
        subprocess.run([sys.executable, __file__, "--zoo", folder], env=environment, check=True)
        words = ["evaluate", folder / "task0", "--base", folder / "base", "--task", folder / "task0.json", "--json"]
        for precision in ("bf16", "no"):
            command = [sys.executable, "-m", "hf_epimer", *words, "--split", "train", "--mixed-precision", precision]
            run = partial(subprocess.run, command, env=environment, stdout=subprocess.DEVNULL, check=True)
            print(f"evaluate, {precision:<8} {timed(run)[0]:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
