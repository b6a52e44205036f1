"""Refinement: its objective and pictures against plain computations, the loop, and the command."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from helpers.adapters import make
from helpers.command import Run, fails
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import DataError, NumericalError
from hf_epimer.models.classifier import LinearHead, ZeroShotHead
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of
from hf_epimer.numerics.lowrank import low_rank
from hf_epimer.pipeline.calibration import layers as calibration_layers
from hf_epimer.pipeline.refinement import layers as refinement_layers
from hf_epimer.pipeline.refinement import training
from hf_epimer.pipeline.refinement.muon import FactoredMuon, Muon, nearly_polar
from hf_epimer.pipeline.refinement.objective import loss, squared_distances
from hf_epimer.pipeline.refinement.pictures import Pictures, read_pictures, write_pictures
from hf_epimer.pipeline.refinement.training import RefinementTask, refine
from hf_epimer.pipeline.report import RefinementReport
from hf_epimer.pipeline.views import crops
from hf_epimer.tasks.images import Batch


def test_the_loss_is_the_weighted_sum_of_the_distances() -> None:
    assert loss([0.2, 0.8], [3.0, 0.5]) == pytest.approx(1.0)


def test_a_distance_is_twice_what_the_cosine_lacks() -> None:
    one, other = (normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    assert torch.allclose(squared_distances(one, other), 2 - 2 * (one * other).sum(1), atol=1e-6)


def test_a_head_reads_what_it_embeds() -> None:
    features, projection, rows = (torch.randn(*s, dtype=torch.float64) for s in ((4, 6), (5, 6), (3, 5)))
    zero_shot = ZeroShotHead(projection, rows, torch.tensor(1.0))
    embedded = zero_shot.embed(features)
    assert torch.allclose(embedded, normalize(features @ projection.T, dim=1))
    assert torch.allclose(zero_shot(features), torch.tensor(1.0).exp() * embedded @ normalize(rows, dim=1).T)
    linear = LinearHead(torch.randn(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(linear.embed(features), features)


# --- pictures -------------------------------------------------------------------------------------------------------


def images(seed: int, count: int = 40, batch: int = 16) -> list[Batch]:
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).half().float()
    indices = list(range(count))
    return [
        Batch(part, torch.zeros(len(part), dtype=torch.long), indices[start : start + batch])
        for start, part in zip(range(0, count, batch), pixels.split(batch), strict=True)
    ]


def numbered(count: int, views: int, held_out: int = 2) -> Pictures:
    """Picture i is full of i, those that are held out come last; target v, i is (v, i)."""
    pixels = torch.arange(count + held_out).half().view(-1, 1, 1, 1).expand(count + held_out, 3, 4, 4)
    targets = torch.tensor([[[float(v), float(i)] for i in range(count + held_out)] for v in range(views)])
    return Pictures(pixels[:count], targets[:, :count], pixels[count:], targets[:1, count:])


def test_every_picture_has_its_turn_and_every_view_of_it() -> None:
    pictures = numbered(21, views=3)
    seen = [pictures.batch(step, 7, seed=0, share=(0, 1)) for step in range(3 * 3)]
    for turn in range(3):
        pixels, targets = (torch.cat(parts) for parts in zip(*seen[3 * turn : 3 * turn + 3]))
        assert sorted(targets[:, 1].tolist()) == list(range(21))
        assert torch.allclose(pixels[:, 0, 0, 0], targets[:, 1], atol=1e-5)
        assert {int(view) for view in targets[:, 0]} == {0, 1, 2}
    pairs = {tuple(row.tolist()) for _, targets in seen for row in targets}
    assert len(pairs) == 3 * 21
    other = pictures.batch(0, 7, seed=1, share=(0, 1))[1]
    assert set(other[:, 1].tolist()) != set(seen[0][1][:, 1].tolist())
    held_out = torch.cat([targets for _, targets in pictures.held_out((0, 1))])
    assert held_out.tolist() == [[0.0, 21.0], [0.0, 22.0]]


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_share_a_batch(processes: int) -> None:
    pictures = numbered(21, views=2)
    whole = pictures.batch(5, 7, seed=0, share=(0, 1))[1].tolist()
    shares = [pictures.batch(5, 7, seed=0, share=(rank, processes)) for rank in range(processes)]
    assert sorted(row for _, targets in shares for row in targets.tolist()) == sorted(whole)
    assert all(pixels.shape == (len(targets), 3, 4, 4) for pixels, targets in shares)
    held_out = [targets.tolist() for rank in range(processes) for _, targets in pictures.held_out((rank, processes))]
    assert sorted(row for part in held_out for row in part) == [[0.0, 21.0], [0.0, 22.0]]


def test_a_target_is_what_the_model_makes_of_that_very_view(tmp_path: Path) -> None:
    def embed(pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :5]

    write_pictures(tmp_path / "p", "a", images(1), images(2, 20), embed, views=3)
    pictures = read_pictures(tmp_path / "p")
    assert pictures.targets.shape == (3, 40, 5)
    for step in range(8):
        pixels, targets = pictures.batch(step, 16, seed=0, share=(0, 1))
        assert torch.allclose(embed(pixels), targets, atol=1e-6)
    whole = torch.cat([batch.inputs for batch in images(1)])
    assert torch.equal(pictures.targets[0], embed(whole))
    assert torch.allclose(pictures.targets[2], embed(crops(whole, range(40), 2)), atol=1e-6)
    held_out = torch.cat([batch.inputs for batch in images(2, 20)])
    found = [torch.cat(parts) for parts in zip(*pictures.held_out((0, 1)))]
    assert torch.equal(found[0], held_out) and torch.equal(found[1], embed(held_out))


@pytest.mark.parametrize("counts", [(0, 1), (1, 0)])
def test_too_few_images_are_an_error(counts: tuple[int, int], tmp_path: Path) -> None:
    learnt, held_out = (images(1, count) if count else [] for count in counts)
    with pytest.raises(DataError, match="a: a refinement needs at least 2 images of every task"):
        write_pictures(tmp_path / "p", "a", learnt, held_out, lambda pixels: pixels.flatten(1), 1)
    assert not list(tmp_path.iterdir())


# --- the optimiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_a_step_of_muon_is_the_polar_factor_of_the_momentum(shape: tuple[int, int]) -> None:
    """Two steps against an SVD: every direction of the momentum moves by about the rate, whatever its size."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    muon = Muon([{"params": [weight], "lr": 0.1}], torch.float32)
    momentum = torch.zeros(shape)
    for scale in (1e-6, 1e6):
        before, weight.grad = weight.detach().clone(), scale * torch.randn(shape, generator=generator)
        muon.step()
        momentum = 0.9 * momentum + 0.1 * weight.grad
        u, _, vh = torch.linalg.svd(0.9 * momentum + 0.1 * weight.grad, full_matrices=False)
        moved = u.T @ (before - weight.detach()) @ vh.T / (0.1 * max(shape) ** 0.5)
        assert torch.allclose(moved, moved.diagonal().diag(), atol=1e-3)
        assert float(moved.diagonal().min()) > 0.6 and float(moved.diagonal().max()) < 1.25


def test_a_step_without_a_gradient_is_none() -> None:
    assert torch.equal(nearly_polar(torch.zeros(3, 5)), torch.zeros(3, 5))
    weight = nn.Parameter(torch.ones(3, 5))
    Muon([{"params": [weight], "lr": 0.1}], torch.float32).step()
    assert torch.equal(weight.detach(), torch.ones(3, 5))


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


def test_a_factored_step_keeps_the_rank_and_moves_as_far_as_any() -> None:
    """dL/dB = G A^T and dL/dA = B^T G: against autograd through B A, at equal signs of every direction."""
    generator = torch.Generator().manual_seed(0)
    base, b, a, goal = (torch.randn(s, generator=generator) for s in ((6, 60), (6, 3), (3, 60), (6, 60)))
    weight = nn.Parameter(base + b @ a)
    muon = FactoredMuon([{"params": [weight], "lr": 0.01, "update": low_rank(b, a)}], torch.float32)
    factors = [muon.state[weight][name].clone().requires_grad_() for name in "ba"]
    losses = []
    for step in range(20):
        before = weight.detach().clone()
        loss = (weight - goal).square().sum()
        losses.append(float(loss.detach()))
        weight.grad = torch.autograd.grad(loss, weight)[0]
        muon.step()
        moved = weight.detach() - before
        if not step:
            assert 0.7 * 0.01 < float(moved.square().mean().sqrt()) < 1.5 * 0.01
            slopes = torch.autograd.grad((base + factors[0] @ factors[1] - goal).square().sum(), factors)
            for factor, name, slope in zip(factors, "ba", slopes):
                u, _, vh = torch.linalg.svd(slope, full_matrices=False)
                along = u.T @ (factor.detach() - muon.state[weight][name]) @ vh.T
                assert torch.allclose(along, along.diagonal().diag(), atol=1e-4) and float(along.diagonal().min()) > 0
    assert losses == sorted(losses, reverse=True)
    values = torch.linalg.svdvals(weight.detach() - base)
    assert float(values[3]) < 1e-5 < float(values[2])


def tower_blocks(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name.split("layers.")[1].split(".")[0] for name in parameters if "layers." in name}


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, whatever this machine is fast at."""
    monkeypatch.setattr(training, "has_bfloat16", lambda device: False)


def tuned_tower(base: Path, seed: int) -> nn.Module:
    tower = load_tower(base)
    generator = torch.Generator().manual_seed(seed)
    for value in tower.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return tower


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


def never() -> Iterator[Batch]:
    raise AssertionError("the images of an interrupted run are read a second time")
    yield


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(clip_zoo: Path, own_home: Path) -> tuple[object, ...]:
    tasks = ("--task", clip_zoo / "a.json", clip_zoo / "b.json")
    models = (f"a={clip_zoo / 'a'}", f"b={clip_zoo / 'b'}", "--base", clip_zoo / "base")
    return ("merge", *models, *tasks, "--method", "mean", "--samples", 40, "--refine", "--refine-steps", 30)


def test_refine_from_the_command(words: tuple[object, ...], run: Run, tmp_path: Path, own_home: Path) -> None:
    code, out, err = run(*words, "--out", "m")
    assert code == 0, err
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    refinement = report["totals"]["refinement"]
    assert refinement["steps"] == 30 and refinement["best_step"] > 0 and refinement["images"] == {"a": 36, "b": 36}
    assert sum(refinement["after"].values()) < sum(refinement["before"].values())
    assert f"trained for {refinement['best_step']} steps" in out and "distance to the features of each model: a " in out
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"trained for {refinement['best_step']} steps on up to 36 unlabelled images of each task" in card
    assert "without training" not in card and "then trained without labels" in card
    assert not list((own_home / "refinement").iterdir())
    config = json.loads((tmp_path / "m" / "merge_config.json").read_text())
    assert config["refine"] is True and config["refine_steps"] == 30
    assert run("merge", "--config", "m/merge_config.json", "--out", "n")[0] == 0
    assert run(*words[:-3], "--out", "p")[0] == 0
    m, n, p = (tmp_path / name / "model.safetensors" for name in "mnp")
    assert m.read_bytes() == n.read_bytes() != p.read_bytes()
    assert "without training" in (tmp_path / "p" / "README.md").read_text()
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    merged, base = load_file(m)[name], parameters_of(load_tower(words[4]), CLIP)[name].detach()  # type: ignore[arg-type]
    layer = next(layer for layer in report["layers"] if layer["name"] == name)
    assert layer["merged_norm"] == pytest.approx(float((merged - base).norm()), rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_merged_adapters_are_refined_within_their_ranks(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    shutil.copytree(clip_zoo / "base", tmp_path / "base")
    for seed, name in enumerate("ab", start=1):
        make(tmp_path / "base", name, seed)
    models = (f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--base", tmp_path / "base")
    adapters = ("merge", *models, *words[5:])
    code, _, err = run(*adapters, "--out", "m")
    assert code == 0, err
    totals = json.loads((tmp_path / "m" / "merge_report.json").read_text())["totals"]
    refinement = totals["refinement"]
    assert refinement["best_step"] > 0
    assert sum(refinement["after"].values()) < sum(refinement["before"].values())
    assert "then trained without labels" in (tmp_path / "m" / "README.md").read_text()
    assert run(*adapters[:-3], "--out", "p")[0] == 0
    m, p = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "mp")
    assert {name: value.shape for name, value in m.items()} == {name: value.shape for name, value in p.items()}
    assert not any(torch.equal(value, p[name]) for name, value in m.items() if "lora_" in name)


def test_a_calibrated_merge_is_refined_and_a_plan_says_so(words: tuple[object, ...], run: Run, tmp_path: Path) -> None:
    code, out, err = run(*words, "--calibrate", "--out", "m", "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert len(plan["refine_on"]) == 2 and "40 samples" in plan["refine_on"][0] and plan["refine_steps"] == 30
    assert plan["refinement_bytes"] > 2 * 80 * 3 * 8 * 8
    assert plan["expected_seconds"].keys() == {"calibration", "refinement"}
    assert "refinement: less than a minute" in run(*words, "--out", "m", "--dry-run")[1]
    code, out, err = run(*words, "--calibrate", "--out", "m")
    assert code == 0, err
    assert "calibrated layers: 12" in out and "refined: trained" in out


def test_nothing_is_fitted_to_what_a_refinement_is_judged_by(
    words: tuple[object, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate, refine = Mock(wraps=calibration_layers.calibrate), Mock(wraps=refinement_layers.refine)
    monkeypatch.setattr(calibration_layers, "calibrate", calibrate)
    monkeypatch.setattr(refinement_layers, "refine", refine)
    code, _, err = run(*words, "--calibrate", "--refine-steps", 1, "--out", "m")
    assert code == 0, err
    for calibrated, refined in zip(calibrate.call_args.args[2], refine.call_args.args[1], strict=True):
        learnt, held_out = (part.only for part in (refined.images, refined.held_out))
        assert calibrated.images.only == learnt == range(36) and held_out == range(36, 40)
    assert run(*words[:-3], "--calibrate", "--out", "n")[0] == 0
    assert calibrate.call_args.args[2][0].images.only == range(40)


def test_a_refinement_that_gains_nothing_is_left_out_with_a_word(
    words: tuple[object, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "RATE", 0.3)
    code, _, err = run(*words, "--out", "m")
    assert code == 0 and "no nearer to its models" in err
    assert run(*words[:-3], "--out", "p")[0] == 0
    m, p = (load_file(tmp_path / name / "model.safetensors") for name in "mp")
    assert all(torch.equal(m[name], value) for name, value in p.items())


@pytest.mark.parametrize("steps", [0, -1, 1_000_001])
def test_steps_out_of_range_are_wrong_usage(steps: int, words: tuple[object, ...], run: Run) -> None:
    fails(run(*words[:-1], steps, "--out", "m"), "--refine-steps must be", 2)


def test_what_refinement_cannot_do_is_said_before_any_work(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = ("merge", clip_zoo / "a", clip_zoo / "b", "--base", clip_zoo / "base", "--method", "mean", "--refine")
    fails(run(*nameless, "--out", "m"), "to refine, its task must be known", 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    fails(run(*words, "--out", "m"), "refinement needs .* GB for pictures and weights in .* GB are free")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does(words: tuple[object, ...], tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    found = {}
    (tmp_path / "in_float32.py").write_text(
        "from hf_epimer.cli.main import console\n"
        "from hf_epimer.pipeline.refinement import training\n"
        "training.has_bfloat16 = lambda device: False\n"
        "console()\n"
    )
    for steps, count in ((1, 1), (8, 1), (8, 2)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "in_float32.py"]
        launched = [*launcher, *map(str, words[:-1]), str(steps), "--out", f"m{steps}{count}"]
        done = subprocess.run(launched, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found[steps, count] = load_file(tmp_path / f"m{steps}{count}" / "model.safetensors")
        assert not list((tmp_path / "home" / "hf-epimer" / "refinement").iterdir())
    start, one, two = (torch.cat([value.flatten() for value in weights.values()]) for weights in found.values())
    assert float((two - one).norm()) < 0.01 * float((one - start).norm())
