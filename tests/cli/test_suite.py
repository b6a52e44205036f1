"""`--suite`: one word for the checkpoints of a whole set of benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from helpers.checkpoints import tiny_state, write_checkpoint
from helpers.command import Run, fails
from hf_epimer.cli.arguments import models_of
from hf_epimer.tasks.task import benchmark_tasks


def test_a_pattern_stands_for_every_task_but_those_that_are_named() -> None:
    words = ["org/b32-{}", "stanford-cars=org/my-cars", "extra=org/x"]
    found = list(map(str, models_of(argparse.Namespace(models=words, suite=8), "merge")))
    names = [name for name in benchmark_tasks(8) if name != "stanford_cars"]
    assert found == [*(f"{name}=org/b32-{name}" for name in names), "stanford-cars=org/my-cars", "extra=org/x"]


def test_a_suite_is_merged_from_a_folder_of_checkpoints(tmp_path: Path, run: Run) -> None:
    base = tiny_state(0)
    write_checkpoint(tmp_path / "base", base)
    for seed, name in enumerate(benchmark_tasks(8), start=1):
        write_checkpoint(tmp_path / "zoo" / name, tiny_state(seed, base))
    words = [
        "merge",
        tmp_path / "zoo" / "{}",
        "--base",
        tmp_path / "base",
        "--method",
        "mean",
        "--out",
        tmp_path / "out",
    ]
    code, _, complaint = run(*words, "--suite", 8)
    assert (code, complaint) == (0, "")
    recipe = json.loads((tmp_path / "out" / "merge_config.json").read_text())
    assert [word.split("=")[0] for word in recipe["models"]] == list(benchmark_tasks(8))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["merge", "org/b32-{}"], "add --suite"),
        (["merge", "org/b32-dtd", "--suite", "8"], "--suite is for references with {}"),
        (["sweep", "org/b32-{}", "--suite", "9"], "--suite"),
        (["evaluate", "org/b32-dtd"], "on which tasks"),
    ],
)
def test_half_a_suite_is_an_error(words: list[str], complaint: str, run: Run) -> None:
    fails(run(*words), complaint, 2)
