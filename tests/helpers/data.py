"""Small data sets in parquet, as they would lie on the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from hf_epimer.tasks.task import Task

CLASSES = ("a", "b", "ab")

PLAIN_LABELS = {"pcam": "bool", "fer2013": "int64"}
"""Benchmarks whose labels are stored without names."""


def write_data(folder: Path, rows: int = 40, seed: int = 0, names: tuple[str, ...] = CLASSES) -> Path:
    """A data set in parquet as on the Hub: noise whose brightness gives the class away, `train` and `test`."""
    rng = np.random.default_rng(seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    for split in ("train", "test"):
        labels = rng.integers(0, len(names), rows).tolist()
        noise = [rng.integers(0, 120, (9, 8, 3)) + 120 * label // len(names) for label in labels]
        images = [Image.fromarray(pixels.astype(np.uint8)) for pixels in noise]
        data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def write_benchmark(folder: Path, task: Task, rows: int = 12) -> Path:
    """A data set of a benchmark's schema: splits, columns, config and number of classes, with noise for pictures."""
    names = tuple(f"class {index}" for index in range(len(task.class_names or ())))
    write_data(folder, rows, names=names)
    splits = {"train": task.train_split, "test": task.test_split}
    where = task.config or "data"
    (folder / where).mkdir(exist_ok=True)
    listed = ""
    for written, split in splits.items():
        file = folder / "data" / f"{written}-00000-of-00001.parquet"
        data = datasets.Dataset.from_parquet(str(file), cache_dir=str(folder / ".cache"))
        columns = {"image": task.image_column, "label": task.label_column}
        if task.name in PLAIN_LABELS:
            data = data.cast_column("label", datasets.Value(PLAIN_LABELS[task.name]))
        data = data.rename_columns({old: new for old, new in columns.items() if old != new})
        file.unlink()
        data.to_parquet(folder / where / f"{split}-00000-of-00001.parquet")
        listed += f"  - split: {split}\n    path: {where}/{split}-*\n"
    shutil.rmtree(folder / ".cache")
    config = task.config or "default"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{listed}---\n")
    return folder
