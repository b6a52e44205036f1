"""Calibration: its passes against plain forward passes, its limits, and that it goes on where it was stopped."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.clip import inside
from helpers.towers import images, never, tuned_tower
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import DataError
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.pipeline.calibration.step import calibrate
from hf_epimer.pipeline.views import crops
from hf_epimer.tasks.images import Batch

POSITIONS = 5
LAYERS = [f"encoder.layers.{i}.{name}" for i in range(2) for residual in CLIP.residuals for name in residual.layers]


def parameters(tower: nn.Module) -> dict[str, Tensor]:
    return {f"vision_model.{name}": value.detach().clone() for name, value in tower.named_parameters()}


def curvature(tower: nn.Module, seed: int, heard: Tensor | None = None) -> StateDict:
    found = {}
    for number, name in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed + number)
        profile = torch.rand(POSITIONS, generator=generator) if heard is None else heard
        found[f"vision_model.{name}.weight.positions"] = profile
    return StateDict("curvature", found)


def task_of(tower: nn.Module, seed: int, weight: float = 1.0, **options: Any) -> CalibrationTask:
    heard = options.pop("heard", None)
    own = StateDict(f"task {seed}", parameters(tower))
    return CalibrationTask(own, weight, curvature(tower, seed, heard), images(seed, **options))


def calibrated(
    start: nn.Module, tasks: list[CalibrationTask], folder: Path, **options: Any
) -> tuple[nn.Module, dict[str, float]]:
    """By default without a prior, whose limits are those of the regression alone."""
    tower = copy.deepcopy(start)
    base = options.pop("base", StateDict("base", parameters(start)))
    total = sum(task.weight for task in tasks)
    tasks = [replace(task, weight=task.weight / total) for task in tasks]
    return tower, calibrate(tower, base, tasks, CLIP, folder, **{"prior_weight": 0.0, **options})


@torch.no_grad()
def difference(one: nn.Module, two: nn.Module, start: nn.Module) -> float:
    """Largest, of the linear weights, relative to what calibration changed."""
    return max(
        float((one.get_submodule(n).weight - two.get_submodule(n).weight).norm())  # type: ignore[operator]
        / float((one.get_submodule(n).weight - start.get_submodule(n).weight).norm())  # type: ignore[operator]
        for n in LAYERS
    )


def test_a_model_calibrated_on_itself_stays_as_it_is(clip_base: Path, tmp_path: Path) -> None:
    tower = tuned_tower(clip_base, 1)
    found, report = calibrated(tower, [task_of(tower, 1), task_of(tower, 2)], tmp_path / "w")
    for name, value in tower.named_parameters():
        assert torch.allclose(found.get_parameter(name), value, atol=3e-6), name
    assert len(report) == len(LAYERS) and all(size < 1e-5 for size in report.values())


@pytest.mark.parametrize("unbiased", [(), ("q_proj", "k_proj"), ("fc2",)], ids=str)
def test_one_task_without_a_pull_gets_its_own_features_back(
    unbiased: tuple[str, ...], clip_base: Path, tmp_path: Path
) -> None:
    """With T = 1 the base can be brought to give what the tuned model gives, on the very same images."""
    start, tuned = inside(load_tower(clip_base)), tuned_tower(clip_base, 1)
    for name, layer in [*start.named_modules(), *tuned.named_modules()]:
        if name.endswith(unbiased):
            layer.bias = None
    for own in (tuned, start):  # all that calibration does not touch is equal here
        own.load_state_dict(
            {k: v for k, v in inside(load_tower(clip_base)).state_dict().items() if "proj" not in k}, False
        )
    task = task_of(tuned, 1, count=200)
    found, _ = calibrated(start, [task], tmp_path / "w", rho=1e-4)
    pixels = torch.cat([batch.inputs for batch in task.images])
    with torch.no_grad():
        wanted, before, after = (own(pixel_values=pixels).pooler_output for own in (tuned, start, found))
    assert float((after - wanted).norm()) < 0.02 * float((before - wanted).norm())
    names = [name for name, _ in found.named_parameters()]
    assert not any(name.endswith(f"{layer}.bias") for layer in unbiased for name in names)


def test_a_strong_pull_leaves_the_merge_as_it_is(clip_base: Path, tmp_path: Path) -> None:
    start, tuned = inside(load_tower(clip_base)), tuned_tower(clip_base, 1)
    held, _ = calibrated(start, [task_of(tuned, 1)], tmp_path / "a", rho=1e8)
    free, _ = calibrated(start, [task_of(tuned, 1)], tmp_path / "b")
    name = "encoder.layers.1.mlp.fc2.weight"
    assert torch.allclose(held.get_parameter(name), start.get_parameter(name), atol=1e-6)
    assert not torch.allclose(free.get_parameter(name), start.get_parameter(name), atol=1e-3)


def test_the_order_of_tasks_and_the_batches_do_not_matter(clip_base: Path, tmp_path: Path) -> None:
    start = inside(load_tower(clip_base))
    towers = {seed: tuned_tower(clip_base, seed) for seed in (1, 2, 3)}
    weights = {1: 0.5, 2: 0.3, 3: 0.2}
    base = StateDict("base", parameters(inside(load_tower(clip_base))))
    options: dict[str, Any] = {"base": base, "prior_weight": 1.0}
    forward, _ = calibrated(start, [task_of(towers[s], s, weights[s]) for s in (1, 2, 3)], tmp_path / "a", **options)
    tasks = [task_of(towers[s], s, weights[s], batch=7) for s in (3, 1, 2)]
    other, _ = calibrated(start, tasks, tmp_path / "b", **options)
    assert difference(forward, other, start) < 1e-3
    equal, _ = calibrated(start, [task_of(towers[s], s) for s in (1, 2, 3)], tmp_path / "c", **options)
    assert difference(forward, equal, start) > 0.05


def test_the_first_layers_are_the_regressions_that_they_claim_to_be(clip_base: Path, tmp_path: Path) -> None:
    """Queries of the first block, and its output projection with the stream's own error, from plain forward passes."""
    start, tuned = inside(load_tower(clip_base)), [tuned_tower(clip_base, seed) for seed in (1, 2)]
    base = inside(load_tower(clip_base))
    tasks = [task_of(tower, seed) for seed, tower in enumerate(tuned, 1)]
    found, _ = calibrated(start, tasks, tmp_path / "w", rho=0.1, prior_weight=0.7)
    half = copy.deepcopy(start)  # as the tower is when the output projection is solved
    reads = ("q_proj", "k_proj", "v_proj")
    for name in reads:
        source = found.get_submodule(f"encoder.layers.0.self_attn.{name}")
        half.get_submodule(f"encoder.layers.0.self_attn.{name}").load_state_dict(source.state_dict())
    for layer, tower in (("self_attn.q_proj", start), ("self_attn.out_proj", half)):
        name = f"encoder.layers.0.{layer}"
        before: Any = start.get_submodule(name)
        grams, crosses = [], []
        for own, task in zip(tuned, tasks, strict=True):
            pixels = torch.cat([batch.inputs for batch in task.images])
            here, there = seen(tower, name, pixels), seen(own, name, pixels)
            off = there["out"] - here["out"]
            siblings = [name]
            if layer.endswith("out_proj"):
                off = off + there["stream"] - here["stream"]
            else:
                siblings = [f"encoder.layers.0.self_attn.{sibling}" for sibling in reads]
            profiles = [task.curvature.tensor(f"vision_model.{n}.weight.positions") for n in siblings]
            heard = torch.stack([profile / profile.mean() for profile in profiles]).mean(0)
            scale = heard.repeat(len(pixels)).double()
            x = torch.cat([here["in"], torch.ones(*here["in"].shape[:2], 1)], dim=2).flatten(0, 1).double()
            gram_, cross = (x * scale[:, None]).mT @ x, off.flatten(0, 1).double().mT @ (x * scale[:, None])
            gain = 0.5 / float(gram_.diagonal().mean())
            goal: Any = own.get_submodule(name)
            origin: Any = base.get_submodule(name)
            vector, gap = (goal.weight - origin.weight).double(), (goal.weight - before.weight).double()
            known = vector.mT @ vector / (vector.mT @ vector).diagonal().mean()
            gram_, cross = gain * gram_, gain * cross
            gram_[:-1, :-1] += 0.5 * 0.7 * known
            cross[:, :-1] += 0.5 * 0.7 * gap @ known
            grams.append(gram_)
            crosses.append(cross)
        total = sum(grams) + 0.1 * torch.eye(len(grams[0])).double()
        step = torch.linalg.solve(total, sum(crosses).mT).mT.detach()  # type: ignore[union-attr]
        linear: Any = found.get_submodule(name)
        changed = torch.cat([linear.weight - before.weight, (linear.bias - before.bias)[:, None]], 1).detach()
        assert float((changed - step).norm() / step.norm()) < 1e-3, layer


@torch.no_grad()
def seen(tower: nn.Module, name: str, pixels: Tensor) -> dict[str, Tensor]:
    """Input and output of a layer, and the stream before the first block."""
    found: dict[str, Tensor] = {}
    layer = tower.get_submodule(name)
    hooks = [
        layer.register_forward_hook(lambda m, inputs, output: found.update({"in": inputs[0], "out": output})),
        tower.get_submodule("encoder.layers.0.layer_norm1").register_forward_pre_hook(
            lambda m, inputs: found.update(stream=inputs[0])
        ),
    ]
    tower(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return found


def test_views_are_images_more(clip_base: Path, tmp_path: Path) -> None:
    """Two views of every image are the images and their crops, each seen once."""
    start, tuned = inside(load_tower(clip_base)), tuned_tower(clip_base, 1)
    task = task_of(tuned, 1)
    twice, _ = calibrated(start, [task], tmp_path / "a", views=2)
    more = [Batch(crops(batch.inputs, batch.indices, 1), batch.labels, batch.indices) for batch in task.images]
    listed = replace(task, images=[*task.images, *more])
    explicit, _ = calibrated(start, [listed], tmp_path / "b", views=1)
    assert difference(twice, explicit, start) < 0.01
    once, _ = calibrated(start, [task], tmp_path / "c", views=1)
    assert difference(twice, once, start) > 0.05


def test_half_precision_is_for_the_passes_only(clip_base: Path, tmp_path: Path) -> None:
    start = load_tower(clip_base)
    tasks = [task_of(tuned_tower(clip_base, seed), seed) for seed in (1, 2)]
    full, _ = calibrated(start, tasks, tmp_path / "a")
    half, _ = calibrated(start, tasks, tmp_path / "b", precision="bf16")
    assert 1e-5 < difference(half, full, start) < 0.05
    assert all(value.dtype == torch.float32 for value in half.parameters())


def test_positions_that_nobody_hears_do_not_count(clip_base: Path, tmp_path: Path) -> None:
    start, tuned = inside(load_tower(clip_base)), tuned_tower(clip_base, 1)
    first = torch.zeros(POSITIONS)
    first[0] = 1.0
    found, _ = calibrated(start, [task_of(tuned, 1, heard=first, count=64)], tmp_path / "a", views=1, rho=1e-3)
    pixels = torch.cat([batch.inputs for batch in images(1, count=64)])
    errors = [seen(own, "encoder.layers.0.self_attn.q_proj", pixels)["out"] for own in (found, tuned, start)]
    after, before = ((errors[i] - errors[1]).square().sum((0, 2)) for i in (0, 2))
    assert float(after[0]) < 1e-4 * float(before[0]) and float(after[1:].sum()) > 0.1 * float(before[1:].sum())


def test_a_task_without_images_is_an_error(clip_base: Path, tmp_path: Path) -> None:
    tower = tuned_tower(clip_base, 1)
    task = task_of(tower, 1)
    with pytest.raises(DataError, match="there are no images to calibrate on"):
        calibrated(tower, [replace(task, images=[])], tmp_path / "w")


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bits(
    in_memory: bool, clip_base: Path, tmp_path: Path
) -> None:
    """Those of a run with files, which goes on without reading an image again."""
    start, towers = inside(load_tower(clip_base)), [tuned_tower(clip_base, seed) for seed in (1, 2)]
    tasks = [task_of(tower, seed) for seed, tower in enumerate(towers, 1)]
    whole, sizes = calibrated(start, tasks, tmp_path / "whole", prior_weight=1.0)

    def stopped_after(steps: int) -> tuple[nn.Module, dict[str, float]]:
        folder, counted = tmp_path / f"stopped {steps}", 0
        folder.mkdir()

        def stop(done: int, total: int) -> None:
            nonlocal counted
            counted += done
            if counted == steps:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrated(start, tasks, folder, prior_weight=1.0, in_memory=in_memory, on_step=stop)
        begun = sorted(path.name for path in folder.glob("block-*"))
        assert len(begun) == (steps - 1) // 4
        assert in_memory or (folder / "0" / "merged-0").exists()
        assert not in_memory or sorted(path.name for path in folder.iterdir()) == begun
        seen = tasks if in_memory else [replace(task, images=never()) for task in tasks]
        return calibrated(start, seen, folder, prior_weight=1.0, in_memory=in_memory)

    for steps in (1, 2, 3, 4, 5, 8):
        again, found = stopped_after(steps)
        assert found == sizes
        assert all(torch.equal(again.get_parameter(name), value) for name, value in whole.named_parameters()), steps
