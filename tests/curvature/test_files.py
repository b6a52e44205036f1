"""Statistics files: where they come from, small ones, and those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_epimer.curvature.files import StatisticsMetadata, open_statistics, save_statistics
from hf_epimer.errors import MismatchError, StatisticsError
from hf_epimer.methods.statistic import (
    FISHER_DIAGONAL,
    GRADIENT_GRAM,
    GRADIENT_GRAM_FILE,
    GRAM,
    KRONECKER,
    KRONECKER_FILE,
)

ORIGIN = StatisticsMetadata(3, "dtd", "org/dtd", "abc", "org/model", "def", "true", 7)


SHAPES = {"vision_model.a.weight": (6, 4), "vision_model.conv.weight": (6, 3, 2, 2), "vision_model.a.bias": (6,)}


def some_fisher() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator).exp() for name, shape in SHAPES.items()}


def same(name: str) -> str:
    return name


def test_a_fisher_file_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    fisher = some_fisher()
    save_statistics(path, fisher, ORIGIN)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "hf-epimer.fisher/1", "samples": "3", "task": "dtd", "dataset": "org/dtd", "labels": "true",
            "dataset_revision": "abc", "model": "org/model", "model_sha": "def", "seed": "7", "kind": "per-sample",
        }  # fmt: skip
        for name, value in fisher.items():
            assert torch.equal(file.get_tensor(name), value)
            assert file.get_tensor(name).dtype == torch.float32
    assert [entry.name for entry in tmp_path.iterdir()] == ["fisher.safetensors"]


@pytest.mark.parametrize(("compress", "tolerance"), [("bf16", 4e-3), ("rank1", 1e-6)])
def test_a_small_file_reads_like_a_large_one(compress: Any, tolerance: float, tmp_path: Path) -> None:
    fisher = some_fisher()
    expected = dict(fisher)
    if compress == "rank1":
        for name in ("vision_model.a.weight", "vision_model.conv.weight"):
            matrix = fisher[name].flatten(1)
            expected[name] = (torch.outer(matrix.mean(1), matrix.mean(0)) / matrix.mean()).view_as(fisher[name])
    path = tmp_path / "fisher.safetensors"
    save_statistics(path, fisher, ORIGIN, compress=compress)
    source = open_statistics(path, "x", FISHER_DIAGONAL, SHAPES, same)
    assert dict(source.shapes) == SHAPES
    for name, value in expected.items():
        out = torch.empty(SHAPES[name])
        source.copy_to(name, out)
        torch.testing.assert_close(out, value, rtol=tolerance, atol=0)
        torch.testing.assert_close(source.tensor(name).float(), value, rtol=tolerance, atol=0)


def test_rank_one_is_a_fraction_of_the_size(tmp_path: Path) -> None:
    fisher = {"w": torch.rand(300, 400), "zero": torch.zeros(30, 40)}
    sizes = {}
    for compress in (None, "bf16", "rank1"):
        path = tmp_path / f"{compress}.safetensors"
        save_statistics(path, fisher, ORIGIN, compress=compress)
        sizes[compress] = path.stat().st_size
    assert sizes["bf16"] < 0.51 * sizes[None]
    assert sizes["rank1"] < 0.01 * sizes[None]
    source = open_statistics(
        tmp_path / "rank1.safetensors", "x", FISHER_DIAGONAL, {"w": (300, 400), "zero": (30, 40)}, same
    )
    assert not source.tensor("zero").any()


def test_a_file_of_the_wrong_kind_or_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    save_statistics(path, some_fisher(), ORIGIN)
    with pytest.raises(StatisticsError, match=r"holds hf-epimer\.fisher/1, and hf-epimer\.kronecker/1 is needed"):
        open_statistics(path, "x", GRAM, SHAPES, same)
    with pytest.raises(MismatchError, match=r"vision_model\.a\.weight has shape \[6, 4\] instead of \[4, 6\]"):
        open_statistics(path, "x", FISHER_DIAGONAL, SHAPES | {"vision_model.a.weight": (4, 6)}, same)
    save_statistics(path, some_fisher(), ORIGIN, compress="rank1")
    with pytest.raises(MismatchError, match=r"vision_model\.a\.weight has shape"):
        open_statistics(path, "x", FISHER_DIAGONAL, SHAPES | {"vision_model.a.weight": (4, 6)}, same)
    with pytest.raises(StatisticsError, match="rank1 is for Fisher information"):
        save_statistics(path, {}, ORIGIN, KRONECKER_FILE, "rank1")


def test_kronecker_files_serve_regmean_too(tmp_path: Path) -> None:
    factors = {"vision_model.a.weight.input_factor": torch.eye(4), "vision_model.a.weight.output_factor": torch.eye(6)}
    path = tmp_path / "kronecker.safetensors"
    save_statistics(path, factors, ORIGIN, KRONECKER_FILE)
    assert set(open_statistics(path, "x", KRONECKER, SHAPES, same).shapes) == set(factors)
    save_statistics(path, factors | {"vision_model.a.weight.positions": torch.ones(5)}, ORIGIN, KRONECKER_FILE)
    for kind in (KRONECKER, GRAM):  # files of before have positions, too
        assert not any("positions" in name for name in open_statistics(path, "x", kind, SHAPES, same).shapes)
    save_statistics(path, factors, ORIGIN, KRONECKER_FILE)
    gram = open_statistics(path, "x", GRAM, SHAPES, same)
    assert dict(gram.shapes) == {"vision_model.a.weight.input_factor": (4, 4)}


def test_gradient_grams_are_stored_by_half(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator)
    name = "vision_model.a.weight.gradient_gram"
    grams = {name: x.mT @ x, "vision_model.b.weight.gradient_gram": torch.eye(6)}
    shapes = SHAPES | {"vision_model.b.weight": (3, 6)}
    path = tmp_path / "gradient_gram.safetensors"
    for compress, tolerance in ((None, 0.0), ("bf16", 4e-3)):
        save_statistics(path, grams, ORIGIN, GRADIENT_GRAM_FILE, compress)  # type: ignore[arg-type]
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "hf-epimer.gradient-gram/1"
            assert file.get_slice(name).get_shape() == [10]
        source = open_statistics(path, "x", GRADIENT_GRAM, shapes, same)
        assert dict(source.shapes) == {key: tuple(value.shape) for key, value in grams.items()}
        for key, value in grams.items():
            out = torch.empty(value.shape)
            source.copy_to(key, out)
            torch.testing.assert_close(out, value, rtol=tolerance, atol=0)
    with pytest.raises(MismatchError, match=r"b\.weight\.gradient_gram has shape \[6, 6\] instead of \[5, 5\]"):
        open_statistics(path, "x", GRADIENT_GRAM, shapes | {"vision_model.b.weight": (3, 5)}, same)
    with pytest.raises(
        StatisticsError, match=r"holds hf-epimer\.gradient-gram/1, and hf-epimer\.kronecker/1 is needed"
    ):
        open_statistics(path, "x", KRONECKER, shapes, same)
    save_file({name: torch.ones(9), "vision_model.b.weight.gradient_gram": torch.eye(6)}, path)
    with pytest.raises(MismatchError, match=r"a\.weight\.gradient_gram has shape \[9\] instead of \[4, 4\]"):
        open_statistics(path, "x", GRADIENT_GRAM, shapes, same)
