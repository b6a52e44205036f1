"""`hf-epimer sweep`: the same weights as merges one by one, chosen on validation alone, and what it writes."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from helpers.checkpoints import StateDict as Tensors
from helpers.checkpoints import tiny_state
from helpers.command import Run, contents, fails
from helpers.statistics import statistics
from hf_epimer import Grid, MergeRecipe, ModelRef, merge_state_dicts, sweep
from hf_epimer.analysis import plots as plots
from hf_epimer.analysis.sweep import sweep as sweeping
from hf_epimer.analysis.sweep import validation as validation
from hf_epimer.analysis.sweep.candidates import group_candidates, largest_rank, merge_candidates, task_vector_file
from hf_epimer.analysis.sweep.grid import Candidate, Setting, config_of
from hf_epimer.analysis.sweep.report import Row, best_rows
from hf_epimer.analysis.sweep.validation import validation_samples
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.errors import EpimerError, OutputError, UsageError
from hf_epimer.evaluation.accuracy import evaluate_folder
from hf_epimer.evaluation.results import TaskResult
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.methods import METHODS
from hf_epimer.tasks.images import read_samples
from hf_epimer.tasks.task import load_task_file

ALL = list(METHODS)
FREE = [name for name, method in METHODS.items() if method.needs is None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of statistics for every test, and a folder to write to."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "hf-epimer" / "statistics"


class Counting(StateDict):
    """A source that notes what is read of it."""

    def __init__(self, label: str, tensors: Tensors) -> None:
        super().__init__(label, tensors)
        self.reads: Counter[str] = Counter()

    def tensor(self, name: str) -> Tensor:
        self.reads[name] += 1
        return super().tensor(name)


def swept(
    candidates: list[Candidate], base: Tensors, tuned: list[Tensors], folder: Path, **arguments: Any
) -> tuple[list[Tensors], Ingredients]:
    """Task vectors of all candidates, and the sources with their counts."""
    needs = next((own.method.name for own in candidates if own.statistic), None)
    measured = statistics(needs, len(tuned)) if needs else None
    if needs == "regmean" and measured:
        measured = [{f"{name}.input_factor": gram for name, gram in own.items()} for own in measured]
    ingredients = Ingredients(
        Counting("base", base),
        [Counting(f"model {number}", own) for number, own in enumerate(tuned)],
        [1 / len(tuned)] * len(tuned),
        [Counting(f"statistics {number}", own) for number, own in enumerate(measured)] if measured else None,
    )
    shapes = ingredients.base.shapes
    with task_vector_file(folder / "vectors", shapes, len(candidates)) as stored:
        merge_candidates(ingredients, dict(enumerate(candidates)), stored, **arguments)
        found = [{name: stored.read(number, name) for name in shapes} for number in range(len(candidates))]
    assert not (folder / "vectors").exists()
    return found, ingredients


def words(zoo: Path, *more: object) -> tuple[object, ...]:
    models = (f"{name}={zoo / name}" for name in "ab")
    return ("sweep", *models, "--base", zoo / "base", "--task", zoo / "a.json", zoo / "b.json", *more)


def recipe(zoo: Path, **arguments: Any) -> MergeRecipe:
    models = tuple(ModelRef.parse(f"{name}={zoo / name}") for name in "ab")
    tasks = (str(zoo / "a.json"), str(zoo / "b.json"))
    return MergeRecipe(models, ModelRef.parse(str(zoo / "base")), **{"tasks": tasks, "samples": 30} | arguments)


def strict(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    return content


# --- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("exact", [False, True])
def test_every_setting_is_the_merge_of_its_own(method: str, exact: bool, base_state: Tensors, tmp_path: Path) -> None:
    tuned = [tiny_state(t + 1, base_state) for t in range(3)]
    grid = Grid((method, "tsv-m", "mean"), (2, 5, 64), (0.5, 1.0, 1.7))
    candidates = grid.candidates(64)
    found, _ = swept(candidates, base_state, tuned, tmp_path, exact=exact, seed=3)
    measured = statistics(method, 3)
    for number, own in enumerate(candidates):
        for setting in grid.settings(own):
            needs = measured if own.method.name == method else None
            expected = merge_state_dicts(
                base_state, tuned, own.method.name, config_of(own, setting), needs, seed=3, exact=exact
            )
            for name, start in base_state.items():
                merged = start + (1.0 if setting.alpha is None else setting.alpha) * found[number][name]
                assert torch.allclose(merged, expected[name], rtol=1e-6, atol=2e-6), (setting, name)


def test_large_matrices_agree_within_the_decompositions_tolerance(tmp_path: Path) -> None:
    """Where ranks share an iterative decomposition at the largest of them."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200, 160, generator=generator)}
    decay = torch.logspace(0, -2, 160)
    tuned = [
        {
            "w": base["w"]
            + (torch.randn(200, 160, generator=generator) * decay) @ torch.randn(160, 160, generator=generator)
        }
        for _ in range(2)
    ]
    grid = Grid(("tsv-m",), (4, 16), (1.0,))
    found, _ = swept(grid.candidates(80), base, tuned, tmp_path)
    for number, rank in enumerate((4, 16)):
        expected = merge_state_dicts(base, tuned, "tsv-m", METHODS["tsv-m"].config(rank=rank))["w"] - base["w"]
        assert float((found[number]["w"] - expected).norm() / expected.norm()) < 1e-3


def test_one_pass_serves_the_grid(base_state: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of every file once, every task vector decomposed once, every distinct rank solved once."""
    from hf_epimer.analysis.sweep import candidates as module
    from hf_epimer.methods import epimer

    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(module, "task_triples", counted("decompose", module.task_triples))
    monkeypatch.setattr(epimer, "frechet_mean", counted("solve", epimer.frechet_mean))
    tuned = [tiny_state(t + 1, base_state) for t in range(3)]
    grid = Grid(("epimer", "tsv-m", "mean", "iso-c", "fisher"), (2, 4, 50), (0.5, 1.0, 1.5, 2.0))
    _, ingredients = swept(grid.candidates(50), base_state, tuned, tmp_path)
    for source in ingredients.sources():
        assert set(source.reads.values()) == {1}, source.label  # type: ignore[attr-defined]
    matrices = [name for name, value in base_state.items() if value.ndim == 2]
    assert calls["decompose"] == len(matrices)
    position = next(name for name in matrices if "position" in name)  # 5 x 32: rank 1 for all three
    assert calls["solve"] == 3 * len(matrices) - 2 * (base_state[position].shape[0] // 3 == 1)


def test_surveys_take_passes_of_their_own_and_no_statistics(base_state: Tensors, tmp_path: Path) -> None:
    tuned = [tiny_state(t + 1, base_state) for t in range(2)]
    _, ingredients = swept(Grid(("ties", "epimer"), (4, 8)).candidates(8), base_state, tuned, tmp_path)
    assert set(ingredients.models[0].reads.values()) == {3}  # type: ignore[attr-defined]
    assert ingredients.statistics
    assert set(ingredients.statistics[0].reads.values()) == {1}  # type: ignore[attr-defined]


def test_a_merge_that_is_not_finite_is_an_error(base_state: Tensors, tmp_path: Path) -> None:
    tuned = [{name: value * 3e38 for name, value in tiny_state(1, base_state).items()}] * 2
    with pytest.raises(EpimerError, match="NaN or Inf"):
        swept(Grid(("mean",)).candidates(8), base_state, tuned, tmp_path)


def test_too_little_room_is_said_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"4000\.0 GB beside --out"),
        task_vector_file(tmp_path / "x", {"w": (10**9, 100)}, 10),
    ):
        pass
    assert [name for name in contents(tmp_path) if name != "home"] == []  # heads are kept there


# --- the grid -------------------------------------------------------------------------------------------------------


def test_methods_without_rank_or_alpha_appear_once() -> None:
    grid = Grid(("tsv-m", "ties", "mean", "mean"), (16, 4, "max", 4), (1, 0.5))
    settings = [setting for own in grid.candidates(12) for setting in grid.settings(own)]
    assert [str(setting) for setting in settings] == [
        "tsv-m, rank 4, alpha 0.5", "tsv-m, rank 4, alpha 1", "tsv-m, rank 12, alpha 0.5", "tsv-m, rank 12, alpha 1",
        "tsv-m, rank 16, alpha 0.5", "tsv-m, rank 16, alpha 1", "ties, alpha 0.5", "ties, alpha 1", "mean",
    ]  # fmt: skip
    assert len(Grid(("tsv-m",), (12, "max")).candidates(12)) == 1


def test_options_go_to_the_methods_that_have_them() -> None:
    grid = Grid(("epimer", "fisher", "mean"), (4,), options={"damping": 0.5, "normalize": "trace"})
    epimer, fisher, mean = (own.config for own in grid.candidates(4))
    assert (epimer.damping, epimer.normalize, epimer.alpha, fisher.damping) == (0.5, "trace", 1.0, 0.5)
    assert mean == METHODS["mean"].config()
    with pytest.raises(UsageError, match=r"none of these methods has an option --density; ties has it"):
        Grid(("epimer",), options={"density": 0.5})
    with pytest.raises(UsageError, match="--damping must be at least 0"):
        Grid(("epimer",), options={"damping": -1.0})


def test_the_largest_rank_is_the_first_that_changes_nothing() -> None:
    assert largest_rank({"a": (30, 20), "b": (9, 40), "c": (100,)}, 3) == 6
    assert largest_rank({"a": (2, 2)}, 3) == 1


def test_passes_are_shared_by_what_needs_the_same_statistics() -> None:
    def groups(*names: str, **options: Any) -> list[list[str]]:
        candidates = Grid(names, (2, 4), options=options).candidates(4)
        return [[str(candidates[n].method.name) for n in own] for own in group_candidates(candidates)]

    assert groups("mean", "epimer", "ties", "fisher") == [["mean", "epimer", "epimer", "ties", "fisher"]]
    assert groups("mean", "ties") == [["mean", "ties"]]
    assert groups("epimer", "regmean", "mean") == [["epimer", "epimer", "mean"], ["regmean"]]
    projected = groups("epimer", "tsv-m", metric="projected")
    assert projected == [["epimer"], ["epimer"], ["tsv-m", "tsv-m"]]  # another basis, other statistics


# --- validation -----------------------------------------------------------------------------------------------------


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


def test_pictures_are_decoded_once_in_bounded_memory(clip_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_epimer.tasks import images as data

    decoded: list[int] = []
    original = data.decode
    monkeypatch.setattr(data, "decode", lambda value: decoded.append(1) or original(value))
    grid = Grid(("mean", "task-arithmetic"), alphas=(0.1, 0.3, 0.5, 0.7))
    whole = sweep(recipe(clip_zoo), grid, "whole")
    assert len(decoded) == 8
    monkeypatch.setattr(validation, "MEMORY_FOR_PIXELS", 1)
    original_measure, loads = validation.measure, []

    def measure(model: Any, samples: Any, loaders: Any, **named: Any) -> Any:
        noted = [lambda load=load: loads.append(1) or load() for load in loaders]
        return original_measure(model, samples, noted, batch_size=3, **named)

    monkeypatch.setattr(sweeping, "measure", measure)
    parts = sweep(recipe(clip_zoo), grid, "parts")
    assert len(decoded) == 16
    assert len(loads) == 2 * len(parts.rows) * 2  # tasks, settings, batches that had to be let go
    assert [row.tasks for row in parts.rows] == [row.tasks for row in whole.rows]


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


# --- the command ----------------------------------------------------------------------------------------------------


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


def test_what_a_sweep_finds_is_not_calibrated_and_its_command_says_so(clip_zoo: Path, run: Run, tmp_path: Path) -> None:
    """A sweep merges layer by layer, whatever the recipe or the method would do by themselves."""
    asked = recipe(clip_zoo, calibrate=True, tune_alpha=True)
    found = sweep(asked, Grid(("epimer-core", "mean"), (2,), (1.0,)))
    commands = {setting.method: shlex.split(command) for setting, command in found.commands.items()}
    for method, command in commands.items():
        assert ("--no-calibrate" in command) == (method == "epimer-core")
        code, out, err = run(*command[1:], "--out", f"merged-{method}", "--dry-run", "--json")
        assert code == 0 and json.loads(out)["calibrate_on"] == [], err
    assert commands
    assert asked.looked_into("x") == recipe(clip_zoo, out="x", calibrate=False, tune_alpha=False)


def test_the_tower_holds_the_merge_rounded_as_it_would_be_stored(
    clip_zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensors] = []
    original = validation.hits

    def noted(model: Any, *rest: Any) -> int:
        seen.append({name: value.detach().clone() for name, value in model.tower_parameters().items()})
        return original(model, *rest)

    monkeypatch.setattr(validation, "hits", noted)
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
    for state in (seen[1], seen[3]):
        assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in state.items())
    with pytest.raises(ArithmeticError, match=r"do not fit into torch\.float16"):
        sweep(recipe(clip_zoo, dtype="float16"), Grid(("task-arithmetic",), alphas=(1e9,)), "other")
    assert not Path("other").exists()


def test_damage_leaves_nothing_behind(clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "measure", interrupted)
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
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    code, output, complaint = run(*words(clip_zoo), "--method", "mean")
    assert code == 1
    assert complaint.startswith("error: the pictures need matplotlib: pip install 'hf-epimer[plots]'")
    assert "sweep.json is complete" in complaint
    assert contents(Path("sweep")) == ["sweep.csv", "sweep.json", "sweep.md"]
    assert "best on average" in output
