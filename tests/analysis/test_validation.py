"""A sweep chooses on validation samples alone, which no statistic has seen."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from helpers.command import Run, fails
from helpers.sweeps import recipe, words
from hf_epimer import Grid, sweep
from hf_epimer.analysis.sweep import sweep as sweeping
from hf_epimer.analysis.sweep import validation
from hf_epimer.analysis.sweep.grid import Setting
from hf_epimer.analysis.sweep.report import Row, best_rows
from hf_epimer.analysis.sweep.validation import validation_samples
from hf_epimer.evaluation.accuracy import evaluate_folder
from hf_epimer.evaluation.results import TaskResult
from hf_epimer.tasks.images import read_samples
from hf_epimer.tasks.task import load_task_file

pytestmark = pytest.mark.usefixtures("own_cache")


def test_validation_rows_are_the_end_of_the_fisher_permutation(clip_zoo: Path) -> None:
    task = load_task_file(clip_zoo / "a.json")
    for seed in (0, 7):
        chosen, before = validation_samples(task, seed)
        assert (len(chosen), before) == (4, 36)
        everything = read_samples(task, "train", seed=seed)
        assert list(chosen.numbers) == list(everything.numbers[36:])
        fisher = read_samples(task, "train", seed=seed, limit=before)
        assert not set(fisher.numbers) & set(chosen.numbers)
        assert set(fisher.numbers) | set(chosen.numbers) == set(range(40))
        labels = [row["label"] for row in read_samples(task, "train").rows]
        assert [row["label"] for row in chosen.rows] == [labels[number] for number in chosen.numbers]
        fewer, before = validation_samples(task, seed, limit=3)
        assert (list(fewer.numbers), before) == (list(chosen.numbers[1:]), 37)


@pytest.mark.slow
def test_statistics_never_see_validation_samples(
    clip_zoo: Path, run: Run, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ("--rank", 4, "--alpha", 1, "--limit", 4)
    fails(run(*words(clip_zoo), *grid), r"--samples 256: .*'a' has 36 samples .* at most --samples 36", 2)
    fails(run(*words(clip_zoo), *grid, "--samples", 37), r"at most --samples 36", 2)
    assert not own_cache.exists()
    assert run(*words(clip_zoo), *grid, "--samples", 36)[::2] == (0, "")
    # files that are there already: a warning, if they say what they were measured on
    for name in "ab":
        task = ("--task", clip_zoo / f"{name}.json", "--base", clip_zoo / "base", "--out", f"{name}.safetensors")
        assert run("fisher", clip_zoo / name, *task, "--samples", 38)[0] == 0
    given = ("--fisher", "a=a.safetensors", "b=b.safetensors", "--overwrite")
    code, _, complaint = run(*words(clip_zoo), *grid, *given)
    assert code == 0
    assert complaint.count("warning: ") == 2
    assert "a.safetensors of 'a' was measured on 2 of the 4 images" in complaint
    code, _, complaint = run(*words(clip_zoo), *grid, *given, "--seed", 1)  # another permutation: counted, not guessed
    task = load_task_file(clip_zoo / "a.json")
    used = set(read_samples(task, "train", seed=0, limit=38).numbers)
    shared = len(used & set(validation_samples(task, 1)[0].numbers))
    assert (f"'a' was measured on {shared} of" in complaint) == (shared > 0)
    task_words = ("--task", clip_zoo / "a.json", "--base", clip_zoo / "base", "--out", "a.safetensors")
    assert run("fisher", clip_zoo / "a", *task_words, "--samples", 30, "--seed", 5)[0] == 0
    used = set(read_samples(task, "train", seed=5, limit=30).numbers)
    shared = len(used & set(validation_samples(task, 0)[0].numbers))
    assert shared > 0
    assert f"'a' was measured on {shared} of" in run(*words(clip_zoo), *grid, *given)[2]


def test_a_training_split_that_is_the_test_split_is_refused(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    content = json.loads((clip_zoo / "a.json").read_text())
    (tmp_path / "a.json").write_text(
        json.dumps(content | {"dataset": str(clip_zoo / "data" / "a"), "train_split": "test"})
    )
    fails(
        run("sweep", f"a={clip_zoo / 'a'}", "--base", clip_zoo / "base", "--task", "a.json", "--method", "mean"),
        "never chosen on test",
    )


def test_accuracies_are_those_of_the_merged_folders(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    """The command that the report gives makes a model with the reported test accuracy."""
    found = sweep(recipe(clip_zoo), Grid(("tsv-m", "epimer"), (1, 4), (0.5, 2.0)), test=True)
    tasks = [load_task_file(clip_zoo / f"{name}.json") for name in "ab"]
    assert {row.setting for row in found.test} == set(found.commands)
    for number, row in enumerate(found.test):
        command = shlex.split(found.commands[row.setting])
        assert command[:2] == ["hf-epimer", "merge"]
        assert run(*command[1:], "--out", f"merged-{number}")[0] == 0
        expected = evaluate_folder(tmp_path / f"merged-{number}", clip_zoo / "base", tasks, name="")
        assert {name: own.correct for name, own in row.tasks.items()} == {
            name: own.correct for name, own in expected.tasks.items()
        }


# --- the choice -----------------------------------------------------------------------------------------------------


def row(name: str, rank: int | None, alpha: float | None, *correct: int) -> Row:
    return Row(Setting(name, rank, alpha), {f"t{i}": TaskResult(own, 100) for i, own in enumerate(correct)})


def test_best_by_average_and_by_worst_task() -> None:
    rows = [
        row("x", 4, 0.5, 90, 40), row("x", 4, 1.0, 70, 60), row("x", 8, 0.5, 90, 40), row("x", 8, 1.0, 60, 70),
        row("y", None, None, 62, 62),
    ]  # fmt: skip
    best = best_rows(rows)
    assert best["x"]["average"] is rows[1]  # 65 as well as three others, but a better worst task
    assert best["x"]["worst"] is rows[1]  # and the smaller rank of two
    assert best["y"] == {"average": rows[4], "worst": rows[4]}
    assert rows[0].error == pytest.approx((0.9 * 0.1 / 100 + 0.4 * 0.6 / 100) ** 0.5 / 2)


@pytest.mark.slow
def test_test_splits_have_no_say(clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two zoos that differ in their test labels alone choose the same settings, and report different test numbers."""
    shutil.copytree(clip_zoo, tmp_path / "zoo")
    for name in "ab":
        file = tmp_path / "zoo" / "data" / name / "data" / "test-00000-of-00001.parquet"
        rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        turned = rows.map(lambda row: {"label": (row["label"] + 1) % 3}, features=rows.features)
        turned.to_parquet(file)
    grid = Grid(("mean", "task-arithmetic", "tsv-m"), (1, 4), (-1.0, 0.5, 1.0, 3.0))
    one, two = (sweep(recipe(zoo), grid, f"out-{n}", test=True) for n, zoo in enumerate((clip_zoo, tmp_path / "zoo")))
    assert [own.tasks for own in one.rows] == [own.tasks for own in two.rows]
    chosen = [{m: {c: r.setting for c, r in own.items()} for m, own in found.best.items()} for found in (one, two)]
    assert chosen[0] == chosen[1]
    assert [own.tasks for own in one.test] != [own.tasks for own in two.test]
    read: list[str] = []

    def noted(task: Any, split: str, **arguments: Any) -> Any:
        read.append(split)
        return read_samples(task, split, **arguments)

    monkeypatch.setattr(validation, "read_samples", noted)
    monkeypatch.setattr(sweeping, "read_samples", noted)
    sweep(recipe(clip_zoo), grid, "untested")
    assert set(read) == {"train"}
