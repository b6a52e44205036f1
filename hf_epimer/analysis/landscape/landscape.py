"""The loss around fine-tuned models, on the plane that fits them best: `landscape(recipe)`, the paper's D.3.

resolve and check as for a merge -> the plane (`plane`) -> the losses on a grid in it (`losses`) -> JSON, picture
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_epimer.analysis.landscape.losses import Tower
from hf_epimer.analysis.landscape.plane import BASE, Plane, grid, plane_of
from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.checkpoints.reader import Checkpoint, TensorSource
from hf_epimer.checkpoints.writer import write_json
from hf_epimer.errors import UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.base import check_same_architecture
from hf_epimer.models.source import resolve_model
from hf_epimer.pipeline.inputs import fetch, open_inputs
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.planner import make_plan
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.types import Progress

REPORT = "landscape.json"
PICTURE = "landscape.png"
FORMAT = "hf-epimer.landscape/1"


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid; `landscape.json` is its JSON.

    Attributes:
        plane: where it was taken.
        samples: task -> how many images.
        first, second: the grid's values of a and b, ascending.
        losses: task -> row of b -> column of a -> loss.
        models: name -> task -> the loss of the model itself, which is that of its place only if it is in the plane.
        tuned: task -> the model that was tuned for it.
        out: the folder.
        pictures: names of the files in it; none where matplotlib is missing.
    """

    plane: Plane
    samples: dict[str, int]
    first: tuple[float, ...]
    second: tuple[float, ...]
    losses: dict[str, list[list[float]]]
    models: dict[str, dict[str, float]]
    tuned: dict[str, str]
    out: Path
    pictures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but where it went."""
        return {
            "format": FORMAT,
            "plane": {
                "axes": self.plane.axes.tolist(),
                "labels": list(self.plane.labels),
                "explained": self.plane.explained,
            },
            "samples": self.samples,
            "tuned": self.tuned,
            "models": {
                name: {
                    "position": list(self.plane.positions[name]),
                    "outside": self.plane.outside[name],
                    "loss": self.models[name],
                }
                for name in self.models
            },
            "grid": {"first": list(self.first), "second": list(self.second), "loss": self.losses},
        }


def landscape(
    recipe: MergeRecipe,
    merged: Sequence[ModelRef] = (),
    out: str = "landscape",
    progress: Progress = lambda stage, done, total: None,
    *,
    steps: int = 15,
    samples: int = 256,
    margin: float = 0.25,
) -> Landscape:
    """Measure the loss of every task around the models of a planned merge: report and picture into `out`.

    Args:
        recipe: names models, base, task files, seed and device; its method and destination are not looked at.
        merged: other models to mark, in this or any other plane; folders or repos, labelled.
        out: folder to write; a non-empty one is refused unless `recipe.overwrite`.
        progress: called as by `hf_epimer.merge`.
        steps: of the grid, in each direction.
        samples: at most so many test images a task, decoded once and kept in memory.
        margin: room around the outermost model, as a share of the extent.

    Raises:
        UsageError: fewer than two checkpoints, one without a task, or all on one line.
        EpimerError: what `merge` raises before it writes; nothing half-written is left.
    """
    if len(recipe.models) < 2:
        raise UsageError("a landscape lies between checkpoints: give at least two")
    if steps < 2 or samples < 1 or not margin >= 0:
        raise UsageError("a landscape needs at least 2 steps, 1 sample and no negative margin")
    local = replace(recipe.looked_into(out), method="mean", options=None, fisher=(), evaluate=True)
    plan = make_plan(local)
    fetch(plan, progress)
    ingredients = open_inputs(plan, progress)
    marked = [_open(plan, ref) for ref in merged]
    _check_names([*ingredients.models, *marked])
    plane = plane_of(ingredients, marked)
    with atomic_folder(local.target, REPORT, recipe.overwrite) as folder:
        tower = Tower(plan.base, plan.tuned_on, samples, seed=recipe.seed, device=recipe.device)
        models: dict[str, TensorSource] = {BASE: ingredients.base}
        models |= {model.label: model for model in (*ingredients.models, *marked)}
        first, second = grid(list(plane.positions.values()), steps, margin)
        total = len(models) + steps * steps
        progress("measuring losses", 0, total)
        itself = {}
        for name, model in models.items():
            itself[name] = tower.loss_of(model)
            progress("measuring losses", 1, total)
        tower.span(ingredients, plane)
        losses: dict[str, list[list[float]]] = {task.name: [[] for _ in second] for task in plan.tasks}
        for row, b in enumerate(second):
            for a in first:
                for name, loss in tower.loss_at((a, b)).items():
                    losses[name][row].append(loss)
                progress("measuring losses", 1, total)
        tuned = {model.task.name: model.label for model in plan.models if model.task}
        result = Landscape(plane, tower.samples, first, second, losses, itself, tuned, local.target)
        write_json(folder / REPORT, result.to_json())
        pictures = _draw(result, folder)
    return replace(result, pictures=pictures)


def _open(plan: Plan, ref: ModelRef) -> Checkpoint:
    """A model to be marked, checked to be of the same architecture."""
    source = resolve_model(ref).labelled(ref.label or ref.name)
    check_same_architecture(plan.base, [source])
    return source.open(plan.shapes)


def _check_names(models: Sequence[TensorSource]) -> None:
    names = [BASE, *(model.label for model in models)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two models are called {name}: label them (other={name})")


def _draw(landscape: Landscape, folder: Path) -> tuple[str, ...]:
    """The picture; none where matplotlib is missing."""
    from hf_epimer import plotting
    from hf_epimer.analysis.landscape.contours import loss_contours

    if not plotting.available():
        return ()
    figure = loss_contours(
        landscape.losses,
        (landscape.first, landscape.second),
        landscape.plane.positions,
        landscape.plane.outside,
        landscape.models,
        landscape.tuned,
    )
    return tuple(plotting.save({PICTURE: figure}, folder))
