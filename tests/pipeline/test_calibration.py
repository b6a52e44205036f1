"""Calibration: its regression against a dense reference, its passes against plain forward passes, and the command."""

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

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.clip import inside
from helpers.command import Run
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import DataError
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.transfer import SHARE, has_room
from hf_epimer.numerics.regression import anchored_step, prior
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.pipeline.calibration.step import calibrate
from hf_epimer.pipeline.views import SMALLEST, crops
from hf_epimer.tasks.images import Batch

POSITIONS = 5
LAYERS = [f"encoder.layers.{i}.{name}" for i in range(2) for residual in CLIP.residuals for name in residual.layers]


def test_the_step_is_where_the_error_is_smallest() -> None:
    """Against the dense solution, and against the loss itself by autograd."""
    generator = torch.Generator().manual_seed(0)
    m, n, rho = 4, 6, 0.3
    x, y, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((30, n), (30, m), (m, n)))
    step = anchored_step(x.mT @ x, y.mT @ x - weight @ (x.mT @ x), rho)
    step.requires_grad_(True)
    loss = (y - x @ (weight + step).mT).square().sum() + rho * step.square().sum()
    (gradient,) = torch.autograd.grad(loss, step)
    assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("outputs", [4, 2], ids=["one product", "two thin ones"])
def test_the_prior_is_what_inputs_along_the_task_vector_would_add(outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vector, gap = (torch.randn(outputs, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    gram_, cross = prior(vector, gap)
    assert float(gram_.diagonal().mean()) == pytest.approx(1.0)
    assert torch.allclose(cross, gap @ gram_)
    assert torch.allclose(gram_ / gram_[0, 0], (vector.mT @ vector) / (vector.mT @ vector)[0, 0])
    still = prior(torch.zeros(outputs, 6), gap.float())
    assert not bool(still[0].any()) and not bool(still[1].any())


# --- towers ---------------------------------------------------------------------------------------------------------


def parameters(tower: nn.Module) -> dict[str, Tensor]:
    return {f"vision_model.{name}": value.detach().clone() for name, value in tower.named_parameters()}


def tuned_tower(base: Path, seed: int) -> nn.Module:
    tower = inside(load_tower(base))
    generator = torch.Generator().manual_seed(seed)
    for value in tower.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return tower


def curvature(tower: nn.Module, seed: int, heard: Tensor | None = None) -> StateDict:
    found = {}
    for number, name in enumerate(LAYERS):
        generator = torch.Generator().manual_seed(seed + number)
        profile = torch.rand(POSITIONS, generator=generator) if heard is None else heard
        found[f"vision_model.{name}.weight.positions"] = profile
    return StateDict("curvature", found)


def images(seed: int, count: int = 48, batch: int = 16) -> list[Batch]:
    pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    positions = list(range(count))
    return [
        Batch(part, torch.zeros(len(part), dtype=torch.long), positions[start : start + batch])
        for start, part in zip(range(0, count, batch), pixels.split(batch), strict=True)
    ]


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


def test_crops_are_parts_of_their_pictures() -> None:
    """Of a picture whose value is its own coordinate: a crop is a straight ramp, inside, with a side of its own."""
    ramp = (torch.arange(40.0) + 0.5) / 40
    pixels = torch.stack([ramp.expand(40, 40), ramp.unsqueeze(1).expand(40, 40)]).expand(50, 2, 40, 40)
    found = crops(pixels, range(50), 1)
    assert found.shape == pixels.shape
    across, down = found[:, 0], found[:, 1]
    steps = across[:, :, 1:-1].diff(dim=2)  # all but the border, where there is nothing to interpolate with
    assert torch.allclose(steps, steps.mean((1, 2), keepdim=True), atol=1e-4)
    sides = steps.mean((1, 2)) * 40
    assert float(sides.min()) > SMALLEST**0.5 - 0.01 and float(sides.max()) < 1.01 and float(sides.std()) > 0.02
    assert torch.allclose(sides, down[:, 1:-1].diff(dim=1).mean((1, 2)) * 40, atol=1e-3)
    left, top = across[:, 0, 1] - 1.5 * sides / 40, down[:, 1, 0] - 1.5 * sides / 40
    for corner in (left, top):
        assert float(corner.min()) > -0.01 and float((corner + sides).max()) < 1.01
    assert float((left - top).abs().mean()) > 0.01


def test_a_picture_has_the_same_crop_in_every_batch_and_another_one_in_every_view() -> None:
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = crops(pixels, range(6), 2)
    apart = torch.cat([crops(pixels[:2], range(2), 2), crops(pixels[2:], range(2, 6), 2)])
    assert torch.allclose(together, apart, atol=1e-6)
    assert not torch.allclose(together, crops(pixels, range(6), 3), atol=1e-2)
    assert not torch.allclose(crops(pixels[:1], [0], 1), crops(pixels[:1], [1], 1), atol=1e-2)


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


def never() -> Iterator[Batch]:
    raise AssertionError("the images of an interrupted run are read a second time")
    yield


def test_hidden_states_take_a_share_of_what_a_gpu_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 4000))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert has_room(gpu, int(1000 * SHARE)) and not has_room(gpu, int(1000 * SHARE) + 1)
    assert not has_room(cpu, 1)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    tasks = ("--task", clip_zoo / "a.json", clip_zoo / "b.json")
    models = (f"a={clip_zoo / 'a'}", f"b={clip_zoo / 'b'}", "--base", clip_zoo / "base")
    return ("merge", *models, *tasks, "--method", "tsv-m", "--samples", 24, "--calibrate")


def test_calibrate_from_the_command(words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path) -> None:
    code, out, err = run(*words, "--out", tmp_path / "m", "--evaluate")
    assert code == 0, err
    assert "calibrated layers: 12" in out
    files = {path.name for path in (tmp_path / "m").iterdir()}
    assert "model.safetensors" in files and not any(name.endswith(".tmp") for name in files)
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert report["totals"]["calibrated"] == 12
    base, merged = (load_file(folder / "model.safetensors") for folder in (clip_zoo / "a", tmp_path / "m"))
    entry = next(layer for layer in report["layers"] if layer["name"].endswith("layers.0.mlp.fc1.weight"))
    original = parameters(inside(load_tower(clip_zoo / "base")))[entry["name"]]
    assert entry["merged_norm"] == pytest.approx(float((merged[entry["name"]] - original).norm()), rel=1e-4)
    assert merged.keys() == base.keys()
    card = (tmp_path / "m" / "README.md").read_text()
    assert "Then calibrated" in card and "up to 24 training images" in card and "| calibrated layers | 12 |" in card
    assert not list((tmp_path / "home" / "hf-epimer" / "calibration").iterdir())
    again = run("merge", "--config", tmp_path / "m" / "merge_config.json", "--out", tmp_path / "n")
    assert again[0] == 0, again[2]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "n" / "model.safetensors").read_bytes()
    plain = run(*words[:-1], "--out", tmp_path / "p")
    assert plain[0] == 0 and (tmp_path / "p" / "model.safetensors").read_bytes() != again
    assert not torch.equal(load_file(tmp_path / "p" / "model.safetensors")[entry["name"]], merged[entry["name"]])


@pytest.mark.slow
def test_two_processes_calibrate_as_one_does(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    """Curvature, calibration and accuracies, each process with its share of the images."""
    more = ("--evaluate", "--limit", 8, "--json")
    code, output, complaint = run(*words, "--out", tmp_path / "one", *more)
    assert (code, complaint) == (0, "")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_epimer"]
    two = tmp_path / "two"
    done = subprocess.run(
        [*launcher, *map(str, (*words, "--out", two, *more))],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(tmp_path / "elsewhere"),
        },
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]["tasks"] == json.loads(output)["results"]["tasks"]
    base, *merges = (load_tower(folder).state_dict() for folder in (clip_zoo / "base", tmp_path / "one", two))
    for name, start in base.items():
        step, other = merges[0][name] - start, merges[1][name] - start
        assert float((other - step).norm()) <= 1e-5 * float(start.norm() + step.norm()), name
    left = list((tmp_path / "elsewhere" / "hf-epimer" / "calibration").iterdir())
    assert left == []


def test_calibration_brings_the_merge_closer_to_every_task(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    """Features on images that were not calibrated on, against each task's own model."""
    assert run(*words, "--out", tmp_path / "m")[0] == 0
    assert run(*words[:-1], "--out", tmp_path / "p")[0] == 0
    pixels = torch.cat([batch.inputs for batch in images(9)])
    with torch.no_grad():
        plain, better = (load_tower(tmp_path / n)(pixel_values=pixels).pooler_output for n in ("p", "m"))
        goals = [load_tower(clip_zoo / n)(pixel_values=pixels).pooler_output for n in "ab"]
    far = sum(float((plain - goal).square().sum()) for goal in goals)
    near = sum(float((better - goal).square().sum()) for goal in goals)
    assert near < far


@pytest.mark.parametrize(
    ("flag", "value"), [("--views", 0), ("--views", 65), ("--calibration-rho", 0), ("--calibration-rho", "nan")]
)
def test_settings_out_of_range_are_wrong_usage(
    flag: str, value: object, words: tuple[object, ...], run: Run, tmp_path: Path
) -> None:
    code, _, err = run(*words, flag, value, "--out", tmp_path / "m")
    assert code == 2 and err.startswith(f"error: {flag} must be")


def test_settings_of_a_calibration_change_it_and_are_repeated(
    words: tuple[object, ...], run: Run, tmp_path: Path
) -> None:
    changed = ("--views", 2, "--calibration-rho", 0.5, "--mixed-precision", "bf16")
    assert run(*words, *changed, "--out", tmp_path / "a")[0] == 0
    assert run(*words, "--out", tmp_path / "b")[0] == 0
    assert run("merge", "--config", tmp_path / "a" / "merge_config.json", "--out", tmp_path / "c")[0] == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == c and a != b


def test_no_room_for_hidden_states_is_said_before_they_are_computed(
    words: tuple[object, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    code, _, err = run(*words, "--out", tmp_path / "m")
    assert code == 1 and "calibration needs" in err and "GB are free" in err and not (tmp_path / "m").exists()


def test_no_room_is_needed_on_the_disk_for_hidden_states_that_fit_into_memory(
    words: tuple[object, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*words, "--out", tmp_path / "a")[0] == 0
    asked = []

    def ask(device: torch.device, nbytes: int) -> bool:
        asked.append((device.type, nbytes))
        return True

    monkeypatch.setattr("hf_epimer.pipeline.calibration.layers.has_room", ask)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    code, _, err = run(*words, "--out", tmp_path / "b")
    assert code == 0, err
    assert asked == [("cpu", 2 * 4 * 48 * POSITIONS * 16)]  # two towers, float32, width 16
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_what_calibration_cannot_do_is_said_before_any_work(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    nameless = ("merge", clip_zoo / "a", clip_zoo / "b", "--base", clip_zoo / "base", "--method", "mean", "--calibrate")
    code, _, err = run(*nameless, "--out", tmp_path / "m")
    assert code == 2 and "to calibrate, its task must be known" in err
    code, out, _ = run(*words, "--out", tmp_path / "m", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and len(plan["calibrate_on"]) == 2 and "24 samples" in plan["calibrate_on"][0]
    assert any(line.startswith("positions of a") for line in plan["to_estimate"])
    bare = tmp_path / "bare"  # a base without a text tower
    shutil.copytree(clip_zoo / "a", bare)
    code, _, err = run(*words, "--base", bare, "--out", tmp_path / "m")
    assert code == 1 and "no text tower" in err
    assert not (tmp_path / "m").exists()


def test_the_full_core_is_calibrated_by_itself_and_other_methods_are_not(
    words: tuple[object, ...], run: Run, tmp_path: Path
) -> None:
    *plain, _ = words

    def plan(*more: object) -> dict[str, Any]:
        code, out, err = run(*plain, *more, "--out", tmp_path / "m", "--dry-run", "--json")
        assert (code, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    assert plan()["calibrate_on"] == []
    assert len(plan("--method", "kronecker-core")["calibrate_on"]) == 2
    assert plan("--method", "kronecker-core", "--no-calibrate")["calibrate_on"] == []
    assert run(*plain, "--method", "kronecker-core", "--out", tmp_path / "a")[0] == 0
    assert run(*plain, "--method", "kronecker-core", "--no-calibrate", "--out", tmp_path / "b")[0] == 0
    settings = [json.loads((tmp_path / name / "merge_config.json").read_text())["calibrate"] for name in "ab"]
    assert settings == [True, False]
    again = run("merge", "--config", tmp_path / "b" / "merge_config.json", "--out", tmp_path / "c")
    assert again[0] == 0, again[2]
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a != b and b == c


def test_a_full_core_without_images_is_merged_as_it_is_and_says_so(run: Run, tmp_path: Path, clip_zoo: Path) -> None:
    models = ("merge", clip_zoo / "a", clip_zoo / "b", "--base", clip_zoo / "base", "--method", "kronecker-core")
    code, out, err = run(*models, "--metric", "task-vectors", "--out", tmp_path / "m")
    assert code == 0, err
    assert "calibrated layers" not in out and err == ""
    assert json.loads((tmp_path / "m" / "merge_config.json").read_text())["calibrate"] is False


def test_a_full_core_whose_data_are_gone_is_merged_as_it_is(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    for name in "ab":
        content = json.loads((clip_zoo / f"{name}.json").read_text()) | {"dataset": str(tmp_path / "nowhere" / name)}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    models = words[: words.index("--task")]
    plain = (*models, "--task", tmp_path / "a.json", tmp_path / "b.json", "--metric", "task-vectors")
    code, _, err = run(*plain, "--method", "kronecker-core", "--out", tmp_path / "m")
    assert code == 0 and "this one is not" in err and "is not there" in err
    code, _, err = run(*plain, "--method", "kronecker-core", "--calibrate", "--out", tmp_path / "n")
    assert code == 1 and "nowhere" in err and "is not there" in err and not (tmp_path / "n").exists()


def test_a_config_with_another_method_does_what_that_method_does(
    words: tuple[object, ...], run: Run, tmp_path: Path
) -> None:
    *plain, _ = words
    for method, number in (("mean", 0), ("kronecker-core", 2)):
        other = "kronecker-core" if method == "mean" else "mean"
        assert run(*plain, "--method", other, "--out", tmp_path / other)[0] == 0
        again = ("merge", "--config", tmp_path / other / "merge_config.json", "--method", method)
        code, out, err = run(*again, "--out", tmp_path / "m", "--dry-run", "--json")
        assert code == 0, err
        assert len(json.loads(out)["calibrate_on"]) == number


def test_statistics_that_are_given_serve_the_calibration_too(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    given = []
    for name in "ab":
        file = tmp_path / f"{name}.safetensors"
        task = ("--task", clip_zoo / f"{name}.json", "--base", clip_zoo / "base", "--out", file)
        assert run("fisher", clip_zoo / name, *task, "--samples", 12, "--gradient-gram")[0] == 0
        given.append(f"{name}={file}")
    *plain, _ = words
    core = (*plain, "--method", "epimer-core", "--fisher", *given)
    code, out, err = run(*core, "--out", tmp_path / "m", "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["to_estimate"] == [] and len(plan["calibrate_on"]) == 2
    code, out, err = run(*core, "--out", tmp_path / "m")
    assert code == 0 and "calibrated layers: 12" in out, err
