"""Accuracy of EpiMer against how much data its Fisher information saw (the paper's Figure 3), and how it was stored.

    python scripts/samples_table.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--seeds 0 1 2] [--out DIR]

DIR has base/, tasks/NAME/ (checkpoints) and task_files/NAME.yaml. One row per share of the training split, averaged
over seeds of which samples are taken; then fp32 against bf16 and rank-1 files at 256 samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_epimer import EpiMerConfig, MergeRecipe, ModelRef, merge
from hf_epimer.commands.terminal import silence_libraries
from hf_epimer.evaluation import evaluate_folder
from hf_epimer.measuring import StatisticsRecipe, measure
from hf_epimer.statistics.estimation import Sampling
from hf_epimer.statistics.files import Compression
from hf_epimer.tasks import Task, load_task_file

FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


def accuracies(
    zoo: Path, tasks: Sequence[Task], rank: int, sampling: Sampling, compress: Compression | None, out: Path
) -> list[float]:
    """Test accuracy on every task of the merge with Fisher files made in this way."""
    base = ModelRef.parse(str(zoo / "base"))
    files = []
    for task in tasks:
        file = out / f"{task.name}.fisher.safetensors"
        model = ModelRef.parse(str(zoo / "tasks" / task.name))
        named = str(zoo / "task_files" / f"{task.name}.yaml")
        measure(StatisticsRecipe(model, named, base, sampling, compress=compress, out=file))
        files.append(ModelRef.parse(f"{task.name}={file}"))
    recipe = MergeRecipe(
        models=tuple(ModelRef.parse(f"{task.name}={zoo / 'tasks' / task.name}") for task in tasks),
        base=base,
        options=EpiMerConfig(rank=rank),
        fisher=tuple(files),
        out=str(out / "merged"),
        overwrite=True,
    )
    results = evaluate_folder(merge(recipe).out, zoo / "base", tasks, name="epimer")
    return [results.tasks[task.name].accuracy for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("samples-table"))
    options = parser.parse_args()
    silence_libraries()
    names = options.tasks or sorted(file.stem for file in (options.zoo / "task_files").glob("*.yaml"))
    tasks = [load_task_file(options.zoo / "task_files" / f"{name}.yaml") for name in names]
    ways: dict[str, tuple[Sampling, Compression | None]] = {
        f"{fraction:.1%}": (Sampling(None, fraction), None) for fraction in FRACTIONS
    }
    ways |= {"256 samples": (Sampling(), None)}
    ways |= {"256 samples, bf16": (Sampling(), "bf16"), "256 samples, rank1": (Sampling(), "rank1")}
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"EpiMer, rank {options.rank}, {', '.join(names)}", title_justify="left")
    for column in ("Fisher from", "average", "worst", "spread over seeds"):
        table.add_column(column, justify="left" if column == "Fisher from" else "right")
    rows = {}
    for way, (sampling, compress) in ways.items():
        seeds = options.seeds[:1] if sampling.fraction == 1.0 else options.seeds
        rows[way] = [
            accuracies(
                options.zoo, tasks, options.rank, Sampling(sampling.samples, sampling.fraction, seed=seed), compress,
                options.out,
            )
            for seed in seeds
        ]  # fmt: skip
        averages = [sum(row) / len(row) for row in rows[way]]
        worst = sum(min(row) for row in rows[way]) / len(seeds)
        spread = f"{min(averages):.3f} to {max(averages):.3f}" if len(seeds) > 1 else ""
        table.add_row(way, f"{sum(averages) / len(seeds):.3f}", f"{worst:.3f}", spread)
        Console(stderr=True).print(way, rows[way])
    Console().print(table)
    file = options.out / f"samples-{len(tasks)}-rank{options.rank}.json"
    file.write_text(json.dumps({"tasks": names, "accuracy": rows}, indent=2))


if __name__ == "__main__":
    main()
