"""Merges that estimate the curvature they miss: on which data, kept where, and repeated when."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.command import Run, fails
from helpers.curvature import fisher_words, merge_words
from helpers.hub_cases import in_a_process
from helpers.hub_server import StandInHub
from hf_epimer import ModelRef
from hf_epimer.curvature import estimate as estimation
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.methods.statistic import FISHER_FILE, GRADIENT_GRAM_FILE, KRONECKER_FILE, STATISTICS_FILES
from hf_epimer.models.source import resolve_model
from hf_epimer.tasks import dataset as data
from hf_epimer.tasks.dataset import Sampling, TaskImages
from hf_epimer.tasks.task import benchmark_tasks, load_task_file

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_merge_without_files_is_the_merge_with_them(
    clip_zoo: Path, run: Run, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        assert run(*fisher_words(clip_zoo, name), "--samples", 30, "--out", f"{name}.safetensors")[0] == 0
    given = [f"{name}={tmp_path / name}.safetensors" for name in "ab"]
    assert run(*merge_words(clip_zoo), "--out", "given", "--fisher", *given)[0] == 0
    shutil.rmtree(own_cache)
    code, _, complaint = run(*merge_words(clip_zoo), "--samples", 30, "--out", "estimated")
    assert (code, complaint) == (0, "")
    assert len(list(own_cache.iterdir())) == 2
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("given", "estimated"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    # and from the cache, bit for bit, without looking at the data again
    monkeypatch.setattr(estimation, "read_images", None)
    assert run(*merge_words(clip_zoo), "--samples", 30, "--out", "cached")[0] == 0
    assert load_file(tmp_path / "cached" / "model.safetensors").keys() == two.keys()
    assert all(torch.equal(v, two[n]) for n, v in load_file(tmp_path / "cached" / "model.safetensors").items())


def test_a_dry_run_says_what_would_be_estimated(clip_zoo: Path, run: Run, own_cache: Path) -> None:
    plan = json.loads(run(*merge_words(clip_zoo), "--dry-run", "--json")[1])
    assert [entry.split(":")[0] for entry in plan["to_estimate"]] == ["fisher of a", "fisher of b"]
    assert "256 samples" in plan["to_estimate"][0]
    assert not own_cache.exists()
    run(*fisher_words(clip_zoo), "--out", "f")
    plan = json.loads(run(*merge_words(clip_zoo), "--dry-run", "--json")[1])
    assert [entry.split(":")[0] for entry in plan["to_estimate"]] == ["fisher of b"]
    assert len(plan["statistics"]) == 1


def test_an_interrupted_merge_repeats_only_what_is_missing(
    clip_zoo: Path, run: Run, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, measured = estimation._measure, []

    def interrupted(request: CurvatureRequest, *rest: object) -> object:
        measured.append(request.images.task.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return original(request, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(estimation, "_measure", interrupted)
    code, _, complaint = run(*merge_words(clip_zoo), "--out", "out")
    assert code == 1 and "interrupted" in complaint
    assert not (tmp_path / "out").exists()
    assert run(*merge_words(clip_zoo), "--out", "out")[0] == 0
    assert measured == ["a", "b", "b"]
    assert len(list(own_cache.iterdir())) == 2


def test_the_cache_knows_what_decides_the_numbers(clip_zoo: Path, run: Run, own_cache: Path, tmp_path: Path) -> None:
    words = [*fisher_words(clip_zoo), "--out", "f", "--samples", 8]
    changes: list[list[object]] = [
        [], ["--seed", 1], ["--samples", 9], ["--labels", "sampled"], ["--split", "test"], ["--squared-mean"],
        ["--mixed-precision", "bf16"],
    ]  # fmt: skip
    for change in changes:
        assert run(*words, *change)[0] == 0
    assert len(list(own_cache.iterdir())) == len(changes)
    run(*words, "--batch-size", 3)
    assert len(list(own_cache.iterdir())) == len(changes)
    run("fisher", clip_zoo / "b", *words[2:])
    assert len(list(own_cache.iterdir())) == len(changes) + 1
    task = json.loads((clip_zoo / "a.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(task | {"dataset": str(clip_zoo / "data" / "a"), "templates": ["{}"]}))
    run("fisher", clip_zoo / "a", "--base", clip_zoo / "base", "--task", "t.json", "--samples", 8, "--out", "f")
    assert len(list(own_cache.iterdir())) == len(changes) + 2


@pytest.mark.parametrize(
    "options", [("--metric", "kronecker"), ("--metric", "projected"), ("--metric", "projected", "--shrinkage", 0.5)]
)
def test_other_metrics_are_estimated_too(options: tuple[object, ...], clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    run(*merge_words(clip_zoo), "--out", "diagonal")
    assert run(*merge_words(clip_zoo), "--out", "other", *options)[0] == 0
    diagonal, other = (load_file(tmp_path / out / "model.safetensors") for out in ("diagonal", "other"))
    assert any(not torch.equal(diagonal[name], other[name]) for name in other)
    assert all(bool(value.isfinite().all()) for value in other.values())
    report = json.loads((tmp_path / "other" / "merge_report.json").read_text())
    assert report["totals"]["eta"] > 0


def test_regmean_from_a_kronecker_file(clip_zoo: Path, run: Run, tmp_path: Path, own_cache: Path) -> None:
    words = [word for word in merge_words(clip_zoo) if word not in ("--rank", 4)]
    assert run(*words, "--method", "regmean", "--out", "estimated")[0] == 0
    assert all("-kronecker-" in file.name for file in own_cache.iterdir())
    for name in "ab":
        assert run(*fisher_words(clip_zoo, name), "--kronecker", "--out", f"{name}.safetensors")[0] == 0
    given = [f"{name}={tmp_path / name}.safetensors" for name in "ab"]
    assert run(*words, "--method", "regmean", "--out", "given", "--fisher", *given)[0] == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("given", "estimated"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, complaint = run(*merge_words(clip_zoo), "--out", "x", "--fisher", *given)
    assert code == 1 and "holds hf-epimer.kronecker/1" in complaint


def test_everything_that_is_missing_is_measured_in_one_pass(
    clip_zoo: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files of one checkpoint in one pass are those that are measured one by one."""
    passes: list[object] = []
    original = estimation._measure
    monkeypatch.setattr(estimation, "_measure", lambda *given: passes.append(1) or original(*given))
    source, base = (resolve_model(ModelRef(str(clip_zoo / name))) for name in ("a", "base"))
    images = TaskImages(load_task_file(clip_zoo / "a.json"), Sampling(10))
    request = CurvatureRequest(source, base, images)
    alone = {file: load_file(estimation.estimate_files(request, [file])[file]) for file in STATISTICS_FILES}
    assert len(passes) == len(STATISTICS_FILES)
    os.remove(request.cached(FISHER_FILE))
    os.remove(request.cached(GRADIENT_GRAM_FILE))
    kept = request.cached(KRONECKER_FILE).stat().st_mtime_ns
    together = estimation.estimate_files(request, STATISTICS_FILES)
    assert request.cached(KRONECKER_FILE).stat().st_mtime_ns == kept
    assert len(passes) == len(STATISTICS_FILES) + 1
    for file, tensors in alone.items():
        found = load_file(together[file])
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("compress", ["bf16", "rank1"])
def test_small_files_merge_nearly_alike(compress: str, clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    for name in "ab":
        run(*fisher_words(clip_zoo, name), "--out", f"{name}.safetensors")
        assert run(*fisher_words(clip_zoo, name), "--compress", compress, "--out", f"{name}-small.safetensors")[0] == 0
        sizes = [(tmp_path / f"{name}{end}.safetensors").stat().st_size for end in ("", "-small")]
        assert sizes[1] < 0.75 * sizes[0]
    small = [f"{name}={tmp_path / name}-small.safetensors" for name in "ab"]
    assert run(*merge_words(clip_zoo), "--out", "small", "--fisher", *small)[0] == 0
    assert run(*merge_words(clip_zoo), "--out", "full")[0] == 0
    base = load_file(clip_zoo / "base" / "model.safetensors")
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("full", "small"))
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    change = float((two[name] - one[name]).norm() / (one[name] - base[name]).norm())
    assert change < (0.02 if compress == "bf16" else 0.5)


@pytest.mark.slow
def test_the_mission_command_estimates_on_the_benchmarks_own_data(benchmark_hub: StandInHub, tmp_path: Path) -> None:
    """No Fisher file anywhere: tasks from the repos' names, data and base from the Hub, in a process of its own."""
    words = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--push-to", "org/merged")
    done = in_a_process(benchmark_hub, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert benchmark_hub.exists("org/merged")
    files = sorted((tmp_path / "home" / "hf-epimer" / "statistics").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["dtd", "svhn"]
    with safe_open(files[1], "pt") as file:
        header = file.metadata()
    assert header["dataset"] == benchmark_tasks()["svhn"].dataset
    assert header["dataset_revision"] == benchmark_hub.commits(header["dataset"], "dataset")[0].oid
    assert header["model_sha"] == benchmark_hub.commits("org/vit-b32-svhn")[0].oid


@pytest.mark.slow
def test_a_merge_from_the_hub_is_calibrated_and_pushed(benchmark_hub: StandInHub, tmp_path: Path) -> None:
    models = ("org/vit-b32-dtd", "org/vit-b32-svhn")
    words = ("merge", *models, "--method", "mean", "--calibrate", "--push-to", "org/merged")
    done = in_a_process(benchmark_hub, tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "calibrated layers: 12" in done.stdout
    files = set(benchmark_hub.commits("org/merged")[0].files)
    assert {"model.safetensors", "merge_config.json"} <= files and not any(".tmp" in name for name in files)


@pytest.mark.slow
def test_a_dry_run_tells_the_bytes_of_data_and_max_data_caps_them(benchmark_hub: StandInHub, run: Run) -> None:
    words = ["merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--dry-run", "--json"]
    sizes = [data.data_bytes(benchmark_tasks()[name]) for name in ("dtd", "svhn")]
    code, output, complaint = run(*words)
    assert (code, complaint) == (0, "")
    plan = json.loads(output)
    assert plan["data_bytes_to_read"] == sum(sizes) > 0
    assert [line.split(":")[0] for line in plan["data"]] == ["dtd", "svhn"]
    between = sum(sizes) / 2 / 1e9
    plan = json.loads(run(*words, "--max-data", between)[1])
    assert plan["data_bytes_to_read"] == min(sizes) < max(sizes)
    assert sorted("streamed" in line for line in plan["data"]) == [False, True]
    fails(run(*words, "--max-data", -1), "--max-data must be a number of gigabytes of at least 0", code=2)


@pytest.mark.slow
def test_large_data_sets_are_streamed(
    benchmark_hub: StandInHub, run: Run, clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = benchmark_tasks()["dtd"]
    assert not data.is_large(task)
    monkeypatch.setattr(data, "LARGE", 100)
    assert data.is_large(task) and not data.is_large(load_task_file(clip_zoo / "a.json"))
    words = ["fisher", "org/vit-b32-dtd", "--task", "dtd", "--streaming", "--samples", "6", "--out", "f.safetensors"]
    done = in_a_process(benchmark_hub, tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()["samples"] == "6"
