"""`hf-epimer fisher`: the file, the cache of several processes, and what is pushed to the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.classifiers import load_classifier
from helpers.command import Run
from helpers.curvature import close, fisher_words
from helpers.hub_cases import pickle_weights
from helpers.hub_server import WRITER, Fault, StandInHub
from hf_epimer.curvature import estimate as estimation
from hf_epimer.curvature.data_pass import Subject, accumulate, estimate_fisher
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import load_task_file

pytestmark = pytest.mark.usefixtures("own_cache")


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
    assert report["files"] == ["fisher.safetensors", "gradient_gram.safetensors"]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == report["files"]


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
        (("--kronecker", "--compress", "bf16", "--out", "f"), "--compress is for Fisher information, not for Kron", 2),
        (("--gradient-gram", "--squared-mean", "--out", "f"), "--squared-mean is for Fisher information alone", 2),
        (("--gradient-gram", "--kronecker", "--out", "f"), "not allowed with", 2),
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


def test_batches_are_what_fits_into_memory(
    clip_zoo: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large tower fewer images are taken at a time, for the same numbers."""
    words, sizes = [*fisher_words(clip_zoo), "--samples", 6, "--fisher", "--out"], []

    def seen(subject: Subject, batches: ImageBatches, *arguments: Any, **options: Any) -> Any:
        sizes.append(batches.size)
        return accumulate(subject, batches, *arguments, **options)

    monkeypatch.setattr(estimation, "accumulate", seen)
    for name, room in (("whole", 2**30), ("single", 1)):
        monkeypatch.setattr(estimation, "ROOM", room)
        assert run(*words, f"{name}.safetensors")[0] == 0
        shutil.rmtree(tmp_path / "home")
    assert sizes == [32, 1]
    close(tmp_path / "whole.safetensors", tmp_path / "single.safetensors", 1e-5)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    """An odd number of samples: none is dropped, none counted twice."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "home2"),
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    words = [*fisher_words(clip_zoo), "--samples", 23, "--labels", "sampled", "--batch-size", 4]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hf_epimer"]
    done = subprocess.run(
        [*launcher, *map(str, words), "--out", "two", "--json"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == "23"
    assert run(*words, "--out", "one")[0] == 0
    close(tmp_path / "one" / "fisher.safetensors", tmp_path / "two" / "fisher.safetensors", 1e-5)
    grams = (tmp_path / name / "gradient_gram.safetensors" for name in ("one", "two"))
    close(*grams, 1e-3)  # their last digits may fall to either side of a bf16 number


def test_pushing_adds_the_file_and_a_section_in_one_commit(
    benchmark_hub: StandInHub, run: Run, clip_zoo: Path, tmp_path: Path
) -> None:
    words = ("fisher", "org/vit-b32-dtd", "--task", clip_zoo / "a.json", "--samples", 12, "--push")
    code, output, complaint = run(*words)
    assert (code, complaint) == (0, "")
    head, first = benchmark_hub.commits("org/vit-b32-dtd")
    assert head.oid in output
    assert set(head.files) == set(first.files) | {"fisher.safetensors", "gradient_gram.safetensors"}
    card = benchmark_hub.read("org/vit-b32-dtd", "README.md").decode()
    assert card.startswith("---\nbase_model: org/base\n---\n\n# A model\n")
    assert "## Fisher information" in card and card.count("12 samples of `a`") == 2
    assert "## Gradient-weighted Gram matrices" in card and "stored as bf16" in card
    assert "hf-epimer merge org/vit-b32-dtd OTHER" in card
    assert WRITER not in card and str(clip_zoo) not in card
    assert ModelCard(card).data.to_dict()["base_model"] == "org/base"
    # again with other samples: the section is replaced, not repeated
    assert run(*words[:-2], 13, "--push")[0] == 0
    card = benchmark_hub.read("org/vit-b32-dtd", "README.md").decode()
    assert card.count("## Fisher information") == card.count("## Gradient-weighted") == 1
    assert card.count("13 samples") == 2 and "12 samples" not in card
    # and the next person merges without data
    (tmp_path / "got.safetensors").write_bytes(benchmark_hub.read("org/vit-b32-dtd", "fisher.safetensors"))
    assert run("merge", "org/vit-b32-dtd", "--method", "epimer", "--out", "merged")[0] == 0


def test_statistics_of_converted_weights_are_pushed_to_main(
    benchmark_hub: StandInHub, run: Run, clip_zoo: Path
) -> None:
    repo = "org/vit-b32-dtd"
    pickle_weights(benchmark_hub, repo)
    words = ("fisher", repo, "--task", clip_zoo / "a.json", "--samples", 12, "--push")
    assert run(*words)[0] == 0
    assert "fisher.safetensors" in benchmark_hub.commits(repo)[0].files
    code, _, complaint = run("merge", repo, "--method", "epimer", "--out", "merged")
    assert code == 0, complaint
    benchmark_hub.commit(repo, {"pytorch_model.bin": b"trained further"})
    assert run(*words)[0] == 1  # no conversion of those


def test_a_card_that_is_damaged_on_its_way_is_not_pushed_back(
    benchmark_hub: StandInHub, run: Run, clip_zoo: Path
) -> None:
    repo = "org/vit-b32-dtd"
    benchmark_hub.inject(Fault(method="GET", path=f"{repo}/resolve/.*/README.md", corrupt=True, times=None))
    words = ("fisher", repo, "--base", "org/base", "--task", clip_zoo / "a.json", "--samples", 12, "--push")
    code, _, complaint = run(*words)
    assert code == 1 and "README.md arrives with another content" in complaint
    assert len(benchmark_hub.commits(repo)) == 1


def test_who_may_not_push_hears_it_first(
    benchmark_hub: StandInHub, run: Run, clip_zoo: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fisher", "org/vit-b32-dtd", "--task", clip_zoo / "a.json", "--push"]
    monkeypatch.setenv("HF_TOKEN", "hf_reader_secret")
    code, _, complaint = run(*words)
    assert code == 1 and "write token" in complaint and "secret" not in complaint
    monkeypatch.setenv("HF_TOKEN", WRITER)
    words[1] = f"org/vit-b32-dtd@{benchmark_hub.commits('org/vit-b32-dtd')[0].oid}"
    code, _, complaint = run(*words)
    assert code == 2 and "is a commit" in complaint
    assert not own_cache.exists()


def test_weights_that_change_meanwhile_do_not_get_the_file(
    benchmark_hub: StandInHub, run: Run, clip_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = estimation._measure

    def slow(*arguments: object) -> object:
        benchmark_hub.commit(
            "org/vit-b32-dtd", {"model.safetensors": (clip_zoo / "b" / "model.safetensors").read_bytes()}
        )
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(estimation, "_measure", slow)
    code, _, complaint = run("fisher", "org/vit-b32-dtd", "--task", clip_zoo / "a.json", "--push")
    assert code == 1 and "was changed while it was measured" in complaint
    assert "fisher.safetensors" not in benchmark_hub.commits("org/vit-b32-dtd")[0].files
