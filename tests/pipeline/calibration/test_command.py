"""`hf-epimer merge --calibrate`, and methods that calibrate by themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.command import Run
from helpers.towers import images
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower
from hf_epimer.models.weights import parameters_of


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
    original = parameters_of(load_tower(clip_zoo / "base"), CLIP)[entry["name"]].detach()
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
    assert asked == [("cpu", 2 * 4 * 48 * 5 * 16)]  # two towers, float32, images, positions, width
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
