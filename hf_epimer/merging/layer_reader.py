"""Layers as methods take them, read from checkpoints into buffers that are used again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import Checkpoint, PiecewiseSource, TaskVectorSource, TensorSource
from hf_epimer.errors import StatisticsError
from hf_epimer.merging.finite import check_statistics, check_weights
from hf_epimer.merging.inputs import Ingredients, normalized_weights
from hf_epimer.merging.pieces import Piece
from hf_epimer.methods import Layer
from hf_epimer.methods.statistic import Part, StatisticKind
from hf_epimer.numerics.subspace import TaggedBasis


class LayerReader:
    """Reads layers, or pieces of them, into buffers that are reused: one is valid until the next one is read.

    Args:
        ingredients: checked to fit together.
        needs: the statistic to read; there is none of a piece.
        largest: entries of what will be read at once, at most.
        seed, exact, device: as in `merge_layers`.
    """

    def __init__(
        self,
        ingredients: Ingredients,
        needs: StatisticKind | None,
        largest: int,
        *,
        seed: int,
        exact: bool,
        device: str,
    ) -> None:
        self.ingredients = ingredients
        self.parts = needs.parts if needs else ()
        self.device = device
        self.dtype = torch.float64 if exact else torch.float32
        weights = normalized_weights(ingredients.weights, len(ingredients.models))
        self.common: dict[str, Any] = {
            "weights": torch.tensor(weights, dtype=self.dtype, device=device),
            "labels": tuple(model.label for model in ingredients.models),
            "seed": seed,
            "exact": exact,
        }
        self.statistics = list(ingredients.statistics or ()) if needs else []
        self.copy_base = _copier(ingredients.base)
        self.write_task_vectors = [_task_vector_writer(model) for model in ingredients.models]
        names = list(ingredients.base.shapes)
        self.base = self._buffer([ingredients.base], names, largest)
        self.task_vectors = self._buffer(ingredients.models, names, largest)
        self.values = {
            part.name: self._buffer(self.statistics, [name + part.suffix for name in names]) for part in self.parts
        }

    def _buffer(self, sources: Sequence[TensorSource], names: Sequence[str], largest: int | None = None) -> Tensor:
        entries = max((math.prod(s.shapes[name]) for s in sources for name in names if name in s.shapes), default=0)
        is_pinned = torch.device(self.device).type == "cuda"  # a GPU reads such memory several times as fast
        return torch.empty(len(sources), min(entries, largest or entries), dtype=self.dtype, pin_memory=is_pinned)

    def nbytes(self) -> int:
        """Bytes of the buffers, and of eight more tensors of a layer, as many as any method makes (`epimer-core`)."""
        buffers = (self.base, self.task_vectors, *self.values.values())
        return sum(buffer.nbytes for buffer in buffers) + 8 * self.base.nbytes

    def read(self, piece: Piece) -> Layer:
        name, shape = piece.name, piece.shape if piece.is_whole else (piece.entries,)
        base = self.base[0, : piece.entries].view(shape)
        self.copy_base(piece, base)
        check_weights(base, self.ingredients.base.label, name)
        task_vectors = self.task_vectors[:, : piece.entries].view(-1, *shape)
        for write, difference in zip(self.write_task_vectors, task_vectors, strict=True):
            write(piece, base, difference)
        layer = Layer(
            name=name,
            base=base.to(self.device),
            task_vectors=task_vectors.to(self.device),
            is_matrix=len(shape) == 2,
            statistics={
                part.name: values
                for part in self.parts
                if (values := self._read_statistics(part, name + part.suffix)) is not None
            },
            basis=self._read_basis(name),
            **self.common,
        )
        if not bool(layer.norms.isfinite().all()):
            for model, difference in zip(self.ingredients.models, task_vectors, strict=True):
                check_weights(difference, model.label, name)
        return layer

    def _read_basis(self, name: str) -> TaggedBasis | None:
        basis = self.ingredients.bases.get(name)
        if basis is None or basis.u.device == torch.device(self.device):
            return basis
        u, v, s, tags = (each.to(self.device) for each in (basis.u, basis.v, basis.s, basis.tags))
        return TaggedBasis(u, v, s, tags, basis.rank)

    def _read_statistics(self, part: Part, name: str) -> Tensor | None:
        present = [name in source.shapes for source in self.statistics]
        if not any(present):
            return None
        if not all(present) and not part.is_optional:
            raise StatisticsError(f"{self.statistics[present.index(False)].label}: no statistics for {name}")
        shape = self.statistics[present.index(True)].shapes[name]
        values = self.values[part.name][:, : math.prod(shape)].view(-1, *shape)
        for source, value in zip(self.statistics, values, strict=True):
            if name not in source.shapes:
                value.zero_()
                continue
            source.copy_to(name, value)
            check_statistics(value, source.label, name)
            if float((value.diagonal() if part.is_symmetric else value).amin()) < 0:
                raise StatisticsError(f"{source.label}: negative values in {name}")
        return values.to(self.device)


def read_ahead(sources: Sequence[TensorSource], name: str) -> None:
    """Ask the system to bring a tensor of all sources from the disk; returns at once."""
    for source in sources:
        if isinstance(source, Checkpoint) and name in source.shapes:
            source.read_ahead(name)


Copier = Callable[[Piece, Tensor], None]
"""(piece, out) -> None, copying the piece's entries to `out`."""


def _copier(source: TensorSource) -> Copier:
    if isinstance(source, PiecewiseSource):
        return lambda piece, out: source.copy_piece_to(piece.name, piece.slice, out)

    def copy_whole(piece: Piece, out: Tensor) -> None:
        assert piece.is_whole, f"{source.label} cannot be read in pieces"
        source.copy_to(piece.name, out)

    return copy_whole


def _task_vector_writer(model: TensorSource) -> Callable[[Piece, Tensor, Tensor], None]:
    """(piece, W_0, out) -> None, writing W_t - W_0 to `out`."""
    if isinstance(model, TaskVectorSource):
        return lambda piece, base, out: model.task_vector_to(piece.name, out)
    copy = _copier(model)

    def subtract(piece: Piece, base: Tensor, out: Tensor) -> None:
        copy(piece, out)
        out.sub_(base)

    return subtract
