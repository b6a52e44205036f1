"""scripts/paper: published numbers that agree with each other, families that are kept apart, a run of each script."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from hf_epimer import plotting

SCRIPTS = Path(__file__).parents[2] / "scripts" / "paper"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
import pictures  # noqa: E402
from benchmark import HUB, TASKS, Comparison, benchmark_of, parser, published  # noqa: E402

from hf_epimer.tasks.task import benchmark_tasks  # noqa: E402

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
    of_suite = benchmark_of(flags("--hub", "ViT-B/32", "--suite", "14"))
    assert list(of_suite.task_files) == list(benchmark_tasks(14))
    assert str(of_suite.models[8]) == "oxford_flowers102=tanganke/clip-vit-base-patch32_oxford_flowers102"
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


@pytest.mark.slow
def test_every_script_runs_and_shares_what_is_measured(
    clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo, out = laid_out(clip_zoo, tmp_path), tmp_path / "out"
    printed = []

    def run(script: str, *words: str) -> str:
        """What the script measured, in this process: seven starts of torch would take a minute."""
        common = ["--zoo", str(zoo), "--out", str(out), "--samples", "8", "--limit", "10"]
        monkeypatch.setattr(sys, "argv", [script, *common, *words])
        capsys.readouterr()
        import_module(script).main()
        found = capsys.readouterr()
        printed.append(found.out)
        return found.err

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
    for picture in ("landscape/landscape.png", "figure-2.png", "figure-3.png"):
        with Image.open(out / picture) as image:
            image.load()
            assert min(image.size) > 500
    (out / "figure-3.png").unlink()
    monkeypatch.setattr(plotting, "available", lambda: False)
    written = (out / "figure-3.json").read_bytes()
    (out / "figure-3.json").unlink()
    assert run("samples", "--rank", "2", "--fractions", "0.5", "1", "--seeds", "0", "1") == ""  # nothing measured anew
    assert "no picture: the pictures need matplotlib: pip install 'hf-epimer[plots]'" in printed[-1]
    assert (out / "figure-3.json").read_bytes() == written
    assert not (out / "figure-3.png").exists()


def test_figure_2_shows_eta_and_both_families_at_every_rank() -> None:
    whose = {"ours (zoo)": [-0.5, 1.25], "paper (Ilharco)": [None, 0.2]}
    figure = pictures.heterogeneity_and_margin([4, 16], [0.02, 0.01], [0.5, 0.25], whose)
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [0.02, 0.01]
    assert [text.get_text() for text in left.texts] == ["50.0%", "25.0%"]
    assert [bar.get_height() for bar in right.patches] == [-0.5, 1.25, 0.2]
    assert [text.get_text() for text in right.texts] == ["−0.50", "+1.25", "+0.20"]
    places = [bar.get_x() + bar.get_width() / 2 for bar in right.patches]
    assert [round(place) for place in places] == [0, 1, 1]
    assert len({bar.get_facecolor() for bar in right.patches}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(whose)
    for axes in figure.axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "16"]
    assert figure.get_suptitle() == "η is largest at rank 4, EpiMer's margin best at rank 16 (+1.25 points)"


def test_figure_3_shows_the_range_over_seeds_and_the_paper_where_it_is_alike() -> None:
    by_share = {1.0: [0.8], 0.01: [0.6, 0.7], 0.1: [0.79, 0.802]}
    stored = {"float32": [0.7, 0.8], "rank1": [0.75]}
    figure = pictures.accuracy_by_share(by_share, stored, 64, "ours (Ilharco)", {"paper (Ilharco)": 0.833})
    curve, beside = figure.axes
    assert curve.get_xscale() == "log"
    line, point = curve.lines
    assert line.get_xydata().ravel().tolist() == pytest.approx([0.01, 65, 0.1, 79.6, 1, 80])
    assert point.get_xydata().ravel().tolist() == pytest.approx([1, 83.3])
    band = curve.collections[0].get_paths()[0].vertices
    assert {(x, round(y, 6)) for x, y in band} == {(0.01, 60), (0.01, 70), (0.1, 79), (0.1, 80.2), (1.0, 80)}
    heights = [height for line in beside.lines for height in line.get_ydata()]  # range and mean of each
    assert heights == pytest.approx([70, 80, 75, 75, 75, 75])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "range over seeds",
        "ours (Ilharco)",
        "paper (Ilharco)",
    ]
    assert figure.get_suptitle() == (
        "Fisher information from 1% of the data: 65.0%; from 100%: 80.0%;\n"
        "from 10% on accuracy stays within 0.5 points of that"
    )
    alone = pictures.accuracy_by_share(by_share, stored, 64, "ours (zoo)", {})
    assert len(alone.axes[0].lines) == 1


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
