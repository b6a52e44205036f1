"""The plain command: the best merge that can be had from what is there, and one line that says which it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.command import Run

pytestmark = pytest.mark.usefixtures("own_cache")


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = merged(one), merged(two)
    return all(torch.equal(value, second[name]) for name, value in first.items())


def models(zoo: Path, *labels: str) -> tuple[object, ...]:
    return ("merge", *(f"{label}={zoo / name}" for label, name in zip(labels, "ab")), "--base", zoo / "base")


def made_from(folder: Path) -> str:
    words: str = json.loads((folder / "merge_report.json").read_text())["totals"]["made_from"]
    assert words in (folder / "README.md").read_text()
    return words


def test_with_images_of_every_task_it_is_calibrated(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    words = (*models(clip_zoo, "a", "b"), "--task", clip_zoo / "a.json", clip_zoo / "b.json", "--samples", 24)
    code, output, complaint = run(*words, "--out", tmp_path / "m")
    assert (code, complaint) == (0, "")
    assert "with epimer-core" in output and "made from: images of every task" in output
    assert "calibrated" in made_from(tmp_path / "m")
    assert run(*words, "--no-calibrate", "--out", tmp_path / "n")[0] == 0
    assert made_from(tmp_path / "n").startswith("curvature of every task, in closed form")
    assert not same(tmp_path / "m", tmp_path / "n")


def test_with_statistics_it_is_the_closed_form(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    given = []
    for name in "ab":
        task = ("--task", clip_zoo / f"{name}.json", "--base", clip_zoo / "base", "--samples", 24)
        assert run("fisher", clip_zoo / name, *task, "--gradient-gram", "--out", f"{name}.safetensors")[0] == 0
        given.append(f"{name}={tmp_path / name}.safetensors")
    code, _, complaint = run(*models(clip_zoo, "a", "b"), "--fisher", *given, "--out", tmp_path / "m")
    assert (code, complaint) == (0, "")
    assert made_from(tmp_path / "m").startswith("curvature of every task, in closed form")
    tasks = ("--task", clip_zoo / "a.json", clip_zoo / "b.json", "--samples", 24, "--no-calibrate")
    assert run(*models(clip_zoo, "a", "b"), *tasks, "--out", tmp_path / "n")[0] == 0
    base, first, second = (merged(folder) for folder in (clip_zoo / "a", tmp_path / "m", tmp_path / "n"))
    for name, value in first.items():  # files are stored in half precision
        assert float((value - second[name]).norm()) <= 0.02 * float((value - base[name]).norm()), name


def test_with_the_checkpoints_alone_it_is_data_free(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    code, _, complaint = run(*models(clip_zoo, "a", "b"), "--out", tmp_path / "m")
    assert (code, complaint) == (0, "")
    assert made_from(tmp_path / "m").startswith("the checkpoints alone")
    task_vectors = ("--metric", "task-vectors", "--out", tmp_path / "n")
    assert run(*models(clip_zoo, "a", "b"), *task_vectors)[0] == 0
    assert same(tmp_path / "m", tmp_path / "n")


def test_a_task_without_images_goes_by_its_task_vector(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    words = (*models(clip_zoo, "a", "nobody"), "--task", clip_zoo / "a.json", "--samples", 24)
    code, _, complaint = run(*words, "--out", tmp_path / "m")
    assert (code, complaint) == (0, "")
    assert made_from(tmp_path / "m").startswith("curvature, but for nobody the checkpoints alone")
    assert run(*models(clip_zoo, "a", "nobody"), "--out", tmp_path / "n")[0] == 0
    assert not same(tmp_path / "m", tmp_path / "n")
    plan = json.loads(run(*words, "--out", tmp_path / "o", "--dry-run", "--json")[1])
    assert plan["made_from"] == made_from(tmp_path / "m")
    assert len(plan["statistics"]) == 1  # that of a, from the cache
