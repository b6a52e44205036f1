"""The merged task vectors of a whole grid in one pass over the checkpoints.

For every layer: one decomposition per task at the largest rank, whose leading triples are whitened again for each lower
one; then every method at every rank. What a candidate makes of a layer goes to disk at once (fp32), so that memory does
not grow with the grid. Where ranks are capped to the same number, the layer is solved once for all of them.

The iterative decomposition is right to 2e-4 at the rank it was asked for: at lower ranks the leading triples are a
little more accurate than those a merge of its own would find, within that tolerance, and with `exact` just the same.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from hf_epimer.analysis.sweep.grid import Candidate
from hf_epimer.errors import OutputError
from hf_epimer.merging.finite import check_merged
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.stream import stream_layers, survey_layers
from hf_epimer.methods import Layer
from hf_epimer.methods.statistic import StatisticKind
from hf_epimer.numerics.subspace import TaggedBasis, capped_rank, task_triples, whitened_basis
from hf_epimer.types import Shape


class TaskVectorFile:
    """Merged task vectors of several candidates in one file, fp32: candidate c's layer l is at c P + offset_l.

    P is the number of parameters. Safe to write from several threads.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._offsets = dict(zip(shapes, accumulate(sizes, initial=0)))
        self._parameters = sum(sizes)
        self._lock = threading.Lock()
        self._file = open(path, "w+b")  # noqa: SIM115  (closed by task_vector_file)

    def write(self, candidate: int, name: str, value: Tensor) -> None:
        """Keep one layer of one candidate."""
        raw = value.detach().to("cpu", torch.float32).contiguous().flatten().view(torch.uint8)
        with self._lock:
            self._file.seek(self._place(candidate, name))
            self._file.write(raw.numpy().data)
            self._file.flush()  # a full disk is an error here and not at the end

    def read(self, candidate: int, name: str) -> Tensor:
        """One layer of one candidate."""
        value = torch.empty(self.shapes[name])
        with self._lock:
            self._file.seek(self._place(candidate, name))
            count = self._file.readinto(value.flatten().view(torch.uint8).numpy().data)
        assert count == value.nbytes, f"{name} of candidate {candidate} was never written"
        return value

    def close(self) -> None:
        """Done with it."""
        self._file.close()

    def _place(self, candidate: int, name: str) -> int:
        return 4 * (candidate * self._parameters + self._offsets[name])


@contextmanager
def task_vector_file(path: Path, shapes: Mapping[str, Shape], candidates: int) -> Iterator[TaskVectorFile]:
    """A file that is gone when the block ends.

    Raises:
        OutputError: there is no room for it.
    """
    needed = 4 * candidates * sum(math.prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(
            f"the merged task vectors of {candidates} candidates take {needed / 1e9:.1f} GB beside --out, where "
            f"{free / 1e9:.1f} GB are free: sweep fewer methods or ranks, or choose another --out"
        )
    stored = TaskVectorFile(path, shapes)
    try:
        yield stored
    finally:
        stored.close()
        os.unlink(path)


def group_candidates(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Which candidates can share a pass over the files: those that need the same statistics, or none.

    A projected metric is measured in one basis, so every rank of it needs a pass of its own.
    """
    groups: dict[tuple[StatisticKind | None, int | None], list[int]] = {}
    for number, candidate in enumerate(candidates):
        needs = candidate.statistic
        groups.setdefault((needs, candidate.rank if needs and needs.file is None else None), []).append(number)
    free = groups.pop((None, None), [])
    for (needs, _), members in groups.items():
        if needs and needs.file and free:
            groups[needs, None] = sorted(members + free)
            free = []
            break
    return [*groups.values(), *([free] if free else [])]


def merge_candidates(
    ingredients: Ingredients,
    candidates: Mapping[int, Candidate],
    stored: TaskVectorFile,
    *,
    seed: int = 0,
    exact: bool = False,
    device: str = "cpu",
    on_layer: Callable[[str, int], None] = lambda stage, layers: None,
) -> None:
    """One pass over the files for all candidates of a group, after the surveys of methods that have one.

    Args:
        ingredients: checked to fit together, with the statistics of the group.
        candidates: by their number in `stored`.
        seed, exact, device, on_layer: as in `merge_layers`.

    Raises:
        CheckpointError, StatisticsError: as in `merge_layers`.
        NumericalError: a merged tensor is not finite.
    """
    needs = next((candidate.statistic for candidate in candidates.values() if candidate.statistic), None)
    ranks = sorted({candidate.rank for candidate in candidates.values() if candidate.rank is not None})
    surveys = {
        number: survey_layers(ingredients, each.method, each.config, on_layer, seed=seed, exact=exact, device=device)
        for number, each in candidates.items()
    }

    def work(layer: Layer) -> None:
        bases = shared_bases(layer, ranks)
        known: dict[tuple[str, int | None], Tensor] = {}
        for number, candidate in candidates.items():
            basis = bases.get(candidate.rank) if candidate.rank is not None else None
            key = candidate.method.name, basis.rank if basis else None
            if key not in known:
                at_rank = replace(layer, basis=basis) if basis else layer
                known[key] = candidate.method.merge(at_rank, candidate.config, surveys[number]).task_vector
                check_merged(known[key], layer.name, candidate.method.name)
            stored.write(number, layer.name, known[key])

    for _ in stream_layers(ingredients, work, needs, seed=seed, exact=exact, device=device):
        on_layer("merge", 1)


def shared_bases(layer: Layer, ranks: Sequence[int]) -> dict[int, TaggedBasis]:
    """The layer's tagged basis at every rank, from one decomposition at the largest; empty where it has none.

    `TaggedBasis.rank` is the capped rank: ranks with the same one share their basis.
    """
    if layer.basis is not None or not layer.is_matrix:
        return {}
    shape = (int(layer.base.shape[0]), int(layer.base.shape[1]))
    capped = {rank: capped_rank(rank, shape, layer.tasks) for rank in ranks}
    deepest = max(capped.values(), default=0)
    if not deepest or not bool(layer.task_vectors.any()):
        return {}
    triples = task_triples(layer.task_vectors, deepest, exact=layer.exact, seed=layer.seed)
    distinct = {rank: whitened_basis(triples, rank, exact=layer.exact) for rank in set(capped.values())}
    return {rank: basis for rank, capped_at in capped.items() if (basis := distinct[capped_at]) is not None}


def largest_rank(shapes: Mapping[str, Shape], tasks: int) -> int:
    """The rank at which every matrix is capped: more directions change nothing."""
    matrices = [(shape[0], shape[1]) for shape in shapes.values() if len(shape) == 2]
    return max([1, *(capped_rank(min(shape), shape, tasks) for shape in matrices)])
