"""`hf-epimer merge --refine`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from helpers.adapters import make
from helpers.command import Run, fails
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of
from hf_epimer.pipeline.calibration import layers as calibration_layers
from hf_epimer.pipeline.refinement import layers as refinement_layers
from hf_epimer.pipeline.refinement import training


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
    table = run(*words, "--out", "m", "--dry-run")[1]
    assert "refinement: less than a minute" in table and "refinement bytes    0.00 GB" in table
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
