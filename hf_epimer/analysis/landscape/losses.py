"""The loss of every task at points of a plane: one tower that is moved about.

    L_t(a, b) = mean cross-entropy of task t at theta_bar + a e_1 + b e_2, in nats

All models are read once to write theta_bar, e_1 and e_2, one layer at a time: three towers are held and a fourth is
moved about, whatever T is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_epimer.analysis.landscape.plane import Plane, Point
from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.stream import stream_layers
from hf_epimer.methods import Layer
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import ModelSource
from hf_epimer.tasks.images import Batch, ImageBatches, read_samples
from hf_epimer.tasks.task import Task


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
            losses[name] = float(torch.stack(sums).cpu().double().sum()) / self.samples[name]
        return losses
