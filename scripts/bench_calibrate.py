"""What a calibrated or a refined merge costs: a whole `hf-epimer merge` of ViT-sized checkpoints on encoded pictures.

    python scripts/bench_calibrate.py [--model vit-b-32] [--tasks 8] [--images 256] [--views 1] [--blocks 2]
    python scripts/bench_calibrate.py --refine-steps 2 [...]

Weights and task vectors are random, pictures are noise in JPEG: that is enough for seconds and bytes, not for accuracy.
Prints the command's own seconds by part, its peak memory, and the floating-point operations of the calibration against
what this machine's matrix products reach. `--blocks` makes a shallower model, for a first look.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import processor_class

VISION: dict[str, dict[str, int]] = {
    "vit-b-32": {},
    "vit-b-16": {"patch_size": 16},
    "vit-l-14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
CLASSES, PROJECTED = 10, 512
UNITS = 12 + 7 + 12 + 12 + 0.6 * 19
"""Of 2 x positions x width^2 operations a view and block: see `hf_epimer/pipeline/calibration/step.py`."""


def make_zoo(folder: Path, options: argparse.Namespace) -> list[str]:
    """A base, fine-tuned towers, heads and pictures; returns the words of the merge."""
    vision = VISION[options.model] | ({"num_hidden_layers": options.blocks} if options.blocks else {})
    torch.manual_seed(0)
    base: Any = CLIPModel(
        CLIPConfig(projection_dim=PROJECTED, vision_config=vision, text_config={"num_hidden_layers": 1})
    )
    base.save_pretrained(folder / "base")
    processor_class(CLIP)().save_pretrained(folder / "base")
    weights = {f"vision_model.{name}": value for name, value in base.vision_model.named_parameters()}
    words = ["merge"]
    for task in range(options.tasks):
        name = f"task{task}"
        (folder / name).mkdir()
        tuned = {key: (value + 0.002 * torch.randn_like(value)).half() for key, value in weights.items()}
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
        config = base.config.vision_config.to_dict() | {"architectures": ["CLIPVisionModel"]}
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file({"weight": torch.randn(CLASSES, PROJECTED)}, folder / f"{name}-head.safetensors")
        write_pictures(folder / "data" / name, options.images, task)
        content = {"name": name, "dataset": f"data/{name}", "test_split": "train", "head": f"{name}-head.safetensors"}
        (folder / f"{name}.json").write_text(json.dumps(content))
        words += [f"{name}={folder / name}"]
    tasks = [str(folder / f"task{task}.json") for task in range(options.tasks)]
    return [*words, "--base", str(folder / "base"), "--task", *tasks]


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """JPEG noise of the size of ordinary pictures, in one parquet file."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((500, 400)).save(buffer, "JPEG", quality=90)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    names = [f"class {number}" for number in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    labels = rng.integers(0, CLASSES, count).tolist()
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features).to_parquet(folder / "train.parquet")


def peak(device: str) -> float:
    """Operations a second of a large float32 matrix product."""
    x = torch.randn(2048, 2048, device=device)
    x @ x
    started = time.perf_counter()
    for _ in range(10):
        y = x @ x
    float(y[0, 0])  # waits for the device
    return 10 * 2 * 2048**3 / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=VISION, default="vit-b-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=256, help="per task")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="of the towers; default: all of the model's")
    parser.add_argument("--refine-steps", type=int, help="refine instead of calibrating")
    parser.add_argument("--method", default="tsv-m", help="of the merge before")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--evaluate", action="store_true", help="on the same pictures, for its seconds")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        words = [sys.executable, "-m", "hf_epimer", *make_zoo(folder, options), "--method", options.method]
        steps, views = options.refine_steps, str(options.views)
        words += ["--refine", "--refine-steps", str(steps)] if steps else ["--calibrate", "--views", views]
        words += ["--samples", str(options.images), "--device", options.device]
        words += ["--out", str(folder / "merged"), "--json", *["--evaluate"] * options.evaluate]
        started = time.perf_counter()
        done = subprocess.run(
            words, env=os.environ | {"HF_HOME": str(folder / "home")}, stdout=subprocess.PIPE, text=True, check=True
        )
        wall = time.perf_counter() - started
    report = json.loads(done.stdout)
    config = CLIP.vision_config({"model_type": CLIP.output_type, **VISION[options.model]}, options.model)
    blocks = options.blocks or config[CLIP.depth]
    views = options.tasks * options.images * options.views
    operations = UNITS * 2 * CLIP.positions(config) * config[CLIP.width] ** 2 * blocks * views
    for part, seconds in report["seconds"].items():
        console.print(f"{part:<16} {seconds:8.1f} s")
    console.print(f"{'process':<16} {wall:8.1f} s")
    for name, size in report["memory"].items():
        console.print(f"{name:<16} {size / 2**30:8.2f} GiB")
    if options.refine_steps:
        return
    reached = peak(options.device)
    console.print(
        f"calibration: {operations / 1e12:.0f} T operations, and {reached / 1e12:.2f} T a second in a product"
    )


if __name__ == "__main__":
    main()
