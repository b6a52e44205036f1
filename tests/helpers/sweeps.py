"""A sweep of the two models of `clip_zoo`: as words of the command and as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_epimer import MergeRecipe, ModelRef


def words(zoo: Path, *more: object) -> tuple[object, ...]:
    models = (f"{name}={zoo / name}" for name in "ab")
    return ("sweep", *models, "--base", zoo / "base", "--task", zoo / "a.json", zoo / "b.json", *more)


def recipe(zoo: Path, **arguments: Any) -> MergeRecipe:
    models = tuple(ModelRef.parse(f"{name}={zoo / name}") for name in "ab")
    tasks = (str(zoo / "a.json"), str(zoo / "b.json"))
    return MergeRecipe(models, ModelRef.parse(str(zoo / "base")), **{"tasks": tasks, "samples": 30} | arguments)
