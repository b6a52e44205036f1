"""The merges of a sweep: one pass over the layers gives the same weights as merges one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.checkpoints import StateDict as Tensors
from helpers.checkpoints import tiny_state
from helpers.command import contents
from helpers.statistics import statistics
from hf_epimer import Grid, merge_state_dicts
from hf_epimer.analysis.sweep.candidates import group_candidates, largest_rank, merge_candidates, task_vector_file
from hf_epimer.analysis.sweep.grid import Candidate, config_of
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import EpimerError, OutputError, UsageError
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.methods import METHODS

ALL = list(METHODS)


FREE = [name for name, method in METHODS.items() if method.needs is None]


class Counting(StateDict):
    """A source that notes what is read of it."""

    def __init__(self, label: str, tensors: Tensors) -> None:
        super().__init__(label, tensors)
        self.reads: Counter[str] = Counter()

    def tensor(self, name: str) -> Tensor:
        self.reads[name] += 1
        return super().tensor(name)


def swept(
    candidates: list[Candidate], base: Tensors, tuned: list[Tensors], folder: Path, **arguments: Any
) -> tuple[list[Tensors], Ingredients]:
    """Task vectors of all candidates, and the sources with their counts."""
    needs = next((own.method.name for own in candidates if own.statistic), None)
    measured = statistics(needs, len(tuned)) if needs else None
    if needs == "regmean" and measured:
        measured = [{f"{name}.input_factor": gram for name, gram in own.items()} for own in measured]
    ingredients = Ingredients(
        Counting("base", base),
        [Counting(f"model {number}", own) for number, own in enumerate(tuned)],
        [1 / len(tuned)] * len(tuned),
        [Counting(f"statistics {number}", own) for number, own in enumerate(measured)] if measured else None,
    )
    shapes = ingredients.base.shapes
    with task_vector_file(folder / "vectors", shapes, len(candidates)) as stored:
        merge_candidates(ingredients, dict(enumerate(candidates)), stored, **arguments)
        found = [{name: stored.read(number, name) for name in shapes} for number in range(len(candidates))]
    assert not (folder / "vectors").exists()
    return found, ingredients


# --- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("exact", [False, True])
def test_every_setting_is_the_merge_of_its_own(method: str, exact: bool, base_state: Tensors, tmp_path: Path) -> None:
    tuned = [tiny_state(t + 1, base_state) for t in range(3)]
    grid = Grid((method, "tsv-m", "mean"), (2, 5, 64), (0.5, 1.0, 1.7))
    candidates = grid.candidates(64)
    found, _ = swept(candidates, base_state, tuned, tmp_path, exact=exact, seed=3)
    measured = statistics(method, 3)
    for number, own in enumerate(candidates):
        for setting in grid.settings(own):
            needs = measured if own.method.name == method else None
            expected = merge_state_dicts(
                base_state, tuned, own.method.name, config_of(own, setting), needs, seed=3, exact=exact
            )
            for name, start in base_state.items():
                merged = start + (1.0 if setting.alpha is None else setting.alpha) * found[number][name]
                assert torch.allclose(merged, expected[name], rtol=1e-6, atol=2e-6), (setting, name)


def test_large_matrices_agree_within_the_decompositions_tolerance(tmp_path: Path) -> None:
    """Where ranks share an iterative decomposition at the largest of them."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200, 160, generator=generator)}
    decay = torch.logspace(0, -2, 160)
    tuned = [
        {
            "w": base["w"]
            + (torch.randn(200, 160, generator=generator) * decay) @ torch.randn(160, 160, generator=generator)
        }
        for _ in range(2)
    ]
    grid = Grid(("tsv-m",), (4, 16), (1.0,))
    found, _ = swept(grid.candidates(80), base, tuned, tmp_path)
    for number, rank in enumerate((4, 16)):
        expected = merge_state_dicts(base, tuned, "tsv-m", METHODS["tsv-m"].config(rank=rank))["w"] - base["w"]
        assert float((found[number]["w"] - expected).norm() / expected.norm()) < 1e-3


def test_one_pass_serves_the_grid(base_state: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of every file once, every task vector decomposed once, every distinct rank solved once."""
    from hf_epimer.analysis.sweep import candidates as module
    from hf_epimer.numerics import frechet

    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(module, "task_triples", counted("decompose", module.task_triples))
    monkeypatch.setattr(frechet, "frechet_mean", counted("solve", frechet.frechet_mean))
    tuned = [tiny_state(t + 1, base_state) for t in range(3)]
    grid = Grid(("epimer", "tsv-m", "mean", "iso-c", "fisher"), (2, 4, 50), (0.5, 1.0, 1.5, 2.0))
    _, ingredients = swept(grid.candidates(50), base_state, tuned, tmp_path)
    for source in ingredients.sources():
        assert set(source.reads.values()) == {1}, source.label  # type: ignore[attr-defined]
    matrices = [name for name, value in base_state.items() if value.ndim == 2]
    assert calls["decompose"] == len(matrices)
    position = next(name for name in matrices if "position" in name)  # 5 x 32: rank 1 for all three
    assert calls["solve"] == 3 * len(matrices) - 2 * (base_state[position].shape[0] // 3 == 1)


def test_surveys_take_passes_of_their_own_and_no_statistics(
    base_state: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_epimer.numerics.trimming.STEP", 1)  # few entries of so small a model would mislead
    tuned = [tiny_state(t + 1, base_state) for t in range(2)]
    _, ingredients = swept(Grid(("ties", "epimer"), (4, 8)).candidates(8), base_state, tuned, tmp_path)
    assert set(ingredients.models[0].reads.values()) == {3}  # type: ignore[attr-defined]
    assert ingredients.statistics
    assert set(ingredients.statistics[0].reads.values()) == {1}  # type: ignore[attr-defined]


def test_a_merge_that_is_not_finite_is_an_error(base_state: Tensors, tmp_path: Path) -> None:
    tuned = [{name: value * 3e38 for name, value in tiny_state(1, base_state).items()}] * 2
    with pytest.raises(EpimerError, match="NaN or Inf"):
        swept(Grid(("mean",)).candidates(8), base_state, tuned, tmp_path)


def test_too_little_room_is_said_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"4000\.0 GB beside --out"),
        task_vector_file(tmp_path / "x", {"w": (10**9, 100)}, 10),
    ):
        pass
    assert [name for name in contents(tmp_path) if name != "home"] == []  # heads are kept there


# --- the grid -------------------------------------------------------------------------------------------------------


def test_methods_without_rank_or_alpha_appear_once() -> None:
    grid = Grid(("tsv-m", "ties", "mean", "mean"), (16, 4, "max", 4), (1, 0.5))
    settings = [setting for own in grid.candidates(12) for setting in grid.settings(own)]
    assert [str(setting) for setting in settings] == [
        "tsv-m, rank 4, alpha 0.5", "tsv-m, rank 4, alpha 1", "tsv-m, rank 12, alpha 0.5", "tsv-m, rank 12, alpha 1",
        "tsv-m, rank 16, alpha 0.5", "tsv-m, rank 16, alpha 1", "ties, alpha 0.5", "ties, alpha 1", "mean",
    ]  # fmt: skip
    assert len(Grid(("tsv-m",), (12, "max")).candidates(12)) == 1


def test_options_go_to_the_methods_that_have_them() -> None:
    grid = Grid(("epimer", "fisher", "mean"), (4,), options={"damping": 0.5, "normalize": "trace"})
    epimer, fisher, mean = (own.config for own in grid.candidates(4))
    assert (epimer.damping, epimer.normalize, epimer.alpha, fisher.damping) == (0.5, "trace", 1.0, 0.5)
    assert mean == METHODS["mean"].config()
    with pytest.raises(UsageError, match=r"none of these methods has an option --density; ties has it"):
        Grid(("epimer",), options={"density": 0.5})
    with pytest.raises(UsageError, match="--damping must be at least 0"):
        Grid(("epimer",), options={"damping": -1.0})


def test_the_largest_rank_is_the_first_that_changes_nothing() -> None:
    assert largest_rank({"a": (30, 20), "b": (9, 40), "c": (100,)}, 3) == 6
    assert largest_rank({"a": (2, 2)}, 3) == 1


def test_passes_are_shared_by_what_needs_the_same_statistics() -> None:
    def groups(*names: str, **options: Any) -> list[list[str]]:
        candidates = Grid(names, (2, 4), options=options).candidates(4)
        return [[str(candidates[n].method.name) for n in own] for own in group_candidates(candidates)]

    assert groups("mean", "epimer", "ties", "fisher") == [["mean", "epimer", "epimer", "ties", "fisher"]]
    assert groups("mean", "ties") == [["mean", "ties"]]
    assert groups("epimer", "regmean", "mean") == [["epimer", "epimer", "mean"], ["regmean"]]
    projected = groups("epimer", "tsv-m", metric="projected")
    assert projected == [["epimer"], ["epimer"], ["tsv-m", "tsv-m"]]  # another basis, other statistics
