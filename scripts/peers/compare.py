"""Merges that look at images of every task, beside each other: the same images, compared picture by picture.

Beside the package's own there are closed forms of two other papers, each in a file here, written to compare with.

    python scripts/peers/compare.py --zoo DIR --tasks mnist flags ... [--samples 64 256] [--seeds 0 1 2]
        [--steps N] [--rows ...]
    python scripts/peers/compare.py --report

DIR is as for scripts/zoo_table.py. Every measurement is a line of --log and is not repeated; a seed decides which
training images are taken and in which order. The report has, for every set, number of images and row: average and
worst task, the difference to "calibrated" and its standard error on the same pictures (mean over seeds first; their
range follows), and seconds without statistics that were measured before.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from featcal import featcal
from regmean_plus_plus import regmean_plus_plus
from rich.console import Console
from torch import Tensor, nn

from hf_epimer import METHODS, MergeRecipe, ModelRef, merge
from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.models.clip import CLIP
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_processor, load_tower, preprocess
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.tasks.dataset import Sampling, TaskImages
from hf_epimer.tasks.images import ImageBatches, read_images, read_samples
from hf_epimer.tasks.task import Task, load_task_file

AGAINST = "calibrated"
"""The row that others are compared with."""


@dataclass(frozen=True)
class Towers:
    """What a closed form works on: a merge, in place; theta_0; theta_t; every task's pictures, in batches."""

    merge: nn.Module
    base: TensorSource
    tuned: Sequence[TensorSource]
    pictures: list[list[Tensor]]


@dataclass(frozen=True)
class Row:
    """A merge by the package's own command, and what another paper does with it."""

    method: str = "epimer-core"
    calibrate: bool = True
    refine: bool = False
    then: Callable[[Towers], None] | None = None


def calibrated_by_featcal(towers: Towers) -> None:
    """FeatCal, with its anchor."""
    featcal(towers.merge, towers.base, towers.tuned, towers.pictures)


ROWS = {
    "mean": Row("mean", calibrate=False),
    "TSV-M": Row("tsv-m", calibrate=False),
    "closed form": Row(calibrate=False),
    "RegMean++": Row("mean", calibrate=False, then=lambda t: regmean_plus_plus(t.merge, t.tuned, t.pictures)),
    "task arithmetic, FeatCal": Row("task-arithmetic", calibrate=False, then=calibrated_by_featcal),
    "TSV-M, FeatCal": Row("tsv-m", calibrate=False, then=calibrated_by_featcal),
    "calibrated": Row(),
    "mean, refined": Row("mean", calibrate=False, refine=True),
    "TSV-M, refined": Row("tsv-m", calibrate=False, refine=True),
    "closed form, refined": Row(calibrate=False, refine=True),
    "calibrated, refined": Row(refine=True),
}

Hits = dict[str, Tensor]
"""Task -> which test pictures are classified correctly."""


@dataclass(frozen=True)
class Set:
    """Some tasks of a zoo, how many training images of each are used, chosen by the seed, and steps of refinement."""

    zoo: Path
    tasks: tuple[Task, ...]
    samples: int
    seed: int
    steps: int

    @property
    def base(self) -> ModelSource:
        """The checkpoint that all were trained from."""
        return resolve_model(ModelRef(str((self.zoo / "base").absolute())))

    def merged(self, name: str, out: Path) -> tuple[nn.Module, float]:
        """The tower of a row, and the seconds it took."""
        row = ROWS[name]
        recipe = MergeRecipe(
            models=tuple(ModelRef.parse(f"{task.name}={self.zoo / 'tasks' / task.name}") for task in self.tasks),
            base=ModelRef.parse(str(self.zoo / "base")),
            method=row.method,
            options=METHODS[row.method].config(),
            samples=self.samples,
            seed=self.seed,
            calibrate=row.calibrate,
            refine=row.refine,
            refine_steps=self.steps,
            tasks=tuple(str(self.zoo / "task_files" / f"{task.name}.yaml") for task in self.tasks),
            out=str(out / "merged"),
            overwrite=True,
        )
        report = merge(recipe)
        tower, seconds = load_tower(report.out, self.base), report.seconds["merging"]
        if row.then:
            started = time.monotonic()
            row.then(self.towers(tower))
            seconds += time.monotonic() - started
        return tower, seconds

    def towers(self, merge: nn.Module) -> Towers:
        """A merge with what it was made of, and the training images that the package takes."""
        folders = [self.zoo / "base", *(self.zoo / "tasks" / task.name for task in self.tasks)]
        shapes = CLIP.shapes(self.base.vision_config)
        base, *tuned = (resolve_model(ModelRef(str(folder.absolute()))).open(shapes) for folder in folders)
        pixels = partial(preprocess, load_processor(self.zoo / "base"))
        chosen = (read_images(TaskImages(task, Sampling(self.samples, seed=self.seed))) for task in self.tasks)
        return Towers(merge, base, tuned, [[batch.inputs for batch in ImageBatches(s, pixels, 32)] for s in chosen])

    @torch.inference_mode()
    def hits(self, tower: nn.Module, limit: int | None) -> Hits:
        """On the test pictures."""
        found = {}
        for task in self.tasks:
            samples = read_samples(task, task.test_split, limit=limit)
            model = classifier_for(tower, self.base, self.base, task, samples.class_names)
            batches = ImageBatches(samples, model.pixels, 64)
            found[task.name] = torch.cat([model.top1(batch.inputs) == batch.labels for batch in batches])
        return found


def measure(chosen: Set, rows: Sequence[str], log: Path, out: Path, limit: int | None) -> None:
    """Measure the rows that the log does not have, and add them to it."""
    names = [task.name for task in chosen.tasks]
    key = {"zoo": chosen.zoo.name, "tasks": names, "samples": chosen.samples, "seed": chosen.seed}
    done = {(entry["row"], entry["steps"]) for entry in entries(log) if key.items() <= entry.items()}
    for row in rows:
        steps = chosen.steps if ROWS[row].refine else 0
        if (row, steps) in done:
            continue
        started = time.monotonic()
        tower, seconds = chosen.merged(row, out)
        hits = chosen.hits(tower, limit)
        right = {task: "".join("01"[int(hit)] for hit in of_task) for task, of_task in hits.items()}
        with log.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({**key, "row": row, "steps": steps, "seconds": round(seconds, 1), "right": right}) + "\n"
            )
        said = f"{average(hits):.4f} ({worst(hits):.3f}), {time.monotonic() - started:.0f} s with everything"
        Console(stderr=True).print(f"{' '.join(names)}, {chosen.samples}, seed {chosen.seed}: {row}: {said}")


def entries(log: Path) -> Iterator[dict[str, Any]]:
    """Every measurement so far."""
    if log.is_file():
        yield from map(json.loads, log.read_text(encoding="utf-8").splitlines())


def average(hits: Hits) -> float:
    """Mean accuracy over tasks."""
    return sum(float(right.float().mean()) for right in hits.values()) / len(hits)


def worst(hits: Hits) -> float:
    """Accuracy on the worst task."""
    return min(float(right.float().mean()) for right in hits.values())


Seeds = dict[int, tuple[Hits, float]]
"""Seed -> which pictures are right, and seconds."""


def report(log: Path) -> str:
    """Markdown: a table of rows for every set and number of images."""
    sets: dict[tuple[str, int], dict[str, Seeds]] = {}
    for entry in entries(log):
        hits = {task: torch.tensor([mark == "1" for mark in marks]) for task, marks in entry["right"].items()}
        rows = sets.setdefault((f"{entry['zoo']}: {' '.join(entry['tasks'])}", entry["samples"]), {})
        row = f"{entry['row']}, {entry['steps']} steps" if entry["steps"] else entry["row"]
        rows.setdefault(row, {})[entry["seed"]] = hits, entry["seconds"]
    lines = []
    for (where, samples), rows in sets.items():
        lines += ["", f"{where}, {samples} images a task", ""]
        lines += [f"| | average (worst) | to {AGAINST} | range over seeds | seeds | seconds |", "|---" * 6 + "|"]
        lines += [_line(row, seeds, rows.get(AGAINST, {})) for row, seeds in rows.items()]
    return "\n".join(lines[1:])


def _line(row: str, seeds: Seeds, against: Seeds) -> str:
    averages, lowest, seconds = (
        sum(each) / len(seeds)
        for each in zip(*((average(hits), worst(hits), seconds) for hits, seconds in seeds.values()))
    )
    apart = spread = ""
    both = sorted(seeds.keys() & against.keys())
    if both and seeds is not against:
        pairs = [(seeds[seed][0], against[seed][0]) for seed in both]
        mean, error = difference(pairs)
        of_seeds = [difference([pair])[0] for pair in pairs]
        apart = f"{mean:+.4f} ± {error:.4f}"
        spread = f"{min(of_seeds):+.4f} to {max(of_seeds):+.4f}"
    return f"| {row} | {averages:.3f} ({lowest:.3f}) | {apart} | {spread} | {len(seeds)} | {seconds:.0f} |"


def difference(pairs: Sequence[tuple[Hits, Hits]]) -> tuple[float, float]:
    """Mean over tasks of accuracy(one) - accuracy(other), and its standard error over pictures.

    Args:
        pairs: by seed; a picture's difference is the mean over them.
    """
    tasks = pairs[0][0]
    apart = [torch.stack([one[task].float() - other[task].float() for one, other in pairs]).mean(0) for task in tasks]
    mean = sum(float(each.mean()) for each in apart) / len(apart)
    variance = sum(float(each.var()) / len(each) for each in apart) / len(apart) ** 2
    return mean, math.sqrt(variance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--samples", nargs="+", type=int, default=[256])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100, help="of a refinement; default: 100")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["calibrated", "calibrated, refined"])
    parser.add_argument("--limit", type=int, help="test images per task; default: all")
    parser.add_argument("--log", type=Path, default=Path("compared.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("compared"), help="for merges, each of which replaces another")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    tasks = tuple(load_task_file(options.zoo / "task_files" / f"{name}.yaml") for name in options.tasks)
    for samples in options.samples if tasks else ():
        for seed in options.seeds:
            measure(
                Set(options.zoo, tasks, samples, seed, options.steps),
                options.rows,
                options.log,
                options.out,
                options.limit,
            )
    if options.report:
        Console(soft_wrap=True, highlight=False).print(report(options.log), markup=False)


if __name__ == "__main__":
    main()
