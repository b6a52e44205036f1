"""What a visitor may choose: models of the demo zoo, or references typed in; what is not allowed gets a sentence.

On a Space a reference is a Hub id and nothing else, whatever lies on the machine's disk.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from settings import Settings

from hf_epimer import ZOO_TASKS, EpimerError, MergeRecipe, ModelRef, zoo_folder

ZOO, TYPED = "Demo zoo", "Hugging Face Hub"
"""Where checkpoints come from."""

EXAMPLES = 6
"""Pictures of a task that are shown."""


@dataclass(frozen=True)
class Selection:
    """What a visitor chose to merge.

    Attributes:
        models: references, checked to be allowed here.
        base: None to infer it.
        tasks: task files.
        largest: bytes that may be downloaded.
    """

    models: tuple[ModelRef, ...]
    base: ModelRef | None = None
    tasks: tuple[str, ...] = ()
    largest: float = float("inf")

    def recipe(self, **more: Any) -> MergeRecipe:
        """The recipe of a merge of these models."""
        return MergeRecipe(models=self.models, base=self.base, tasks=self.tasks, **more)


@dataclass(frozen=True)
class Zoo:
    """The demo zoo, which may still have to be made."""

    folder: Path

    @classmethod
    def here(cls) -> Zoo:
        """Where `hf-epimer demo` keeps it, too."""
        return cls(zoo_folder())

    @property
    def is_ready(self) -> bool:
        """Whether it is complete."""
        return (self.folder / "zoo.json").is_file()

    @property
    def accuracies(self) -> dict[str, dict[str, float]]:
        """Task -> accuracies of base (`zero_shot`) and fine-tuned model on its test set; empty before it is made."""
        if not self.is_ready:
            return {}
        content: dict[str, Any] = json.loads((self.folder / "zoo.json").read_text(encoding="utf-8"))["tasks"]
        return content

    def selection(self, names: list[str]) -> Selection:
        """Some of its models."""
        chosen = [name for name in ZOO_TASKS if name in names]
        return Selection(
            models=tuple(ModelRef(str(self.folder / name), label=name) for name in chosen),
            base=ModelRef(str(self.folder / "base")),
            tasks=tuple(str(self.task_file(name)) for name in chosen),
        )

    def task_file(self, name: str) -> Path:
        """The description of a task."""
        return self.folder / "tasks" / f"{name}.yaml"

    def classes(self, name: str) -> list[str]:
        """A task's class names."""
        content = yaml.safe_load(self.task_file(name).read_text(encoding="utf-8"))
        return list(content["class_names"])

    def pictures(self, name: str) -> list[tuple[bytes, str]]:
        """A few test pictures as PNG and what they show, each of another class."""
        return _pictures(self.folder / "datasets" / name / "data", tuple(self.classes(name)))


@cache
def _pictures(folder: Path, classes: tuple[str, ...]) -> list[tuple[bytes, str]]:
    (file,) = folder.glob("test-*.parquet")
    pictures: dict[str, bytes] = {}
    for row in pyarrow.parquet.read_table(file).slice(0, 100).to_pylist():
        pictures.setdefault(classes[row["label"]], row["image"]["bytes"])
    return [(picture, label) for label, picture in list(pictures.items())[:EXAMPLES]]


def as_data_url(picture: bytes) -> str:
    """A picture for HTML."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def selection_of(settings: Settings, zoo: Zoo, source: str, names: list[str], typed: str, base: str) -> Selection:
    """What is to be merged, as far as it can be checked without the Hub.

    Args:
        source: `ZOO` or `TYPED`.
        names: of zoo models.
        typed: references, one per line.
        base: a reference, or empty.

    Raises:
        EpimerError: nothing chosen, too much, or a reference that is not allowed here.
    """
    if source == ZOO:
        if not zoo.is_ready:
            raise EpimerError("the demo zoo is still being made: wait a moment, or choose checkpoints from the Hub")
        selection = zoo.selection(names or [])
        if len(selection.models) < 2:
            raise EpimerError("choose at least two models of the zoo")
        return selection
    lines = [line.strip() for line in typed.replace(",", "\n").splitlines() if line.strip()]
    if len(lines) < 2:
        raise EpimerError("name at least two checkpoints, one per line, such as openai-org/vit-b32-dtd")
    if settings.models is not None and len(lines) > settings.models:
        raise EpimerError(f"at most {settings.models} checkpoints at a time can be merged here, not {len(lines)}")
    local = not settings.on_space
    models = tuple(ModelRef.parse(line, local=local) for line in lines)
    home = ModelRef.parse(base.strip(), local=local) if base.strip() else None
    return Selection(models, home, largest=settings.bytes)
