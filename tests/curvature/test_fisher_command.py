"""`hf-epimer fisher`, and merges that estimate what they need: files, cache, processes, the Hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.classifiers import load_classifier
from helpers.command import Run
from helpers.data import write_benchmark
from helpers.hub_server import WRITER, StandInHub
from hf_epimer import MergeRecipe, ModelRef
from hf_epimer.curvature import estimate as estimation
from hf_epimer.curvature.comparison import compare_with_hessian
from hf_epimer.curvature.data_pass import estimate_fisher
from hf_epimer.curvature.hessian import projected_hessian
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.hub import source as our_hub
from hf_epimer.numerics.subspace import tagged_basis
from hf_epimer.pipeline.planner import make_plan
from hf_epimer.tasks import dataset as data
from hf_epimer.tasks.dataset import Sampling, TaskImages
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import benchmark_tasks, load_task_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of statistics for every test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "hf-epimer" / "statistics"


def fisher_words(zoo: Path, name: str = "a") -> tuple[object, ...]:
    return ("fisher", zoo / name, "--base", zoo / "base", "--task", zoo / f"{name}.json")


def merge_words(zoo: Path) -> tuple[object, ...]:
    models = (f"{name}={zoo / name}" for name in "ab")
    return ("merge", *models, "--base", zoo / "base", "--task", zoo / "a.json", zoo / "b.json", "--rank", 4)


def close(one: Path, two: Path, tolerance: float) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not name.endswith("k_proj.bias"):  # nothing but rounding
            assert float((value - second[name]).norm() / value.norm()) < tolerance, name


def test_the_file_is_the_fisher_information_of_the_task(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    code, output, complaint = run(*fisher_words(clip_zoo), "--samples", 20, "--seed", 3, "--out", "f.safetensors")
    assert (code, complaint) == (0, "")
    assert "20 samples" in output and "f.safetensors" in output
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        header = file.metadata()
    assert header.items() >= {
        "format": "hf-epimer.fisher/1", "samples": "20", "task": "a", "dataset": "a", "model": "a", "labels": "true",
        "seed": "3",
    }.items()  # fmt: skip
    assert str(clip_zoo) not in json.dumps(header)
    task = load_task_file(clip_zoo / "a.json")
    samples = read_samples(task, "train", limit=20, seed=3)
    model = load_classifier(clip_zoo / "a", clip_zoo / "base", task, samples.class_names)
    batches = [batch[:2] for batch in ImageBatches(samples, model.pixels, 20)]
    expected = tmp_path / "expected.safetensors"
    save_file(estimate_fisher(model, batches), expected)
    close(expected, tmp_path / "f.safetensors", 1e-5)


def test_json_and_a_folder_as_target(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    code, output, _ = run(*fisher_words(clip_zoo), "--fraction", 0.25, "--out", "there", "--json")
    assert code == 0
    report = json.loads(output)
    assert report["samples"] == "10"
    assert Path(report["out"]).name == "fisher.safetensors"
    assert (tmp_path / "there" / "fisher.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "pattern", "code"),
    [
        (("--samples", 0, "--out", "f"), "--samples must be a whole number of at least 1", 2),
        (("--fraction", 1.5, "--out", "f"), "--fraction must be above 0 and at most 1", 2),
        (("--samples", 5, "--fraction", 0.5, "--out", "f"), "not allowed with", 2),
        (("--batch-size", 0, "--out", "f"), "--batch-size", 2),
        ((), "--out", 2),
        (("--out", "f", "--push"), "not allowed with", 2),
        (("--push",), "is a local folder: use --out", 2),
        (("--split", "validation", "--out", "f"), "validation", 1),
        (("--kronecker", "--compress", "bf16", "--out", "f"), "--kronecker goes with neither", 2),
        (("--streaming", "--fraction", 0.5, "--out", "f"), "--streaming needs --samples", 2),
        (("--out", "precious.txt"), r"precious\.txt exists and is no file of statistics", 1),
        (("--out", "precious.txt/f"), "cannot write to", 1),
    ],
)
def test_wrong_words_and_targets(
    words: tuple[object, ...], pattern: str, code: int, clip_zoo: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    found, output, complaint = run(*fisher_words(clip_zoo), *words)
    assert found == code, complaint
    assert output == ""
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert re.search(pattern, complaint), complaint
    assert (tmp_path / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "f").exists()


def test_unknown_tasks_and_unlike_models(clip_zoo: Path, tiny_zoo: Path, run: Run) -> None:
    code, _, complaint = run("fisher", clip_zoo / "a", "--base", clip_zoo / "base", "--task", "dtdd", "--out", "f")
    assert code == 1 and "no task is called 'dtdd'" in complaint
    code, _, complaint = run("fisher", clip_zoo / "a", "--base", tiny_zoo / "base", "--task", "dtd", "--out", "f")
    assert code == 1 and "is another architecture than the base" in complaint
    code, _, complaint = run("fisher", tiny_zoo / "a", "--base", tiny_zoo / "base", "--task", "dtd", "--out", "f")
    assert code == 1 and "no text tower" in complaint


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


def test_two_processes_measure_what_one_does(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    """An odd number of samples: none is dropped, none counted twice."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "two")}
    words = [*fisher_words(clip_zoo), "--samples", 23, "--labels", "sampled", "--batch-size", 4]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_epimer"]
    done = subprocess.run(
        [*launcher, *map(str, words), "--out", "two.safetensors", "--json"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == "23"
    assert run(*words, "--out", "one.safetensors")[0] == 0
    close(tmp_path / "one.safetensors", tmp_path / "two.safetensors", 1e-5)


# --- on the Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(empty_hub: StandInHub, tmp_path: Path, clip_zoo: Path) -> StandInHub:
    """A Hub with org/base, two checkpoints without statistics, and small data sets of their benchmarks' schema."""
    empty_hub.add_user("hf_reader_secret", "ann", role="read", orgs=["org"])
    empty_hub.add_repo("org/base", clip_zoo / "base")
    for folder, name in (("a", "dtd"), ("b", "svhn")):
        shutil.copytree(clip_zoo / folder, tmp_path / "src" / folder)
        (tmp_path / "src" / folder / "README.md").write_text("---\nbase_model: org/base\n---\n\n# A model\n")
        empty_hub.add_repo(f"org/vit-b32-{name}", tmp_path / "src" / folder)
        task = benchmark_tasks()[name]
        empty_hub.add_repo(task.dataset, write_benchmark(tmp_path / "src" / name, task), repo_type="dataset")
    return empty_hub


def test_the_mission_command_estimates_on_the_benchmarks_own_data(hub: StandInHub, tmp_path: Path) -> None:
    """No Fisher file anywhere: tasks from the repos' names, data and base from the Hub, in a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    words = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--push-to", "org/merged")
    done = subprocess.run(
        [sys.executable, "-m", "hf_epimer", *words], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert hub.exists("org/merged")
    files = sorted((tmp_path / "home" / "hf-epimer" / "statistics").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["dtd", "svhn"]
    with safe_open(files[1], "pt") as file:
        header = file.metadata()
    assert header["dataset"] == benchmark_tasks()["svhn"].dataset
    assert header["dataset_revision"] == hub.commits(header["dataset"], "dataset")[0].oid
    assert header["model_sha"] == hub.commits("org/vit-b32-svhn")[0].oid


def test_a_merge_from_the_hub_is_calibrated_and_pushed(hub: StandInHub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    models = ("org/vit-b32-dtd", "org/vit-b32-svhn")
    words = ("merge", *models, "--method", "mean", "--calibrate", "--push-to", "org/merged")
    done = subprocess.run(
        [sys.executable, "-m", "hf_epimer", *words], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "calibrated 12 layers on up to 256 images a task" in done.stdout
    files = set(hub.commits("org/merged")[0].files)
    assert {"model.safetensors", "merge_config.json"} <= files and not any(".tmp" in name for name in files)


def test_large_data_sets_are_streamed(
    hub: StandInHub, run: Run, clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = benchmark_tasks()["dtd"]
    assert not data.is_large(task)
    monkeypatch.setattr(data, "LARGE", 100)
    assert data.is_large(task) and not data.is_large(load_task_file(clip_zoo / "a.json"))
    plan = make_plan(MergeRecipe((ModelRef("org/vit-b32-dtd"), ModelRef("org/vit-b32-svhn"))))
    assert all(request.images.sampling.streaming for _, request in plan.to_estimate) and len(plan.to_estimate) == 2
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    words = ["fisher", "org/vit-b32-dtd", "--task", "dtd", "--streaming", "--samples", "6", "--out", "f.safetensors"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_epimer", *words], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()["samples"] == "6"


def test_pushing_adds_the_file_and_a_section_in_one_commit(
    hub: StandInHub, run: Run, clip_zoo: Path, tmp_path: Path
) -> None:
    words = ("fisher", "org/vit-b32-dtd", "--task", clip_zoo / "a.json", "--samples", 12, "--push")
    code, output, complaint = run(*words)
    assert (code, complaint) == (0, "")
    head, first = hub.commits("org/vit-b32-dtd")
    assert head.oid in output
    assert set(head.files) == set(first.files) | {"fisher.safetensors"}
    card = hub.read("org/vit-b32-dtd", "README.md").decode()
    assert card.startswith("---\nbase_model: org/base\n---\n\n# A model\n")
    assert "## Fisher information" in card and "12 samples of `a`" in card
    assert "hf-epimer merge org/vit-b32-dtd OTHER" in card
    assert WRITER not in card and str(clip_zoo) not in card
    assert ModelCard(card).data.to_dict()["base_model"] == "org/base"
    # again with other samples: the section is replaced, not repeated
    assert run(*words[:-2], 13, "--push")[0] == 0
    card = hub.read("org/vit-b32-dtd", "README.md").decode()
    assert card.count("## Fisher information") == 1 and "13 samples" in card
    # and the next person merges without data
    (tmp_path / "got.safetensors").write_bytes(hub.read("org/vit-b32-dtd", "fisher.safetensors"))
    assert run("merge", "org/vit-b32-dtd", "--out", "merged")[0] == 0


def test_who_may_not_push_hears_it_first(
    hub: StandInHub, run: Run, clip_zoo: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fisher", "org/vit-b32-dtd", "--task", clip_zoo / "a.json", "--push"]
    monkeypatch.setenv("HF_TOKEN", "hf_reader_secret")
    code, _, complaint = run(*words)
    assert code == 1 and "write token" in complaint and "secret" not in complaint
    monkeypatch.setenv("HF_TOKEN", WRITER)
    words[1] = f"org/vit-b32-dtd@{hub.commits('org/vit-b32-dtd')[0].oid}"
    code, _, complaint = run(*words)
    assert code == 2 and "is a commit" in complaint
    assert not own_cache.exists()


def test_weights_that_change_meanwhile_do_not_get_the_file(
    hub: StandInHub, run: Run, clip_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = estimation._measure

    def slow(*arguments: object) -> object:
        hub.commit("org/vit-b32-dtd", {"model.safetensors": (clip_zoo / "b" / "model.safetensors").read_bytes()})
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(estimation, "_measure", slow)
    code, _, complaint = run("fisher", "org/vit-b32-dtd", "--task", clip_zoo / "a.json", "--push")
    assert code == 1 and "was changed while it was measured" in complaint
    assert "fisher.safetensors" not in hub.commits("org/vit-b32-dtd")[0].files


# --- diagnose -------------------------------------------------------------------------------------------------------


def test_diagnose_estimates_on_request_and_judges_metrics_by_the_exact_hessian(
    clip_zoo: Path, run: Run, tmp_path: Path, own_cache: Path
) -> None:
    words = ["diagnose", *(f"{name}={clip_zoo / name}" for name in "ab"), "--base", clip_zoo / "base", "--rank", 2]
    words += ["--task", clip_zoo / "a.json", clip_zoo / "b.json"]
    assert run(*words, "--out", "free")[0] == 0
    assert json.loads((tmp_path / "free" / "diagnosis.json").read_text())["curvature"] is None
    assert not own_cache.exists()
    assert run(*words, "--samples", 12, "--exact", "--out", "exact")[0] == 0
    found = json.loads((tmp_path / "exact" / "diagnosis.json").read_text())
    assert len(list(own_cache.iterdir())) == 2
    assert found["totals"]["ranks"][0]["curvature"]["eta"] > 0
    assert found["exact"].keys() == {"a", "b"}
    for metrics in found["exact"].values():
        assert metrics.keys() == {"diagonal", "projected", "kronecker"}
        assert all(-1 <= own["agreement"] <= 1 and own["scale"] != 0 for own in metrics.values())
    code, _, complaint = run(*words[:-3], "--exact", "--out", "unknown")
    assert code == 1 and "--exact needs its task" in complaint


def test_agreement_is_that_of_the_dense_matrices(clip_zoo: Path) -> None:
    """Every metric against its own definition, on samples of which the Hessian is known by another test."""
    task = load_task_file(clip_zoo / "a.json")
    source = our_hub.resolve(ModelRef(str(clip_zoo / "a")))
    base = our_hub.resolve(ModelRef(str(clip_zoo / "base")))
    request = CurvatureRequest(source, base, TaskImages(task, Sampling(10)))
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    generator = torch.Generator().manual_seed(0)
    basis = tagged_basis(torch.randn(2, 16, 24, generator=generator), 3, exact=True)
    assert basis is not None
    found = compare_with_hessian(request, {name: basis}, batch_size=4)
    subject, batches = estimation.load_subject(request, 10, Accelerator())
    exact = projected_hessian(subject, batches, {name: basis})[name]
    (batch,) = batches
    atoms = torch.stack([torch.outer(u, v) for u, v in zip(basis.u.mT, basis.v.mT, strict=True)])
    weight = subject.model.get_parameter("tower.encoder.layers.1.mlp.fc2.weight")
    z, squares = [], torch.zeros_like(weight)
    for pixels, label in zip(batch.inputs, batch.labels, strict=True):
        loss = torch.nn.functional.cross_entropy(subject.model(pixels.unsqueeze(0)), label.unsqueeze(0))
        (gradient,) = torch.autograd.grad(loss, weight)
        z.append((atoms * gradient).sum((1, 2)))
        squares += gradient.square() / len(batch.labels)
    projected = torch.stack(z).mT @ torch.stack(z) / len(z)
    diagonal = torch.einsum("imn,mn,jmn->ij", atoms, squares, atoms)
    for metric, matrix in (("projected", projected), ("diagonal", diagonal)):
        cosine = float((matrix * exact).sum() / (matrix.norm() * exact.norm()))
        assert found[metric].agreement == pytest.approx(cosine, abs=1e-4)
        assert found[metric].scale == pytest.approx(float(matrix.trace() / exact.trace()), rel=1e-3)


def test_a_sweep_of_repos_gives_a_command_with_their_commits(hub: StandInHub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}

    def command(*words: object) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "hf_epimer", *map(str, words)],
            capture_output=True, text=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")

    grid = ("--method", "epimer", "regmean", "--rank", 2, 4, "--alpha", 1, "--samples", 11, "--test")
    command("sweep", "org/vit-b32-dtd", "org/vit-b32-svhn", *grid)
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    chosen = report["best"]["average"]
    words = shlex.split(chosen["command"])
    commits = [hub.commits(f"org/{name}")[0].oid for name in ("vit-b32-dtd", "vit-b32-svhn", "base")]
    assert [word.split("@")[1] for word in (*words[2:4], words[5])] == commits
    command(*words[1:], "--evaluate", "--out", "merged")
    results = json.loads((tmp_path / "merged" / "results.json").read_text())
    tested = next(own for own in report["test"] if (own["method"], own["rank"]) == (chosen["method"], chosen["rank"]))
    for task, row in tested["tasks"].items():
        assert row["correct"] == results["tasks"][task]["correct"]
