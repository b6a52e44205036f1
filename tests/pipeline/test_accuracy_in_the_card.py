"""Accuracies of a merge as its card and the Hub show them: table, picture, `.eval_results/`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from PIL import Image

from helpers.command import Run, contents, fails
from helpers.hub_cases import in_a_process
from helpers.hub_server import StandInHub
from hf_epimer import evaluate, plotting
from hf_epimer.evaluation import accuracy as measuring
from hf_epimer.evaluation.results import Results, Split, TaskResult
from hf_epimer.pipeline import eval_results
from hf_epimer.pipeline.eval_results import FILE, write_eval_results
from hf_epimer.pipeline.picture import BASE, FINE_TUNED, MERGED, TEXT, accuracy_bars
from hf_epimer.tasks import images
from hf_epimer.tasks.decode import decode
from hf_epimer.tasks.task import benchmark_tasks

LIGHT, DARK = "#ffffff", "#0b0f19"
"""The grounds of the Hub's pages."""

MEASURED = ("--method", "mean", "--evaluate", "--out", "out")
needs_eval_results = pytest.mark.skipif(
    not hasattr(huggingface_hub, "EvalResultEntry"), reason="for newer releases of huggingface_hub"
)


def merge_words(zoo: Path, *more: object) -> list[object]:
    tasks = [zoo / "a.json", zoo / "b.json"]
    return ["merge", f"a={zoo / 'a'}", f"b={zoo / 'b'}", "--base", zoo / "base", "--task", *tasks, *MEASURED, *more]


def results() -> Results:
    rows = {"dtd": TaskResult(3, 4), "svhn": TaskResult(1, 4)}
    split = Split("org/data", None, "test")
    return Results("m", "b", rows, dict.fromkeys(rows, split))


def contrast(one: str, other: str) -> float:
    """Of two colours, 1 to 21 (WCAG 2, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_base_and_fine_tuned_models_stand_beside_the_merge(
    clip_zoo: Path, run: Run, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    monkeypatch.setattr(images, "decode", lambda value: decoded.append(value) or decode(value))
    monkeypatch.setattr(measuring, "BELIEVED", 0.0)  # or some are decoded again, to be compared with zero-shot
    assert run(*merge_words(clip_zoo, "--compare"))[::2] == (0, "")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert len(decoded) == sum(row["samples"] for row in rows.values())
    for name in "ab":
        for whose, model in (("base", "base"), ("fine_tuned", name)):
            alone = evaluate(str(clip_zoo / model), [str(clip_zoo / f"{name}.json")], str(clip_zoo / "base"))
            assert rows[name][whose] == alone.accuracies[name]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| task | accuracy | 95% interval | samples | base | fine-tuned |\n|---|---|---|---|---|---|\n" in card
    first = rows["a"]
    assert f" {first['samples']} | {first['base']:.3f} | {first['fine_tuned']:.3f} |\n" in card
    assert "beside base and fine-tuned" in card and "](accuracy.png)" in card


def test_without_matplotlib_there_is_no_picture_and_a_word_about_it(
    clip_zoo: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: Path
) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    code, _, complaint = run(*merge_words(clip_zoo))
    assert code == 0
    assert complaint == (
        "warning: the card has no picture of the accuracies: the pictures need matplotlib: "
        "pip install 'hf-epimer[plots]'\n"
    )
    assert "accuracy.png" not in contents(tmp_path / "out")
    assert ".png" not in (tmp_path / "out" / "README.md").read_text()


def test_the_picture_can_be_read_on_light_and_on_dark() -> None:
    for ground in (LIGHT, DARK):
        assert all(contrast(colour, ground) >= 3 for colour in (BASE, MERGED, FINE_TUNED))
        assert contrast(TEXT, ground) >= 4
    figure = accuracy_bars(replace(results(), of_base={"dtd": 0.5, "svhn": 0.1}, fine_tuned={"dtd": 0.8}))
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "The merge reaches 50.0% on average, its base 30.0%"
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[50, 10, 30], [75, 25, 50], [80]]  # an average of those only that were measured on every task
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dtd", "svhn", "average"]
    alone = accuracy_bars(results(), limit=4)
    assert len(alone.axes[0].containers) == 1 and not alone.legends
    assert "first 4 test images" in alone.axes[0].get_xlabel()


@needs_eval_results
def test_accuracies_for_the_benchmarks_are_percentages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 of 4 is 75; the tiny merges of the other tests may be right about nothing."""
    monkeypatch.setattr(eval_results, "data_revision", lambda task: "0" * 40)
    tasks = [benchmark_tasks()["dtd"], benchmark_tasks()["svhn"]]
    write_eval_results(tmp_path, [tasks[1].dataset, f"{tasks[0].dataset}:textures"], tasks, results())
    entries = huggingface_hub.parse_eval_result_entries(yaml.safe_load((tmp_path / FILE).read_text()))
    found = {(entry.dataset_id, entry.task_id): entry.value for entry in entries}
    assert found == {(tasks[0].dataset, "textures"): 75.0, (tasks[1].dataset, "default"): 25.0}


@pytest.mark.slow
@needs_eval_results
def test_picture_and_results_for_the_benchmarks_are_pushed_and_go_with_other_weights(
    benchmark_hub: StandInHub, run: Run, tmp_path: Path
) -> None:
    models = ("org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--push-to", "org/m")
    listed = ("--evaluate", "--out", "out", "--eval-results", "tanganke/DTD:textures")
    done = in_a_process(benchmark_hub, tmp_path, "merge", *models, *listed)
    assert done.returncode == 0, done.stderr
    (entry,) = huggingface_hub.parse_eval_result_entries(yaml.safe_load(benchmark_hub.read("org/m", FILE)))
    measured = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["dtd"]["accuracy"]
    assert (entry.dataset_id, entry.task_id) == ("tanganke/dtd", "textures")
    assert entry.value == pytest.approx(100 * measured, abs=0.005)
    assert entry.dataset_revision == benchmark_hub.commits("tanganke/dtd", repo_type="dataset")[0].oid
    assert entry.notes and "split test, top-1, zero-shot, hf-epimer" in entry.notes
    recipe = json.loads((tmp_path / "out" / "merge_config.json").read_text())
    assert recipe["eval_results"] == ["tanganke/DTD:textures"]
    assert benchmark_hub.read("org/m", "accuracy.png") == (tmp_path / "out" / "accuracy.png").read_bytes()
    with Image.open(tmp_path / "out" / "accuracy.png") as picture:
        assert picture.info["Software"] == "hf-epimer"
        assert picture.convert("RGBA").getpixel((0, 0))[3] == 0  # transparent: whatever the page's ground is
    assert run("merge", *models, "--out", "plain")[0] == 0
    assert not {"accuracy.png", FILE} & set(benchmark_hub.commits("org/m")[0].files)


@needs_eval_results
@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--evaluate", "--eval-results", "org/other"), "--eval-results org/other: 0 of the tasks .*tanganke/dtd"),
        (("--evaluate", "--eval-results", "tanganke/dtd", "--limit", "5"), "leave --limit out"),
        (("--eval-results", "tanganke/dtd"), "--eval-results needs --evaluate"),
        (("--compare",), "--compare needs --evaluate"),
    ],
)
def test_results_that_cannot_be_listed(
    benchmark_hub: StandInHub, run: Run, tmp_path: Path, more: tuple[str, ...], why: str
) -> None:
    fails(run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out", "out", *more), why, 2)
    assert not (tmp_path / "out").exists()
