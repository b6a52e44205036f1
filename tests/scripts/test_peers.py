"""scripts/peers: other papers' closed forms against their equations, and differences with their errors."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from helpers.accelerator import DEVICE, StandIn
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import blocks_of, parameters_of, put_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "peers"))

import compare
import speed
from blocks import first_states
from featcal import ANCHOR, RIDGE, TOWARDS, featcal
from regmean_plus_plus import SHRINKAGE, regmean_plus_plus


def weights_of(tower: nn.Module) -> StateDict:
    return StateDict("tower", {name: value.detach().clone() for name, value in parameters_of(tower, CLIP).items()})


def changed(model: StateDict, seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    names = model.shapes
    return StateDict(
        f"task {seed}", {n: model.tensor(n) + 0.05 * torch.randn(names[n], generator=generator) for n in names}
    )


def pictures(seed: int) -> list[Tensor]:
    return list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(16))


def first_reads(tower: nn.Module, embeddings: StateDict, of_block: StateDict, pixels: list[Tensor]) -> Tensor:
    """What the first block's queries read: rows of its layer norm, with these embeddings before it."""
    before = weights_of(tower)
    put_weights(parameters_of(tower, CLIP), embeddings)
    block = blocks_of(tower, CLIP)[0]
    with torch.no_grad():
        states = torch.cat(first_states(tower, block, pixels))
    put_weights(parameters_of(tower, CLIP), before)
    scale, shift = (of_block.tensor(f"{block.name}.layer_norm1.{part}") for part in ("weight", "bias"))
    return layer_norm(states, states.shape[-1:], scale, shift, eps=1e-5).flatten(0, 1)


@pytest.fixture
def tower(clip_base: Path) -> nn.Module:
    return load_tower(clip_base)


def test_one_model_is_its_own_regmean(tower: nn.Module) -> None:
    model = changed(weights_of(tower), 1)
    regmean_plus_plus(tower, [model, model], [pictures(1), pictures(2)])
    for name, value in parameters_of(tower, CLIP).items():
        assert torch.allclose(value, model.tensor(name), atol=2e-3), name


def test_regmean_solves_its_equation(tower: nn.Module) -> None:
    base = weights_of(tower)
    models = [changed(base, seed) for seed in (1, 2)]
    shown = [pictures(1), pictures(2)]
    regmean_plus_plus(tower, models, shown)
    found = weights_of(tower)
    mean = StateDict("mean", {n: (models[0].tensor(n) + models[1].tensor(n)) / 2 for n in base.shapes})
    name = f"{blocks_of(tower, CLIP)[0].name}.self_attn.q_proj.weight"
    left = right = torch.zeros(())
    for model, pixels in zip(models, shown):
        x = first_reads(tower, mean, model, pixels)
        gram = x.T @ x
        gram = SHRINKAGE * gram + (1 - SHRINKAGE) * gram.diagonal().diag()
        left, right = left + found.tensor(name) @ gram, right + model.tensor(name) @ gram
    assert torch.allclose(left, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))
    bias = name.replace("weight", "bias")
    assert torch.allclose(found.tensor(bias), mean.tensor(bias), atol=1e-6)


def test_featcal_of_the_base_alone_changes_nothing(tower: nn.Module) -> None:
    base = weights_of(tower)
    featcal(tower, base, [base, base], [pictures(1), pictures(2)])
    for name, value in parameters_of(tower, CLIP).items():
        assert torch.allclose(value, base.tensor(name), atol=1e-4), name


def test_featcal_solves_its_equations(tower: nn.Module) -> None:
    """Weight and bias of the first block's queries: what they minimise has no slope there."""
    base = weights_of(tower)
    models = [changed(base, seed) for seed in (1, 2)]
    merge = StateDict("merge", {n: (models[0].tensor(n) + models[1].tensor(n)) / 2 for n in base.shapes})
    shown = [pictures(1), pictures(2)]
    put_weights(parameters_of(tower, CLIP), merge)
    featcal(tower, base, models, shown)
    found = weights_of(tower)
    name = f"{blocks_of(tower, CLIP)[0].name}.self_attn.q_proj"
    w, b = (found.tensor(f"{name}.{part}").clone().requires_grad_() for part in ("weight", "bias"))
    anchors = [ANCHOR * merge.tensor(n) + (1 - ANCHOR) * base.tensor(n) for n in (f"{name}.weight", f"{name}.bias")]
    of_weight = RIDGE * (w - anchors[0]).square().sum()
    of_bias = RIDGE * (b - anchors[1]).square().sum()
    for model, pixels in zip(models, shown):
        x = first_reads(tower, merge, merge, pixels)
        x_a = TOWARDS * first_reads(tower, model, model, pixels) + (1 - TOWARDS) * x
        scale = 1 / (x.T @ x / len(x)).norm()
        w_t, b_t = (model.tensor(f"{name}.{part}") for part in ("weight", "bias"))
        of_weight = of_weight + scale * (x @ w.T - x_a @ w_t.T).square().sum(1).mean()
        of_bias = of_bias + scale * (x @ w.detach().T + b - x_a @ w_t.T - b_t).square().sum(1).mean()
    slopes = [*torch.autograd.grad(of_weight, w), *torch.autograd.grad(of_bias, b)]
    assert all(float(slope.abs().max()) < 1e-4 for slope in slopes)


def test_differences_are_picture_by_picture_and_over_seeds_first() -> None:
    one = {"a": torch.tensor([True, True, False, True]), "b": torch.tensor([True, False])}
    other = {"a": torch.tensor([True, False, False, False]), "b": torch.tensor([True, True])}
    mean, error = compare.difference([(one, other)])
    assert mean == pytest.approx((0.5 - 0.5) / 2)
    assert error == pytest.approx(((1 / 3) / 4 + 0.5 / 2) ** 0.5 / 2)
    assert compare.difference([(one, other), (other, one)]) == (0.0, 0.0)


def test_a_report_has_a_line_for_every_row(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    key = {"zoo": "z", "tasks": ["a"], "samples": 64, "seconds": 3.0}
    marks = {("calibrated", 0): "1100", ("calibrated", 1): "1000", ("mean", 0): "1000", ("mean", 1): "1010"}
    lines = [
        json.dumps({**key, "row": row, "steps": 0, "seed": seed, "right": {"a": m}}) for (row, seed), m in marks.items()
    ]
    log.write_text("\n".join(lines))
    report = compare.report(log)
    assert "z: a, 64 images a task" in report
    assert "| calibrated | 0.375 (0.375) |  |  | 2 | 3 |" in report
    assert "| mean | 0.375 (0.375) | +0.0000 ± 0.2041 | -0.2500 to +0.2500 | 2 | 3 |" in report


def test_featcal_is_the_same_where_the_tower_is(tower: nn.Module) -> None:
    base = weights_of(tower)
    models, shown = [changed(base, seed) for seed in (1, 2)], [pictures(1), pictures(2)]
    there = copy.deepcopy(tower)
    featcal(tower, base, models, shown)
    with StandIn():
        featcal(there.to(DEVICE), base, models, shown)
        there.to("cpu")
    for name, value in parameters_of(tower, CLIP).items():
        assert torch.allclose(weights_of(there).tensor(name), value, atol=1e-4), name


def test_both_are_timed_from_the_same_start(tower: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    base = weights_of(tower)
    seen: dict[str, list[tuple[StateDict, int]]] = {"calibrate": [], "featcal": []}

    def watched(name: str) -> Callable[..., object]:
        run = getattr(speed, name)

        def noted(merge: nn.Module, *others: Any, **more: Any) -> object:
            images = others[1][0].images if name == "calibrate" else others[2][0]
            seen[name].append((weights_of(merge), len(images)))
            return run(merge, *others, **more)

        return noted

    for name in seen:
        monkeypatch.setattr(speed, name, watched(name))
    found = speed.seconds(tower, [changed(base, seed) for seed in (1, 2)], [pictures(1), pictures(2)])
    assert list(found) == ["float32", "bfloat16", "FeatCal"] and all(taken > 0 for taken in found.values())
    assert [len(seen[name]) for name in ("calibrate", "featcal")] == [4, 2]
    for runs in seen.values():
        assert [batches for _, batches in runs[:2]] == [1, 2]  # once to warm up
        assert all(torch.equal(start.tensor(name), base.tensor(name)) for start, _ in runs for name in base.shapes)
