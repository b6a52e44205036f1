"""Seconds and memory of a merge, ours and FusionBench's, on the same checkpoints in one run.

    python scripts/bench_merge.py [--model vit-b-32] [--tasks 8] [--device cpu] [--runs 3] [--fusionbench PYTHON]

Makes synthetic checkpoints with Fisher files once (task vectors with the decaying spectrum of fine-tuned models, Fisher
values over several orders of magnitude), brings them into the page cache, times `cat` of base and models from there,
and runs every method as a whole process.
`--fusionbench` names the Python of an environment with fusion-bench 0.2.33 (it does not live beside transformers 5);
its TSV-M (`compute_and_sum_svd_mem_reduction`, full SVDs) then merges the same files. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from hf_epimer.models.clip import CLIP

SHAPES = {
    "vit-b-32": {},
    "vit-l-14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    },
}  # fmt: skip

OURS = {
    "mean": ["--method", "mean"],
    "ties": ["--method", "ties"],
    "tsv-m, rank 32": ["--method", "tsv-m", "--rank", "32"],
    "epimer, rank 32": ["--method", "epimer", "--preset", "paper"],
    "tsv-m, rank min(m, n) / T": ["--method", "tsv-m"],
    "epimer-core, task vectors": ["--method", "epimer-core", "--metric", "task-vectors"],
}

FUSIONBENCH = """
import json, sys, time
from safetensors.torch import load_file
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
base, *tuned = [load_file(f + "/model.safetensors") for f in sys.argv[1:]]
vectors = [{name: m[name] - base[name] for name in base} for m in tuned]
del tuned
started = time.perf_counter()
compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")
merging = time.perf_counter() - started
print()
print(json.dumps({"merging": merging}))
"""


def make_checkpoints(folder: Path, model: str, tasks: int) -> None:
    """base/ and t0/ .. with model.safetensors, fisher.safetensors and config.json."""
    tower = {**CLIP.fields, **SHAPES[model]}
    shapes = CLIP.shapes(tower)
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    _write(folder / "base", tower, base)
    for task in range(tasks):
        target = folder / f"t{task}"
        if (target / "fisher.safetensors").exists():
            continue
        tuned = {name: base[name] + _task_vector(shape, generator) for name, shape in shapes.items()}
        _write(target, tower, tuned)
        save_file({name: _fisher(shape, generator) for name, shape in shapes.items()}, target / "fisher.safetensors",
                  metadata={"format": "hf-epimer.fisher/1"})  # fmt: skip


def _task_vector(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) != 2:
        return 1e-3 * torch.randn(shape, generator=generator)
    m, n = shape
    r = min(m, n)
    spectrum = (1 + torch.arange(r) / 8) ** -0.8
    u, v = (torch.randn(size, r, generator=generator) / size**0.5 for size in (m, n))
    return 0.3 * (u * spectrum) @ v.mT


def _fisher(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = 1e-7 * torch.rand(shape, generator=generator).square()
    for axis in range(len(shape) if len(shape) == 2 else 0):
        size = [-1 if i == axis else 1 for i in range(2)]
        values = values * (0.8 * torch.randn(shape[axis], generator=generator)).exp().view(size)
    return values


def _write(folder: Path, tower: dict[str, object], state: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "clip_vision_model", "projection_dim": 512, **tower}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text("{}")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def timed(command: list[str]) -> dict[str, Any]:
    """Run a command; whole-process seconds, peak memory in GiB, and what its last line of JSON says.

    Memory is looked at every 20 ms in /proc: all of it (resident), and what no file backs (anonymous).
    """
    started = time.perf_counter()
    peaks = {"RssAnon": 0, "VmRSS": 0}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=output, stderr=complaints, text=True)
        while process.poll() is None:
            for field, value in _memory(process.pid).items():
                peaks[field] = max(peaks[field], value)
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        for file in (output, complaints):
            file.seek(0)
        lines = output.read().strip().splitlines()
        if process.returncode or not lines:
            raise SystemExit(f"{command[:4]} failed: {complaints.read()}")
    memory = {"anonymous": peaks["RssAnon"] / 2**20, "resident": peaks["VmRSS"] / 2**20}
    return {"process": seconds, **memory, "told": json.loads(lines[-1])}


def _memory(process: int) -> dict[str, int]:
    """RssAnon and VmRSS of a process in KiB; nothing once it is gone."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as status:
            entries = dict(line.split(":", 1) for line in status)
        return {field: int(entries[field].split()[0]) for field in ("RssAnon", "VmRSS")}
    except (OSError, KeyError, ValueError):
        return {}


def run_cat(folder: Path, names: list[str]) -> dict[str, Any]:
    """Reading base and models, what no merge is faster than."""
    files = [folder / name / "model.safetensors" for name in ("base", *names)]
    started = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return {"merging": time.perf_counter() - started}


def run_ours(folder: Path, names: list[str], arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        models = [str(folder / name) for name in names]
        result = timed(
            [sys.executable, "-m", "hf_epimer", "merge", *models, "--base", str(folder / "base"), *arguments,
             "--out", f"{out}/merged", "--json"]
        )  # fmt: skip
    return {**result, "merging": result.pop("told")["seconds"]["merging"]}


def run_fusionbench(python: str, folder: Path, names: list[str]) -> dict[str, Any]:
    result = timed([python, "-c", FUSIONBENCH, str(folder / "base"), *(str(folder / name) for name in names)])
    return {**result, "merging": result.pop("told")["merging"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="vit-b-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-epimer-bench")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--device", default="cpu", help="of ours")
    parser.add_argument("--fusionbench", metavar="PYTHON")
    options = parser.parse_args()
    folder = options.folder / f"{options.model}-{options.tasks}"
    make_checkpoints(folder, options.model, options.tasks)
    names = [f"t{task}" for task in range(options.tasks)]
    for file in folder.glob("*/*.safetensors"):
        with open(file, "rb") as handle:  # into the page cache
            while handle.read(1 << 24):
                pass
    rows: dict[str, list[dict[str, Any]]] = {"cat": [run_cat(folder, names)], **{name: [] for name in options.methods}}
    for _ in range(options.runs):  # methods take turns, so that a slow minute of the machine hits all of them
        for name in options.methods:
            rows[name].append(run_ours(folder, names, [*OURS[name], "--device", options.device]))
    if options.fusionbench:
        rows["FusionBench TSV-M"] = [run_fusionbench(options.fusionbench, folder, names)]
    _show(options.model, options.tasks, rows)


def _show(model: str, tasks: int, rows: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(title=f"{model}, {tasks} tasks, fp32, {os.cpu_count()} cores; medians", title_justify="left")
    for column in ("method", "merge s", "process s", "anonymous GiB", "resident GiB", "x tsv-m", "x FusionBench"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def median(name: str, key: str) -> float:
        return statistics.median(run.get(key, float("nan")) for run in rows[name])

    for name in rows:
        merging = median(name, "merging")
        reference = median("tsv-m, rank 32", "merging") if "tsv-m, rank 32" in rows else float("nan")
        theirs = median("FusionBench TSV-M", "merging") if "FusionBench TSV-M" in rows else float("nan")
        table.add_row(
            name,
            f"{merging:.1f}",
            f"{median(name, 'process'):.1f}",
            f"{median(name, 'anonymous'):.2f}",
            f"{median(name, 'resident'):.2f}",
            f"{merging / reference:.2f}",
            f"{theirs / merging:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
