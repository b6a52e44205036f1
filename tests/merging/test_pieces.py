"""A method that looks at entries alone gets layers in pieces, and nobody can tell by what it makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.checkpoints import StateDict, tiny_state
from helpers.merges import MATRIX, distance
from hf_epimer.checkpoints.reader import Checkpoint, PiecewiseSource, TensorSource
from hf_epimer.checkpoints.reader import StateDict as InMemory
from hf_epimer.errors import CheckpointError
from hf_epimer.merging import stream
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.pieces import in_pieces
from hf_epimer.merging.report import LayerReport
from hf_epimer.methods import METHODS, Layer

ENTRYWISE = {"mean", "task-arithmetic", "nan", "ties"}


class Whole:
    """A source that gives whole tensors only."""

    def __init__(self, source: TensorSource) -> None:
        self.label, self.shapes = source.label, source.shapes
        self.tensor, self.copy_to = source.tensor, source.copy_to


def merged(method: str, sources: list[TensorSource], **options: Any) -> tuple[StateDict, list[LayerReport]]:
    chosen = METHODS[method]
    base, *models = sources
    ingredients = Ingredients(base, models, [0.5, 0.3, 0.2])
    layers = list(stream.merge_layers(ingredients, chosen, chosen.config(**options)))
    return {layer.name: layer.tensor for layer in layers}, [layer.report for layer in layers]


def stored(folder: Path, states: list[StateDict], dtype: torch.dtype = torch.float32) -> list[TensorSource]:
    sources: list[TensorSource] = []
    for number, state in enumerate(states):
        save_file({name: value.to(dtype) for name, value in state.items()}, folder / f"{number}.safetensors")
        sources.append(Checkpoint(str(number), [folder / f"{number}.safetensors"]))
    return sources


@pytest.fixture
def states(base_state: StateDict) -> list[StateDict]:
    return [base_state, *(tiny_state(number + 1, base_state) for number in range(3))]


def test_which_methods_look_at_entries_alone() -> None:
    assert {name for name, method in METHODS.items() if method.entrywise(method.config())} == ENTRYWISE
    by_layer = METHODS["ties"].config(trim="layer")
    assert not METHODS["ties"].entrywise(by_layer)


@pytest.mark.parametrize("method", sorted(ENTRYWISE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_what_whole_layers_give(
    method: str, dtype: torch.dtype, states: list[StateDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE", 128)
    sources = stored(tmp_path, states, dtype)
    seen: list[int] = []
    reader = stream.LayerReader.read

    def read(self: Any, piece: Any) -> Layer:
        seen.append(piece.entries)
        return reader(self, piece)

    monkeypatch.setattr(stream.LayerReader, "read", read)
    in_parts, reports = merged(method, sources)
    assert max(seen) == 128 and all(isinstance(source, PiecewiseSource) for source in sources)
    whole, expected = merged(method, list(map(Whole, sources)))
    assert max(seen) == max(value.numel() for value in states[0].values())
    assert in_parts.keys() == whole.keys() and in_parts[MATRIX].dtype == dtype
    base = {name: value.to(dtype).double() for name, value in states[0].items()}
    assert distance(in_parts, whole, base) < (1e-5 if dtype == torch.float32 else 1e-3)
    for own, other in zip(reports, expected, strict=True):
        assert (own.name, own.shape) == (other.name, other.shape)
        assert own.task_vector_norms == pytest.approx(other.task_vector_norms)
        assert (own.merged_norm, own.base_norm) == pytest.approx((other.merged_norm, other.base_norm))


def test_a_broken_entry_in_any_piece_is_named(
    states: list[StateDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE", 128)
    states[2] = {**states[2], MATRIX: states[2][MATRIX].clone()}
    states[2][MATRIX].view(-1)[-1] = torch.nan
    with pytest.raises(CheckpointError, match=f"2: NaN or Inf in {MATRIX}"):
        merged("mean", stored(tmp_path, states))


@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)])
def test_pieces_are_all_entries_once(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    for entries in (None, 1, 4, 100):
        (pieces,) = in_pieces({"w": shape}, entries)
        assert [n for piece in pieces for n in range(piece.start, piece.stop)] == list(range(size))
        assert pieces[0].is_whole == (len(pieces) == 1)
        (few,) = in_pieces({"w": shape}, entries, step=3)
        assert [piece.entries for piece in few] == [len(range(piece.start, piece.stop, 3)) for piece in pieces]


@pytest.mark.parametrize("part", [slice(0, 12, 1), slice(3, 8, 1), slice(1, 12, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_piece_is_read_from_files_and_from_memory(part: slice, dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    save_file({"x": torch.ones(5), "w": value}, tmp_path / "w.safetensors")
    for source in (Checkpoint("file", [tmp_path / "w.safetensors"]), InMemory("memory", {"w": value.T.contiguous().T})):
        out: Tensor = torch.zeros(len(range(*part.indices(12))), dtype=dtype)
        source.copy_piece_to("w", part, out)
        assert torch.equal(out, value.flatten()[part].to(dtype)), source.label
