"""The loop: what it minimises, what it keeps, and that it goes on where it was stopped."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from helpers.towers import images, never, tuned_tower
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import NumericalError
from hf_epimer.models.classifier import ZeroShotHead
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of
from hf_epimer.numerics.lowrank import low_rank
from hf_epimer.pipeline.refinement import training
from hf_epimer.pipeline.refinement.pictures import read_pictures
from hf_epimer.pipeline.refinement.training import RefinementTask, refine
from hf_epimer.pipeline.report import RefinementReport


def embed(features: Tensor) -> Tensor:
    return normalize(features, dim=-1)


def head(width: int = 16, classes: int = 5) -> ZeroShotHead:
    """One that embeds like that."""
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return ZeroShotHead(torch.eye(width), rows, torch.tensor(2.0))


def task_of(tower: nn.Module, seed: int, weight: float = 0.5, **options: Any) -> RefinementTask:
    weights = {name: value.detach().clone() for name, value in parameters_of(tower, CLIP).items()}
    tuned = StateDict(f"task {seed}", weights)
    return RefinementTask(f"task {seed}", tuned, weight, images(seed, **options), images(seed + 100, 20), head())


def refined(
    start: nn.Module, tasks: list[RefinementTask], folder: Path, **options: Any
) -> tuple[nn.Module, RefinementReport]:
    tower = copy.deepcopy(start)
    folder.mkdir(exist_ok=True)
    return tower, refine(tower, tasks, CLIP, folder, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(other.get_parameter(name), value) for name, value in one.named_parameters())


def tower_blocks(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name.split("layers.")[1].split(".")[0] for name in parameters if "layers." in name}


def test_matrices_of_the_blocks_have_one_optimiser_and_all_else_another(clip_base: Path) -> None:
    tower = tuned_tower(clip_base, 1)
    parameters = parameters_of(tower, CLIP)
    other = StateDict("tuned", {name: value.detach() + 2.0 for name, value in parameters.items()})
    task = RefinementTask("a", other, 1.0, [], [], head())
    muon, adamw = training._optimizers(parameters, [task], CLIP, {})
    groups = [[group["params"][0] for group in each.param_groups] for each in (muon, adamw)]
    assert all(weight.ndim == 2 for weight in groups[0]) and len(groups[0]) == 6 * len(tower_blocks(parameters))
    assert {id(value) for part in groups for value in part} == {id(value) for value in parameters.values()}
    assert all(group["lr"] == pytest.approx(2 * training.RATE) for group in muon.param_groups + adamw.param_groups)


def test_features_come_nearer_to_those_of_every_model(clip_base: Path, tmp_path: Path) -> None:
    """On images that nobody was trained on, by a measure of its own."""
    start, towers = load_tower(clip_base), [tuned_tower(clip_base, seed) for seed in (1, 2)]
    tasks = [task_of(tower, seed, count=200) for seed, tower in enumerate(towers, 1)]
    found, report = refined(start, tasks, tmp_path / "w", steps=40)
    assert report.steps == 40 and report.best_step > 0 and report.images == {"task 1": 200, "task 2": 200}
    assert not found.training and start.training is False
    for seed, tower in enumerate(towers, 1):
        held_out = torch.cat([batch.inputs for batch in images(seed + 100, 20)])
        unseen = torch.cat([batch.inputs for batch in images(seed + 10)])
        with torch.no_grad():
            held, before, after = (
                [
                    1 - (embed(CLIP.features(own, x)) * embed(CLIP.features(tower, x))).sum(1).mean()
                    for own in (start, found)
                ]
                for x in (held_out, unseen, unseen)
            )
        label = f"task {seed}"
        assert [report.before[label] / 2, report.after[label] / 2] == pytest.approx([float(x) for x in held], rel=1e-3)
        assert float(before[1]) < 0.8 * float(before[0]) and after == before


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 0.03)])
def test_a_step_is_that_of_the_objective(half: bool, tolerance: float, clip_base: Path, tmp_path: Path) -> None:
    """The gradient of the loop against autograd on the formula, with unlike weights."""
    start, towers = load_tower(clip_base), [tuned_tower(clip_base, seed) for seed in (1, 2)]
    tasks = [task_of(tower, seed, weight) for seed, tower, weight in zip((1, 2), towers, (0.3, 0.7))]
    seen = {}

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.update({number: value.grad.clone() for number, value in enumerate(self.param_groups[0]["params"])})

    def watched(parameters: dict[str, nn.Parameter], *others: Any) -> list[torch.optim.Optimizer]:
        return [Watched([{"params": list(parameters.values()), "initial_lr": 1.0}], lr=1.0)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_optimizers", watched)
        patch.setattr(training, "has_bfloat16", lambda device: half)
        refined(start, tasks, tmp_path / "w", steps=1, seed=5)
    total = torch.zeros(())
    for number, task in enumerate(tasks):
        pictures = read_pictures(tmp_path / "w" / f"pictures-{number}.safetensors")
        pixels, goals = pictures.batch(0, training.PICTURES, 5, (0, 1))
        total = total + task.weight * (embed(CLIP.features(start, pixels)) - goals).square().sum(1).mean()
    wanted = torch.cat(
        [grad.flatten() for grad in torch.autograd.grad(total, list(parameters_of(start, CLIP).values()))]
    )
    found = torch.cat([gradient.flatten() for gradient in seen.values()])
    assert float((found - wanted).norm()) < tolerance * float(wanted.norm())


def test_a_model_refined_on_itself_stays_as_it_is(clip_base: Path, tmp_path: Path) -> None:
    tower = tuned_tower(clip_base, 1)
    found, report = refined(tower, [task_of(tower, 1, 1.0)], tmp_path / "w", steps=4)
    assert report.best_step == 0 and same(found, tower)


def test_the_seed_decides_and_nothing_else(clip_base: Path, tmp_path: Path) -> None:
    start, task = load_tower(clip_base), task_of(tuned_tower(clip_base, 1), 1, 1.0)
    one, _ = refined(start, [task], tmp_path / "a", steps=5, seed=1)
    torch.manual_seed(7)
    again, _ = refined(start, [task], tmp_path / "b", steps=5, seed=1)
    other, _ = refined(start, [task], tmp_path / "c", steps=5, seed=2)
    assert same(one, again) and not same(one, other)


def test_the_best_weights_are_kept_not_the_last(
    clip_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tuned_tower(clip_base, 1)
    task = task_of(start, 1, 1.0)
    for value in start.parameters():
        value.data *= 1.001
    monkeypatch.setattr(training, "RATE", 30.0)
    found, report = refined(start, [task], tmp_path / "w", steps=6)
    assert report.best_step == 0 and report.after == report.before and same(found, start)


def test_a_loss_that_is_not_finite_is_an_error(
    clip_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "RATE", 1e30)
    with pytest.raises(NumericalError, match="the loss is not finite after 1 steps"):
        refined(load_tower(clip_base), [task_of(tuned_tower(clip_base, 1), 1, 1.0)], tmp_path / "w", steps=6)


def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bits(clip_base: Path, tmp_path: Path) -> None:
    start, towers = load_tower(clip_base), [tuned_tower(clip_base, seed) for seed in (1, 2)]
    tasks = [task_of(tower, seed) for seed, tower in enumerate(towers, 1)]
    whole, report = refined(start, tasks, tmp_path / "whole", steps=20)
    for steps in (1, 2, 5, 19):
        folder, counted = tmp_path / f"stopped {steps}", 0

        def stop(done: int, total: int, steps: int = steps) -> None:
            nonlocal counted
            counted += done
            if counted == steps:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            refined(start, tasks, folder, steps=20, on_step=stop)
        unread = [replace(task, images=never(), held_out=never()) for task in tasks]
        on_step = Mock()
        again, found = refined(start, unread, folder, steps=20, on_step=on_step)
        assert on_step.call_args_list[0].args == (steps - steps % 2, 20)
        assert replace(found, seconds=0) == replace(report, seconds=0) and same(again, whole)


def test_an_adapter_that_was_stopped_goes_on_to_the_same_bits(clip_base: Path, tmp_path: Path) -> None:
    start, task = load_tower(clip_base), task_of(tuned_tower(clip_base, 1), 1, 1.0)
    parameters = parameters_of(start, CLIP)
    name = next(name for name in parameters if name.endswith("q_proj.weight"))
    bias = name.replace("weight", "bias")
    generator = torch.Generator().manual_seed(0)
    b, a = (0.1 * torch.randn(s, generator=generator) for s in ((16, 2), (2, 16)))
    before = {key: value.detach().clone() for key, value in parameters.items()}
    start.get_parameter(next(k for k, v in start.named_parameters() if v is parameters[name])).data += b @ a
    updates = {name: low_rank(b, a), bias: torch.zeros(16)}
    whole, report = refined(start, [task], tmp_path / "whole", steps=10, updates=updates)

    def stop(done: int, total: int) -> None:
        if (tmp_path / "stopped" / "state.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refined(start, [task], tmp_path / "stopped", steps=10, updates=updates, on_step=stop)
    again, found = refined(start, [task], tmp_path / "stopped", steps=10, updates=updates)
    assert replace(found, seconds=0) == replace(report, seconds=0) and same(again, whole) and report.best_step
    after = parameters_of(whole, CLIP)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {name, bias}
    assert float(torch.linalg.svdvals(after[name].detach() - before[name])[2]) < 1e-5
