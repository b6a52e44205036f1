"""A zoo of easier tasks from an existing one: the first few classes of each task, on which fine-tuning saturates.

    python scripts/study/easy_zoo.py --zoo DIR --out DIR [--classes 4] [--steps 120]

Towers are tuned in full from the zoo's base through the frozen zero-shot head, AdamW with a one-cycle rate, seeded.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from hf_epimer import ModelRef, Task, accuracy
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import resolve_model
from hf_epimer.tasks.images import Batch, ImageBatches, read_samples
from hf_epimer.tasks.task import load_task_file


def shortened(task: Task, file: Path, out: Path, classes: int) -> Path:
    """A task file and a data set with the first classes of another one's."""
    data = datasets.load_dataset(task.dataset)
    names = list(task.class_names or data[task.train_split].features[task.label_column].names)[:classes]
    folder = out / "datasets" / task.name / "data"
    folder.mkdir(parents=True)
    for split in (task.train_split, task.test_split):
        labels = data[split][task.label_column]
        kept = data[split].select([row for row, label in enumerate(labels) if label < classes])
        features = kept.features | {task.label_column: datasets.ClassLabel(names=names)}
        kept.cast(datasets.Features(features)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content |= {"dataset": f"../datasets/{task.name}", "class_names": names}
    target = out / "task_files" / file.name
    target.parent.mkdir(exist_ok=True)
    target.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return target


def tune(model: Classifier, batches: list[Batch], steps: int) -> None:
    """All weights of the tower; the head stays as it is."""
    pixels, labels = torch.cat([batch.inputs for batch in batches]), torch.cat([batch.labels for batch in batches])
    parameters = list(model.tower.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (48,))
        loss = cross_entropy(model(pixels[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    shutil.copytree(options.zoo / "base", options.out / "base")
    home = resolve_model(ModelRef(str((options.out / "base").absolute()), label="base"))
    for number, file in enumerate(sorted((options.zoo / "task_files").glob("*.yaml"))):
        torch.manual_seed(number)
        task = load_task_file(shortened(load_task_file(file), file, options.out, options.classes))
        samples = read_samples(task, task.train_split)
        tower: Any = load_tower(options.out / "base")
        model = classifier_for(tower, home, home, task, samples.class_names)
        before = accuracy(model, task, task.test_split).accuracy
        tune(model.train(), list(ImageBatches(samples, model.pixels, 64)), options.steps)
        after = accuracy(model.eval(), task, task.test_split).accuracy
        folder = options.out / "tasks" / task.name
        tower.config.save_pretrained(folder)
        tensors = {name: value.detach().contiguous() for name, value in model.tower_parameters().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        Console().print(f"{task.name}: zero-shot {before:.3f}, fine-tuned {after:.3f}")


if __name__ == "__main__":
    main()
