"""scripts/paper: published numbers that agree with each other, families that are kept apart, a run of each script."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts" / "paper"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
from benchmark import HUB, TASKS, Comparison, benchmark_of, parser, published  # noqa: E402

TABLES = published()["tables"]


# --- the published numbers ------------------------------------------------------------------------------------------


def test_averages_and_worst_tasks_follow_from_the_accuracies() -> None:
    for backbone, methods in TABLES["6"]["values"].items():
        assert set(methods) == set(TABLES["2"]["values"][backbone])
        for method, row in methods.items():
            assert set(row) == {*TASKS, "average"}
            assert row["average"] == TABLES["2"]["values"][backbone][method]
            accuracies = [row[task] for task in TASKS]
            assert sum(accuracies) / 8 == pytest.approx(row["average"], abs=0.0011)
            if method in TABLES["4"]["values"][backbone]:
                assert min(accuracies) == TABLES["4"]["values"][backbone][method]


def test_sweeps_agree_with_each_other_with_the_accuracies_and_with_the_margins() -> None:
    for number, backbone in zip("789", HUB):
        sweep = TABLES[number]
        assert sweep["backbone"] == backbone
        assert sweep["alphas"] == TABLES["3"]["alphas"]
        for method, ranks in sweep["values"].items():
            assert ranks["32"] == TABLES["3"]["values"][backbone][method]
            best = max(ranks["32"])
            assert best == TABLES["2"]["values"][backbone][method]
            assert sweep["alphas"][ranks["32"].index(best)] == TABLES["6"]["alpha"][backbone][method]
        for rank, margin in published()["figures"]["2"]["values"][backbone].items():
            best = {method: max(ranks[rank]) for method, ranks in sweep["values"].items()}
            assert 100 * (best["epimer"] - best["tsv-m"]) == pytest.approx(margin, abs=0.11)


# --- which checkpoints ----------------------------------------------------------------------------------------------


def flags(*words: str) -> argparse.Namespace:
    return parser("").parse_args(words)


def test_the_hub_ids_are_those_of_fusionbench() -> None:
    found = benchmark_of(flags("--hub", "ViT-L/14"))
    assert str(found.base) == "openai/clip-vit-large-patch14"
    assert str(found.models[0]) == "stanford_cars=tanganke/clip-vit-large-patch14_stanford-cars"
    assert [task.name for task in found.tasks] == list(TASKS)
    assert found.family == "FusionBench"
    assert not found.comparable
    assert found.recipe("mean", {}, "out").tasks == ()


def test_differences_are_taken_within_one_family_only(
    clip_zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--zoo", str(laid_out(clip_zoo, tmp_path)), "--out", str(tmp_path / "out")]
    for family, difference in (("zoo", None), ("Ilharco", [pytest.approx(0.25)])):
        found = benchmark_of(flags(*words, "--family", family))
        table = Comparison("Table 6", "accuracy", "Table 6", ["average"], found)
        table.add("mean", [0.5], [0.25])
        table.add("DARE", [0.5])
        table.finish()
        written = json.loads((tmp_path / "out" / "table-6.json").read_text())
        assert written["rows"][0] == {"row": "mean", "ours": [0.5], "paper": [0.25], "difference": difference}
        assert written["rows"][1]["paper"] is None
        assert written["checkpoints"] == {"ours": family, "paper": "Ilharco"}
        printed = capsys.readouterr().out
        assert f"ours ({family})" in printed
        assert ("No difference is taken" in printed) == (difference is None)


# --- running them ---------------------------------------------------------------------------------------------------


def laid_out(clip_zoo: Path, folder: Path) -> Path:
    """The zoo of the tests as --zoo has it."""
    zoo = folder / "zoo"
    shutil.copytree(clip_zoo / "base", zoo / "base")
    shutil.copytree(clip_zoo / "data", zoo / "data")
    (zoo / "task_files").mkdir()
    for name in "ab":
        shutil.copytree(clip_zoo / name, zoo / "tasks" / name)
        task = json.loads((clip_zoo / f"{name}.json").read_text())
        (zoo / "task_files" / f"{name}.yaml").write_text(json.dumps({**task, "dataset": f"../data/{name}"}))
    return zoo


def test_every_script_runs_and_shares_what_is_measured(
    clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo, out = laid_out(clip_zoo, tmp_path), tmp_path / "out"

    def run(script: str, *words: str) -> str:
        """What the script measured, in this process: seven starts of torch would take a minute."""
        common = ["--zoo", str(zoo), "--out", str(out), "--samples", "8", "--limit", "10"]
        monkeypatch.setattr(sys, "argv", [script, *common, *words])
        capsys.readouterr()
        import_module(script).main()
        return capsys.readouterr().err

    assert "epimer" in run("accuracy", "--rank", "2")
    assert "epimer" not in run("worst_task", "--rank", "2")
    run("alpha", "--rank", "2", "4", "--alphas", "0.5", "1")
    assert "epimer" not in run("eta", "--rank", "2", "4", "--alphas", "0.5", "1")
    run("samples", "--rank", "2", "--fractions", "0.5", "1", "--seeds", "0", "1")
    run("seconds", "--rank", "2", "--runs", "1")
    run("loss_landscape", "--rank", "2", "--steps", "3")
    names = {path.stem for path in out.glob("*.json")}
    assert names == {"table-6", "table-4", "table-7", "figure-2", "figure-3", "table-10", "figure-4"}
    accuracy = json.loads((out / "table-6.json").read_text())
    assert accuracy["columns"] == ["a", "b", "average", "worst"]
    assert [row["row"].split(",")[0] for row in accuracy["rows"]][-1] == "EpiMer"
    for row in accuracy["rows"]:
        assert row["paper"][:2] == [None, None]
        a, b, average, worst = row["ours"]
        assert (average, worst) == pytest.approx(((a + b) / 2, min(a, b)))
    worst_rows = json.loads((out / "table-4.json").read_text())["rows"]
    assert worst_rows[-1]["ours"] == accuracy["rows"][-1]["ours"][-1:]
    assert (out / "landscape" / "landscape.png").is_file()


def test_what_decides_a_number_is_in_its_key(clip_zoo: Path, tmp_path: Path) -> None:
    words = ["--zoo", str(laid_out(clip_zoo, tmp_path)), "--out", str(tmp_path / "out")]
    calls = []

    def measured(*more: str, method: str = "mean") -> None:
        found = benchmark.benchmark_of(flags(*words, *more))
        found.kept({"method": method}, lambda: calls.append(more) or [1.0])

    for more in ((), (), ("--limit", "5"), ("--seed", "1"), ("--tasks", "a")):
        measured(*more)
    measured(method="ties")
    assert len(calls) == 5
