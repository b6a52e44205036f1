"""`hf-epimer sweep`: what it writes, what it draws, what it refuses."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.command import Run, contents, fails, strict
from helpers.hub_cases import in_a_process
from helpers.hub_server import StandInHub
from helpers.sweeps import recipe, words
from hf_epimer import Grid, merge_state_dicts, plotting, sweep
from hf_epimer.analysis import plots
from hf_epimer.analysis.sweep import sweep as sweeping
from hf_epimer.analysis.sweep.bench import Bench
from hf_epimer.evaluation.accuracy import evaluate_folder
from hf_epimer.methods import METHODS
from hf_epimer.models.classifier import Classifier
from hf_epimer.tasks.task import load_task_file

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_sweep_is_complete(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    grid = ("--method", "epimer", "ties", "mean", "--rank", 2, "max", "--alpha", 0.5, 1.25, "--normalize", "trace")
    code, output, complaint = run(*words(clip_zoo), *grid, "--samples", 30, "--test", "--out", "out")
    assert (code, complaint) == (0, "")
    out = tmp_path / "out"
    assert contents(out) == ["heatmap.png", "lines.png", "sweep.csv", "sweep.json", "sweep.md"]
    report = strict(out / "sweep.json")
    settings = [(own["method"], own["rank"], own["alpha"]) for own in report["results"]]
    assert settings == [
        ("epimer", 2, 0.5), ("epimer", 2, 1.25), ("epimer", 8, 0.5), ("epimer", 8, 1.25), ("ties", None, 0.5),
        ("ties", None, 1.25), ("mean", None, None),
    ]  # fmt: skip
    assert report["methods"]["epimer"]["normalize"] == "trace"
    assert report["chosen_on"]["seed"] == 0
    assert report["chosen_on"]["tasks"] == {name: {"split": "train", "rows_before": 36, "samples": 4} for name in "ab"}
    for criterion, value in (("average", lambda own: own["average"]), ("worst", lambda own: own["worst"]["accuracy"])):
        assert value(report["best"][criterion]) == max(map(value, report["results"]))
        assert report["best"][criterion]["command"] in output
        assert report["best"][criterion]["command"] in (out / "sweep.md").read_text()
    assert {own["method"] for own in report["test"]} == {"epimer", "ties", "mean"}
    assert all(task["samples"] == 40 for own in report["test"] for task in own["tasks"].values())
    with open(out / "sweep.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    validated = [line for line in lines if line["split"] == "validation"]
    assert len(validated) == len(settings) * 4
    assert len(lines) - len(validated) == len(report["test"]) * 4
    for number, own in enumerate(report["results"]):
        a, b, average, worst = validated[4 * number : 4 * number + 4]
        assert [line["measure"] for line in (a, b, average, worst)] == ["task", "task", "average", "worst"]
        assert (a["method"], a["rank"] or None) == (own["method"], own["rank"] and str(own["rank"]))
        assert float(a["accuracy"]) == own["tasks"]["a"]["accuracy"] == int(a["correct"]) / int(a["samples"])
        assert (
            float(average["accuracy"])
            == own["average"]
            == pytest.approx(np.mean([float(x["accuracy"]) for x in (a, b)]))
        )
        assert (worst["task"], float(worst["accuracy"])) == (own["worst"]["task"], own["worst"]["accuracy"])
    markdown = (out / "sweep.md").read_text()
    assert markdown.count("\n| mean |  |  | ") == 2  # among all, and on test
    assert markdown.count("\n| mean | both |  |  | ") == 1
    assert "4 of a, 4 of b" in markdown
    assert all(line.count("|") == 8 for line in markdown.split("## All settings")[1].split("##")[0].split("\n") if line)
    assert "folder  out" in output


def test_json_is_one_object_and_limits_are_kept(clip_zoo: Path, run: Run) -> None:
    code, output, complaint = run(*words(clip_zoo), "--method", "mean", "--limit", 2, "--json", "--weights", 2, 1)
    assert (code, complaint) == (0, "")
    report = json.loads(output)
    assert report["weights"] == pytest.approx([2 / 3, 1 / 3])
    assert [task["samples"] for task in report["results"][0]["tasks"].values()] == [2, 2]
    assert report["pictures"] == ["heatmap.png", "lines.png"]
    assert report["test"] is None
    assert "--weights 2.0 1.0" in report["best"]["average"]["command"]
    fails(run(*words(clip_zoo), "--method", "mean"), "not empty")
    assert run(*words(clip_zoo), "--method", "mean", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("more", "pattern", "code"),
    [
        (("--method", "magic"), "no method 'magic'", 2),
        (("--rank", 0), "--rank must be whole numbers of at least 1, or max, not 0", 2),
        (("--rank", "most"), "--rank", 2),
        (("--alpha", "nan"), "--alpha must be finite", 2),
        (("--alpha", 1, "inf"), "--alpha must be finite", 2),
        (("--limit", 0), "--limit must be a whole number of at least 1", 2),
        (("--method", "tsv-m", "--density", 0.5), "none of these methods has an option --density", 2),
        (("--method", "mean", "--fisher", "x=a.json"), "does not exist|neither", 2),
        (("--method", "mean", "--dtype", "int8"), "--dtype", 2),
        (("--method", "mean", "--weights", 1), "2 models, 1 weights", 2),
        (("--method", "mean", "--samples", 0), "--samples", 2),
        (("--push-to", "org/x"), "--push-to", 2),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_is_written(
    more: tuple[object, ...], pattern: str, code: int, clip_zoo: Path, run: Run, tmp_path: Path
) -> None:
    fails(run(*words(clip_zoo), *more), pattern, code)
    assert [name for name in contents(tmp_path) if name != "home"] == []  # heads are kept there


def test_without_tasks_or_text_tower_there_is_nothing_to_measure(
    clip_zoo: Path, tiny_zoo: Path, run: Run, tmp_path: Path
) -> None:
    plain = ("sweep", clip_zoo / "a", clip_zoo / "b", "--base", clip_zoo / "base", "--method", "mean")
    fails(run(*plain), r"its task must be known: label it \(mnist=.* or add --task FILE", 2)
    fails(run("sweep"), "give the checkpoints", 2)
    blind = ("sweep", f"a={tiny_zoo / 'a'}", "--base", tiny_zoo / "base", "--method", "mean")
    fails(run(*blind, "--task", clip_zoo / "a.json"), "no text tower")


def test_a_missing_test_split_is_found_before_the_work(
    clip_zoo: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "merge_candidates", lambda *a, **k: pytest.fail("merged"))
    content = json.loads((clip_zoo / "a.json").read_text())
    (tmp_path / "a.json").write_text(
        json.dumps(content | {"dataset": str(clip_zoo / "data" / "a"), "test_split": "exam"})
    )
    plain = ("sweep", f"a={clip_zoo / 'a'}", "--base", clip_zoo / "base", "--task", "a.json", "--method", "mean")
    fails(run(*plain, "--test"), "exam")


def test_files_of_two_kinds_cannot_both_be_given(clip_zoo: Path, run: Run) -> None:
    given = ("--method", "epimer", "regmean", "--samples", 30, "--rank", 2, "--alpha", 1)
    assert run(*words(clip_zoo), *given)[::2] == (0, "")  # estimated, each in a pass of its own
    for name in "ab":
        task = ("--task", clip_zoo / f"{name}.json", "--base", clip_zoo / "base", "--out", f"{name}.safetensors")
        assert run("fisher", clip_zoo / name, *task, "--samples", 30)[0] == 0
    fisher = ("--fisher", "a=a.safetensors", "b=b.safetensors", "--overwrite")
    fails(run(*words(clip_zoo), *given, *fisher), "epimer and regmean need files of different kinds", 2)


@pytest.mark.slow
def test_a_projected_metric_is_measured_in_the_basis_of_every_rank(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    grid = Grid(("epimer", "tsv-m"), (2, 4), (1.0,), {"metric": "projected"})
    found = sweep(recipe(clip_zoo), grid, test=True)
    for row in found.test:
        command = shlex.split(found.commands[row.setting])
        assert ("--metric" in command) == (row.setting.method == "epimer")
        assert run(*command[1:], "--out", "merged", "--overwrite")[0] == 0
        tasks = [load_task_file(clip_zoo / f"{name}.json") for name in "ab"]
        expected = evaluate_folder(tmp_path / "merged", clip_zoo / "base", tasks, name="")
        assert row.average == pytest.approx(expected.average)


@pytest.mark.slow
def test_what_a_sweep_finds_is_not_calibrated_and_its_command_says_so(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    """A sweep merges layer by layer, whatever the recipe or the method would do by themselves."""
    asked = recipe(clip_zoo, calibrate=True, tune_alpha=True)
    found = sweep(asked, Grid(("kronecker-core", "mean"), (2,), (1.0,)))
    commands = {setting.method: shlex.split(command) for setting, command in found.commands.items()}
    for method, command in commands.items():
        assert ("--no-calibrate" in command) == (method == "kronecker-core")
        code, out, err = run(*command[1:], "--out", f"merged-{method}", "--dry-run", "--json")
        assert code == 0 and json.loads(out)["calibrate_on"] == [], err
    assert commands
    assert asked.looked_into("x") == recipe(clip_zoo, out="x", calibrate=False, tune_alpha=False)


def test_the_tower_holds_the_merge_rounded_as_it_would_be_stored(
    clip_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    original = Classifier.top1

    def noted(model: Classifier, inputs: Tensor, *more: Any) -> Tensor:
        seen.append({name: value.detach().clone() for name, value in model.tower_parameters().items()})
        return original(model, inputs, *more)

    monkeypatch.setattr(Classifier, "top1", noted)
    sweep(recipe(clip_zoo, dtype="bfloat16"), Grid(("mean",)))
    assert all(torch.equal(value, value.bfloat16().float()) for value in seen[0].values())
    base, *tuned = (load_file(clip_zoo / name / "model.safetensors") for name in ("base", "a", "b"))
    expected = merge_state_dicts(
        {name: base[name] for name in seen[0]}, [{n: t[n] for n in seen[0]} for t in tuned], "mean"
    )
    assert all(torch.equal(value, expected[name].bfloat16().float()) for name, value in seen[0].items())
    seen.clear()
    sweep(recipe(clip_zoo), Grid(("task-arithmetic",), alphas=(0.2, 0.7)), "scaled")
    config = METHODS["task-arithmetic"].config(alpha=0.7)
    own = [{n: t[n] for n in seen[0]} for t in tuned]
    expected = merge_state_dicts({name: base[name] for name in seen[0]}, own, "task-arithmetic", config)
    assert len(seen) == 4  # two tasks, two settings
    for state in seen[2:]:
        assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in state.items())
    with pytest.raises(ArithmeticError, match=r"do not fit into torch\.float16"):
        sweep(recipe(clip_zoo, dtype="float16"), Grid(("task-arithmetic",), alphas=(1e9,)), "other")
    assert not Path("other").exists()


def test_damage_leaves_nothing_behind(clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(clip_zoo), Grid(("mean",)))
    assert [name for name in contents(tmp_path) if name != "home"] == []  # heads are kept there


# --- the pictures ---------------------------------------------------------------------------------------------------


def test_the_pictures_say_the_finding() -> None:
    values: dict[str, dict[tuple[int | None, float | None], float]] = {
        "epimer": {(4, 0.5): 0.5, (4, 1.0): 0.81, (8, 0.5): 0.6, (8, 1.0): 0.2},
        "ties": {(None, 0.5): 0.7, (None, 1.0): 0.7},
        "mean": {(None, None): 0.55},
    }
    heat = plots.accuracy_heatmap(values, [4, 8], [0.5, 1.0])
    assert heat.get_suptitle() == "Best on average: epimer at rank 4, alpha 1, 81.0%"
    panels = heat.axes[:3]
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [
        ["50.0", "81.0", "60.0", "20.0"], ["70.0", "70.0"], ["55.0"]
    ]  # fmt: skip
    assert [len(axes.patches) for axes in panels] == [1, 0, 0]
    assert panels[0].images[0].get_clim() == (61, 81)
    alone = plots.accuracy_heatmap({"mean": {(None, None): 0.5}}, [4], [1.0])
    assert alone.get_suptitle() == "Best on average: mean, 50.0%"
    lines = plots.accuracy_by_alpha(
        {"epimer": (4, {0.5: (0.5, 0.4), 1.0: (0.81, 0.3)}), "mean": (None, {None: (0.55, 0.45)})}
    )
    assert [axes.get_title(loc="left") for axes in lines.axes[:2]] == [
        "average over tasks: epimer reaches 81.0%", "worst task: mean reaches 45.0%"
    ]  # fmt: skip


def test_without_matplotlib_the_report_is_there(clip_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    code, output, complaint = run(*words(clip_zoo), "--method", "mean")
    assert code == 1
    assert complaint.startswith("error: the pictures need matplotlib: pip install 'hf-epimer[plots]'")
    assert "sweep.json is complete" in complaint
    assert contents(Path("sweep")) == ["sweep.csv", "sweep.json", "sweep.md"]
    assert "best on average" in output


@pytest.mark.slow
def test_a_sweep_of_repos_gives_a_command_with_their_commits(benchmark_hub: StandInHub, tmp_path: Path) -> None:

    def command(*words: object) -> None:
        done = in_a_process(benchmark_hub, tmp_path, *words)
        assert (done.returncode, done.stderr) == (0, "")

    grid = ("--method", "epimer", "regmean", "--rank", 2, 4, "--alpha", 1, "--samples", 11, "--test")
    command("sweep", "org/vit-b32-dtd", "org/vit-b32-svhn", *grid)
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    chosen = report["best"]["average"]
    words = shlex.split(chosen["command"])
    commits = [benchmark_hub.commits(f"org/{name}")[0].oid for name in ("vit-b32-dtd", "vit-b32-svhn", "base")]
    assert [word.split("@")[1] for word in (*words[2:4], words[5])] == commits
    command(*words[1:], "--evaluate", "--out", "merged")
    results = json.loads((tmp_path / "merged" / "results.json").read_text())
    tested = next(own for own in report["test"] if (own["method"], own["rank"]) == (chosen["method"], chosen["rank"]))
    for task, row in tested["tasks"].items():
        assert row["correct"] == results["tasks"][task]["correct"]
