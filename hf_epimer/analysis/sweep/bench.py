"""Every setting's weights in one tower in turn, shown the same pictures of every task.

Pictures are decoded and preprocessed once for all settings: a bounded part of them is kept as pixels while every one
classifies them. That part goes across tasks, so that weights are put in once for all of them where it can hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_epimer.analysis.sweep.candidates import TaskVectorFile
from hf_epimer.analysis.sweep.grid import Setting
from hf_epimer.analysis.sweep.report import Row
from hf_epimer.analysis.sweep.stopping import hopeless, row_of
from hf_epimer.evaluation.accuracy import precision_on
from hf_epimer.merging.finite import stored_as
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.pipeline.plan import Plan
from hf_epimer.tasks.images import Batch, ImageBatches, Samples
from hf_epimer.types import Progress

MEMORY_FOR_PIXELS = 10**9
"""Bytes of preprocessed pictures that are kept at a time; a single batch may take more."""

BATCH = 64
"""Pictures that a tower sees at a time."""


class Bench:
    """Measures settings in the precision of `evaluate`.

    Args:
        plan: with the tasks, and the checkpoints whose heads are used.
        stored: tau of every candidate.
        settings: each with the number of its candidate.
        dtype: that merges are rounded to.
    """

    def __init__(
        self,
        plan: Plan,
        stored: TaskVectorFile,
        settings: Mapping[Setting, int],
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self.tuned_on, self.home, self.device = plan.tuned_on, plan.base, plan.recipe.device
        self.stored, self.settings, self.dtype, self.progress = stored, settings, dtype, progress
        self.tower = load_tower(plan.base.folder_with_tokenizer())
        self.base: dict[str, Tensor] = {}

    def measure(
        self, settings: Sequence[Setting], data: Mapping[str, Samples], stage: str, stop_after: Sequence[float] = ()
    ) -> list[Row]:
        """Top-1 accuracy of every setting on every task.

        Args:
            data: task -> samples.
            stage: what `progress` is told; settings that are stopped count as measured.
            stop_after: shares of every task's samples, ascending, after which hopeless settings are stopped.

        Raises:
            DataError: too many pictures are broken.
        """
        total = len(settings) * sum(map(len, data.values()))
        self.progress(stage, 0, total)
        models = {
            task.name: classifier_for(self.tower, tuned, self.home, task, data[task.name].class_names).to(self.device)
            for task, tuned in self.tuned_on
        }
        nothing = {name: torch.zeros(0, dtype=torch.bool) for name in models}
        hits = dict.fromkeys(settings, nothing)
        running, begin, broken = list(settings), dict.fromkeys(models, 0), dict.fromkeys(models, 0)

        def step(count: int) -> None:
            self.progress(stage, count, total)

        for share in (*stop_after, 1.0):
            end = {name: math.ceil(share * len(data[name])) for name in models}
            parts = {
                name: ImageBatches(data[name], model.pixels, BATCH, only=range(begin[name], end[name]))
                for name, model in models.items()
            }
            for chunk in _chunks(parts):
                for setting in running:
                    hits[setting] = self._classify(setting, models, chunk, hits[setting], step)
            for name, part in parts.items():
                broken[name] += len(part.broken)
                part.check_broken(broken[name])
                part.report_broken()
            begin = end
            if share < 1:
                lost = hopeless({setting: hits[setting] for setting in running})
                running = [setting for setting in running if setting not in lost]
                step(len(lost) * sum(len(data[name]) - end[name] for name in models))
        return [row_of(setting, own, stopped=setting not in running) for setting, own in hits.items()]

    def _classify(
        self,
        setting: Setting,
        models: Mapping[str, Classifier],
        chunk: Sequence[tuple[str, Batch]],
        hits: Mapping[str, Tensor],
        on_images: Callable[[int], None],
    ) -> dict[str, Tensor]:
        """The hits so far and those of a chunk, by task."""
        self._load(next(iter(models.values())).tower_parameters(), setting)
        found = {name: [own] for name, own in hits.items()}
        precision = precision_on(next(self.tower.parameters()).device)
        for name, batch in chunk:
            found[name].append(models[name].top1(batch.inputs, precision) == batch.labels)
            on_images(len(batch.labels))
        return {name: torch.cat(own) for name, own in found.items()}

    @torch.no_grad()
    def _load(self, parameters: Mapping[str, nn.Parameter], setting: Setting) -> None:
        """theta_0 + alpha tau, rounded as `merge` would store it."""
        self.base = self.base or {name: value.detach().clone() for name, value in parameters.items()}
        alpha = 1.0 if setting.alpha is None else setting.alpha
        for name in self.stored.shapes:
            step = self.stored.read(self.settings[setting], name).to(parameters[name].device)
            merged = torch.add(self.base[name], step, alpha=alpha)
            parameters[name].copy_(stored_as(merged, self.dtype, f"{setting}: {name}"))


def _chunks(parts: Mapping[str, Iterable[Batch]]) -> Iterator[list[tuple[str, Batch]]]:
    """As many batches together as may be kept in memory, each with the name of its task."""
    kept: list[tuple[str, Batch]] = []
    for name, batches in parts.items():
        for batch in batches:
            kept.append((name, batch))
            if sum(other.inputs.nbytes for _, other in kept) + batch.inputs.nbytes > MEMORY_FOR_PIXELS:
                yield kept
                kept = []
    if kept:
        yield kept
