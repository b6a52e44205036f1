"""Settings that are stopped early: hopeless ones alone, never by chance, and their numbers stay honest."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.command import Run, strict
from helpers.sweeps import recipe, words
from hf_epimer import Grid, sweep
from hf_epimer.analysis import plots
from hf_epimer.analysis.sweep import bench, stopping
from hf_epimer.analysis.sweep.grid import Setting
from hf_epimer.analysis.sweep.report import Row, best_rows
from hf_epimer.analysis.sweep.stopping import hopeless
from hf_epimer.evaluation.results import TaskResult
from hf_epimer.models.classifier import Classifier
from hf_epimer.tasks import images as data

DOOMED = -3.0


def of(alpha: float, method: str = "x") -> Setting:
    return Setting(method, None, alpha)


def hits(*tasks: str) -> dict[str, Tensor]:
    """`1110` is a task of four images, all but the last of them hits."""
    return {f"t{number}": torch.tensor([mark == "1" for mark in marks]) for number, marks in enumerate(tasks)}


def test_a_setting_is_hopeless_once_more_than_nine_images_are_against_it_and_none_for_it() -> None:
    for images, expected in ((1, []), (5, []), (9, []), (10, [of(2)])):
        assert hopeless({of(1): hits("1" * images), of(2): hits("0" * images)}) == expected
    twenty = {of(1): hits("1" * 20), of(2): hits("0" * 11 + "1" * 9)}
    assert hopeless(twenty) == [of(2)]
    # as far behind, but on images of which the better one misses some that the other does not: 14 to 3
    assert hopeless({of(1): hits("1" * 14 + "000" + "111"), of(2): hits("0" * 14 + "111" + "111")}) == []


def test_nothing_is_hopeless_alone_or_beside_its_equal() -> None:
    good, bad = hits("1" * 100, "1" * 100), hits("0" * 100, "0" * 100)
    assert hopeless({of(1, "good"): good, of(1, "bad"): bad}) == []  # each the only one of its method
    assert hopeless({of(1): good, of(2): good}) == []
    assert hopeless({of(1): bad, of(2): bad}) == []
    assert hopeless({of(1, "x"): good, of(1, "y"): bad, of(2, "y"): bad, of(2, "x"): bad}) == [of(2, "x")]


def test_only_what_is_behind_by_both_is_hopeless() -> None:
    best_on_average = hits("1" * 100, "1" * 60 + "0" * 40)
    best_by_worst = hits("1" * 70 + "0" * 30, "1" * 70 + "0" * 30)
    assert hopeless({of(1): best_on_average, of(2): best_by_worst}) == []
    # as good as the best one by worst task, if on another task, and far behind on average
    other_worst = hits("1" * 68 + "0" * 32, "1" * 70 + "0" * 30)
    assert hopeless({of(1): hits("1" * 100, "0" * 30 + "1" * 70), of(2): other_worst}) == []
    for worst, expected in ((55, []), (45, [of(2)])):  # of 70, on another task: 3 standard errors are .21
        far = hits("1" * worst + "0" * (100 - worst), "1" * 70 + "0" * 30)
        assert hopeless({of(1): hits("1" * 100, "0" * 30 + "1" * 70), of(2): far}) == expected


@pytest.mark.parametrize(("tasks", "images"), [(1, 1), (4, 1), (1, 5), (2, 5), (4, 5), (8, 2)])
def test_tiny_data_stops_none_of_many_equal_settings(tasks: int, images: int) -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        drawn = {
            of(number, method): {f"t{task}": torch.rand(images, generator=random) < 0.6 for task in range(tasks)}
            for number in range(8)
            for method in "xy"
        }
        assert hopeless(drawn) == []


def test_what_was_stopped_is_never_the_best() -> None:
    part = Row(of(1), {"t": TaskResult(25, 25)}, stopped=True)
    whole = Row(of(2), {"t": TaskResult(60, 100)})
    assert best_rows([part, whole]) == {"x": {"average": whole, "worst": whole}}
    values = {"x": {(None, 0.5): 1.0, (None, 1.0): 0.6}}
    heat = plots.accuracy_heatmap(values, [], [0.5, 1.0], {("x", None, 0.5)})
    assert heat.get_suptitle() == "Best on average: x at alpha 1, 60.0%"
    assert [text.get_text() for text in heat.axes[0].texts] == ["(100.0)", "60.0"]


# --- in a sweep -----------------------------------------------------------------------------------------------------


@pytest.fixture(name="doomed")
def one_is_found_hopeless_after_half(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The setting of alpha `DOOMED`, whatever it gets right; how many images of a task it was decided on."""
    asked: list[int] = []

    def decide(drawn: Mapping[Setting, Mapping[str, Tensor]]) -> list[Setting]:
        asked.extend({len(right) for by_task in drawn.values() for right in by_task.values()})
        return [setting for setting in drawn if setting.alpha == DOOMED and asked[-1] == 2]

    monkeypatch.setattr(bench, "hopeless", decide)
    return asked


@pytest.mark.usefixtures("own_cache")
def test_a_stopped_setting_keeps_honest_numbers_and_is_said_to_be(
    clip_zoo: Path, run: Run, tmp_path: Path, doomed: list[int]
) -> None:
    grid = ("--method", "task-arithmetic", "mean", "--alpha", 0.3, 0.5, DOOMED)
    code, output, complaint = run(*words(clip_zoo), *grid, "--stop-hopeless")
    assert (code, complaint) == (0, "")
    out = tmp_path / "sweep"
    report = strict(out / "sweep.json")
    stopped = [own for own in report["results"] if own.get("stopped")]
    assert [(own["method"], own["alpha"]) for own in stopped] == [("task-arithmetic", DOOMED)]
    assert doomed == [1, 2]
    assert [task["samples"] for task in stopped[0]["tasks"].values()] == [2, 2]
    share = stopped[0]["average"]
    assert stopped[0]["standard_error"] == pytest.approx((share * (1 - share) / 2 / 2) ** 0.5)
    assert report["stopped"] == {"settings": 1, "spared": pytest.approx(4 / (4 * 8))}
    assert all(task["samples"] == 4 for task in report["chosen_on"]["tasks"].values())
    for chosen in (
        *report["best"].values(),
        *(own for both in report["best_of_method"].values() for own in both.values()),
    ):
        assert "stopped" not in chosen
    with open(out / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    marked = {(line["method"], line["alpha"]) for line in lines if line["stopped"] == "1"}
    assert marked == {("task-arithmetic", str(DOOMED))}
    markdown = (out / "sweep.md").read_text()
    assert markdown.count("| 4, stopped |") == 1
    assert markdown.count("| 8 |") == 3
    assert "Stopped on a part of the images: 1 of 4 settings, behind" in markdown
    assert "4 settings on 8 validation images of 2 tasks, 1 of them stopped early: 12% of the work spared" in output


@pytest.mark.usefixtures("own_cache")
def test_no_picture_is_decoded_twice_and_none_shown_to_a_stopped_setting(
    clip_zoo: Path, monkeypatch: pytest.MonkeyPatch, doomed: list[int]
) -> None:
    decoded: list[int] = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda value: decoded.append(1) or decode(value))
    classified: list[int] = []
    top1 = Classifier.top1

    def counted(model: Classifier, inputs: Tensor, *more: Any) -> Tensor:
        classified.append(len(inputs))
        return top1(model, inputs, *more)

    monkeypatch.setattr(Classifier, "top1", counted)
    done: list[tuple[str, int, int]] = []
    grid = Grid(("task-arithmetic",), alphas=(0.3, 0.5, DOOMED))
    found = sweep(recipe(clip_zoo), grid, "early", lambda *step: done.append(step), stop_hopeless=True)
    assert doomed == [1, 2]
    assert [row.images for row in found.rows] == [4, 8, 8]
    assert len(decoded) == 8
    assert sum(classified) == 4 + 8 + 8
    assert sum(count for stage, count, _ in done if stage == "validating") == 3 * 8  # the bar reaches its end
    decoded.clear()
    whole = sweep(recipe(clip_zoo), grid, "whole")
    assert len(decoded) == 8
    rows = {row.setting: row for row in whole.rows}
    for row in found.rows:
        if not row.stopped:  # shown in three parts, and counted as in one
            assert row.tasks == rows[row.setting].tasks
    assert whole.best["task-arithmetic"]["average"].setting == found.best["task-arithmetic"]["average"].setting


@pytest.mark.usefixtures("own_cache")
def test_without_the_flag_nothing_is_said_of_it_and_with_it_tiny_data_stop_nothing(clip_zoo: Path) -> None:
    grid = Grid(("task-arithmetic",), alphas=(0.3, DOOMED))
    plain = sweep(recipe(clip_zoo), grid, "plain")
    assert "stopped" not in json.dumps(plain.to_json())
    for file in ("sweep.csv", "sweep.md"):
        assert "stopped" not in (Path("plain") / file).read_text()
    early = sweep(recipe(clip_zoo), grid, "early", stop_hopeless=True)
    assert [row.tasks for row in early.rows] == [row.tasks for row in plain.rows]
    assert early.to_json()["stopped"] == {"settings": 0, "spared": 0}


def test_rounds_grow() -> None:
    assert all(first < second for first, second in pairwise((0, *stopping.SHARES, 1)))
