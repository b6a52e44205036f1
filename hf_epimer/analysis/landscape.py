"""The loss around fine-tuned models, on the plane that fits them best: `landscape(recipe)`, the paper's D.3.

    theta_bar = W_0 + sum_t D_t / T                     the mean of the models, whatever weights they are merged with
    e_1, e_2    the leading principal axes of the theta_t - theta_bar; e_j = sum_t A_jt D_t,  A_j = P^T u_j / sqrt(s_j)
                (s_j, u_j) of the T x T matrix P G P^T,  G_st = <D_s, D_t>,  P = I - 1/T                   PCA by Gram
    L_t(a, b) = mean cross-entropy of task t at theta_bar + a e_1 + b e_2, in nats

G adds up over layers, so all models are read once, one layer at a time, and then once more to write theta_bar, e_1 and
e_2: three towers are held and a fourth is moved about, whatever T is. Everything else (the base, merges) is projected:
what is drawn lies in the plane, and how far from it a model really is stands beside it. Three models span their plane;
two have one principal axis only, and the second then points at the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.checkpoints.reader import Checkpoint, TensorSource
from hf_epimer.checkpoints.writer import write_json
from hf_epimer.errors import UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.stream import stream_layers
from hf_epimer.methods import Layer
from hf_epimer.models.base import check_same_architecture
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.pipeline.inputs import fetch, open_inputs
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.planner import make_plan
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.images import Batch, ImageBatches, read_samples
from hf_epimer.tasks.task import Task
from hf_epimer.types import Progress

REPORT = "landscape.json"
PICTURE = "landscape.png"
FORMAT = "hf-epimer.landscape/1"
BASE = "base"

Point = tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """A plane through the mean of the fine-tuned models.

    Attributes:
        labels: of the fine-tuned models.
        axes: A, 2 x T in float64: e_j = sum_t A_jt D_t, orthonormal.
        positions: name -> (a, b), the projection of every model: the fine-tuned ones, the base, merges.
        outside: name -> its distance from the plane.
        explained: the share of the spread of the fine-tuned models that lies in the plane, in [0, 1].
    """

    labels: tuple[str, ...]
    axes: Tensor
    positions: dict[str, Point]
    outside: dict[str, float]
    explained: float


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


# --- the plane ------------------------------------------------------------------------------------------------------


def plane_of(ingredients: Ingredients, marked: Sequence[TensorSource] = ()) -> Plane:
    """The plane of the fine-tuned models, with the places of the base and of other models in it: one pass.

    Raises:
        UsageError: all models lie on one line.
    """
    everything = replace(
        ingredients,
        models=[*ingredients.models, *marked],
        weights=[1.0] * (len(ingredients.models) + len(marked)),
        statistics=None,
    )
    gram = torch.stack(list(stream_layers(everything, _gram))).sum(0)
    return fit_plane(gram, [model.label for model in ingredients.models], [model.label for model in marked])


def fit_plane(gram: Tensor, labels: Sequence[str], marked: Sequence[str] = ()) -> Plane:
    """The plane from inner products alone.

    Args:
        gram: <D_s, D_t> in float64, of the T fine-tuned models and behind them of the marked ones.
        labels: of the former.
        marked: of the latter.

    Raises:
        UsageError: all models lie on one line.
    """
    tasks, size = len(labels), len(gram)
    # a point is a row of coefficients over all task vectors, from the mean of the models; the base is where D = 0
    points = torch.cat([torch.eye(size, dtype=gram.dtype), torch.zeros(1, size, dtype=gram.dtype)])
    points[:, :tasks] -= 1 / tasks
    spread, directions = torch.linalg.eigh(points[:tasks] @ gram @ points[:tasks].mT)
    spread, directions = spread.flip(0).clamp_min(0), directions.flip(1)
    if float(spread[0]) <= _ON_A_LINE * float(gram.diagonal().amax()):
        raise UsageError("all checkpoints are the same: they span no plane")
    axes = [directions[:, 0] @ points[:tasks] / spread[0].sqrt()]
    if tasks > 2 and float(spread[1]) > _ON_A_LINE * float(spread[0]):
        axes.append(directions[:, 1] @ points[:tasks] / spread[1].sqrt())
    else:
        rest = points[-1] - (points[-1] @ gram @ axes[0]) * axes[0]
        length = float((rest @ gram @ rest).clamp_min(0))
        if length <= _ON_A_LINE * float(spread[0]):
            raise UsageError("the checkpoints and their base lie on one line: they span no plane")
        axes.append(rest / math.sqrt(length))
    basis = torch.stack(axes)
    places = points @ gram @ basis.mT
    signs = torch.stack([_sign(places[:tasks, axis]) for axis in range(2)])
    basis, places = basis * signs[:, None], places * signs
    squared = torch.einsum("is,st,it->i", points, gram, points) - places.square().sum(1)
    names = [*labels, *marked, BASE]
    return Plane(
        labels=tuple(labels),
        axes=basis[:, :tasks],
        positions={name: (float(a), float(b)) for name, (a, b) in zip(names, places)},
        outside={name: math.sqrt(max(0.0, float(square))) for name, square in zip(names, squared)},
        explained=float(spread[:2].sum() / spread.sum()),
    )


_ON_A_LINE = 1e-10
"""Squared length of a direction, relative to the longest, below which it is rounding."""


def _sign(coordinates: Tensor) -> Tensor:
    """Axes point at the farthest model (of equally far ones at the first): eigenvectors come with either sign."""
    sizes = coordinates.abs()
    farthest = int((sizes > (1 - 1e-6) * sizes.amax()).to(torch.uint8).argmax())
    return coordinates.new_tensor(1.0 if coordinates[farthest] >= 0 else -1.0)


def _gram(layer: Layer) -> Tensor:
    # in float64, a piece at a time: distances from the plane are small differences of large numbers
    gram = torch.zeros(layer.tasks, layer.tasks, dtype=torch.float64)
    for piece in layer.task_vectors.flatten(1).split(1 << 18, dim=1):
        gram += piece.double() @ piece.double().mT
    return gram


def grid(points: Sequence[Point], steps: int, margin: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Values of a and of b, `steps` of each: a square, so that distances look alike in both directions."""
    lows, highs = [min(values) for values in zip(*points)], [max(values) for values in zip(*points)]
    half = (0.5 + margin) * max(high - low for low, high in zip(lows, highs))
    shares = [2 * step / (steps - 1) - 1 for step in range(steps)]
    first, second = (tuple((low + high) / 2 + half * share for share in shares) for low, high in zip(lows, highs))
    return first, second


# --- the losses -----------------------------------------------------------------------------------------------------


class Tower:
    """One vision tower that is moved about, behind the heads of all tasks, with every task's images decoded once.

    Args:
        base: with a processor; with a text tower and a tokenizer, where they are needed.
        tasks: what is measured, on their test splits, each with the model whose classifier is used if it has one.
        samples: at most so many images a task, shuffled with `seed`: a split may be sorted by class.
    """

    def __init__(
        self,
        base: ModelSource,
        tasks: Sequence[tuple[Task, ModelSource]],
        samples: int,
        *,
        seed: int = 0,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        self.tower = load_tower(base.folder_with_tokenizer())
        self.device = device
        self.classifiers: dict[str, Classifier] = {}
        self.batches: dict[str, list[Batch]] = {}
        for task, tuned in tasks:
            chosen = read_samples(task, task.test_split, limit=samples, seed=seed)
            classifier = classifier_for(self.tower, tuned, base, task, chosen.class_names).to(device)
            batches = ImageBatches(chosen, classifier.pixels, batch_size)
            self.batches[task.name] = list(batches)
            batches.report_broken()
            self.classifiers[task.name] = classifier
        self.parameters = next(iter(self.classifiers.values())).tower_parameters()
        self.weights: Mapping[str, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def samples(self) -> dict[str, int]:
        """Task -> how many images there are."""
        return {name: sum(len(batch.labels) for batch in batches) for name, batches in self.batches.items()}

    def span(self, ingredients: Ingredients, plane: Plane) -> None:
        """Write theta_bar, e_1 and e_2, one layer at a time."""

        def combine(layer: Layer) -> tuple[str, tuple[Tensor, Tensor, Tensor]]:
            first, second = torch.tensordot(plane.axes.to(layer.task_vectors), layer.task_vectors, dims=1)
            return layer.name, (layer.base + layer.task_vectors.mean(0), first, second)

        plain = replace(ingredients, statistics=None)
        self.weights = dict(stream_layers(plain, combine, device=self.device))

    @torch.no_grad()
    def loss_at(self, point: Point) -> dict[str, float]:
        """Task -> loss at theta_bar + a e_1 + b e_2; needs `span`."""
        for name, parameter in self.parameters.items():
            centre, first, second = self.weights[name]
            torch.add(centre, first, alpha=point[0], out=parameter.data).add_(second, alpha=point[1])
        return self._losses()

    @torch.no_grad()
    def loss_of(self, model: TensorSource) -> dict[str, float]:
        """Task -> loss of a model as it is, wherever it lies."""
        for name, parameter in self.parameters.items():
            model.copy_to(name, parameter.data)
        return self._losses()

    def _losses(self) -> dict[str, float]:
        losses = {}
        for name, batches in self.batches.items():
            sums = [
                cross_entropy(self.classifiers[name](batch.inputs), batch.labels.to(self.device), reduction="sum")
                for batch in batches
            ]
            losses[name] = float(torch.stack(sums).double().sum()) / self.samples[name]
        return losses


# --- what goes in and out -------------------------------------------------------------------------------------------


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
    from hf_epimer.analysis import plots as plots

    if not plotting.available():
        return ()
    figure = plots.loss_contours(
        landscape.losses,
        (landscape.first, landscape.second),
        landscape.plane.positions,
        landscape.plane.outside,
        landscape.models,
        landscape.tuned,
    )
    return tuple(plotting.save({PICTURE: figure}, folder))
