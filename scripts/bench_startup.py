"""How long a command takes that does next to nothing, beside the imports it cannot do without.

    python scripts/bench_startup.py [--rounds 7] [--json FILE]

Everything is measured in turn, round by round, so that a busy machine is busy for all of it; the table has the medians,
and of every command its share of `import torch, safetensors.torch, huggingface_hub` within the same round. Processor
time stands beside the time on the clock, which other programs stretch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from hf_epimer.models.clip import CLIP

IMPORTS = "import torch, safetensors.torch, huggingface_hub"
CONFIG = {
    "model_type": "clip_vision_model",
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Seconds:
    """On the clock, and of the processor."""

    clock: float
    processor: float


def write_zoo(folder: Path) -> list[str]:
    """A base and two checkpoints of 20,000 parameters; the words of a merge of them."""
    shapes = CLIP.shapes(CLIP.vision_config(CONFIG, "the benchmark"))
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        (folder / name / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "CLIPImageProcessor"})
        )
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return ["merge", "a", "b", "--base", "base", "--method", "mean", "--out", "merged", "--overwrite"]


def run(arguments: list[str], folder: Path, expected: int) -> Seconds:
    """One Python process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    clock, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise SystemExit(f"{arguments} ended with {done.returncode}: {done.stderr}")
    return Seconds(clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(rounds: int, folder: Path) -> dict[str, list[Seconds]]:
    """Command -> one measurement a round; the first round, which only warms the disk's cache, is left out."""
    merge = write_zoo(folder)
    program = ["-m", "hf_epimer"]
    commands: dict[str, tuple[list[str], int]] = {
        "nothing: python -c pass": (["-c", "pass"], 0),
        IMPORTS: (["-c", IMPORTS], 0),
        "merge --method mean": ([*program, *merge], 0),
        "merge --dry-run": ([*program, *merge, "--dry-run"], 0),
        "wrong word": ([*program, *merge, "--rank", "4"], 2),
        "merge --help": ([*program, "merge", "--help"], 0),
        "--help": ([*program, "--help"], 0),
        "methods": ([*program, "methods"], 0),
        "methods --json": ([*program, "methods", "--json"], 0),
    }
    seconds_of: dict[str, list[Seconds]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (arguments, expected) in commands.items():
            seconds = run(arguments, folder, expected)
            if number:
                seconds_of[name].append(seconds)
    return seconds_of


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="the time of commands that do next to nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        seconds_of = measure(options.rounds, Path(folder))
    table = Table(title=f"medians of {options.rounds} rounds on {os.cpu_count()} cores", title_justify="left")
    for column in ("", "seconds", "processor", "of the imports", "processor"):
        table.add_column(column, justify="left" if not column else "right")
    for name, rows in seconds_of.items():
        pairs = list(zip(rows, seconds_of[IMPORTS], strict=True))
        table.add_row(
            name,
            f"{median(row.clock for row in rows):.2f}",
            f"{median(row.processor for row in rows):.2f}",
            f"{median(row.clock / plain.clock for row, plain in pairs):.2f}",
            f"{median(row.processor / plain.processor for row, plain in pairs):.2f}",
        )
    Console().print(table)
    if options.json:
        content = {name: [vars(row) for row in rows] for name, rows in seconds_of.items()}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
