"""`hf-epimer diagnose`: what it writes, what it draws, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from helpers import reference
from helpers.checkpoints import TINY, rewrite, write_checkpoint
from helpers.command import Run, contents, fails, strict
from hf_epimer import MergeRecipe, ModelRef, diagnose, plotting
from hf_epimer.analysis import plots
from hf_epimer.models.clip import CLIP


def test_a_diagnosis_is_complete(tiny_zoo: Path, run: Run) -> None:
    out = tiny_zoo / "out"
    words = [tiny_zoo / name for name in "abc"]
    code, output, complaint = run("diagnose", *words, "--base", tiny_zoo / "base", "--rank", 4, 2, "--out", out)
    assert (code, complaint) == (0, "")
    assert contents(out) == ["cosines.png", "diagnosis.json", "energy.png", "eta.png"]
    report = strict(out / "diagnosis.json")
    for sentence in report["verdict"]:
        assert sentence in output
    assert "rank 4 capped at floor(min(m, n) / T) in 1 layers" in output
    assert report["labels"] == ["a", "b", "c"]
    assert report["note"] is None
    assert len(report["curvature"]["statistics"]) == 3
    assert [entry["rank"] for entry in report["totals"]["ranks"]] == [2, 4]
    assert len(report["layers"]) == len(CLIP.shapes(TINY))
    position = next(layer for layer in report["layers"] if "position" in layer["name"])
    assert [entry["capped_rank"] for entry in position["ranks"]] == [1, 1]
    assert report["totals"]["ranks"][1]["capped_layers"] == 1
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    states = [load_file(tiny_zoo / folder / "model.safetensors")[name] for folder in ("base", *"abc")]
    fisher = [load_file(tiny_zoo / folder / "fisher.safetensors")[name] for folder in "abc"]
    expected = reference.diagnosis([own - states[0] for own in states[1:]], fisher, rank=4)
    found = next(layer for layer in report["layers"] if layer["name"] == name)["ranks"][1]
    assert found["curvature"]["eta"] == pytest.approx(expected["eta"], rel=1e-3)
    assert found["curvature"]["V_S"] == pytest.approx(expected["variance"], rel=1e-3)
    assert found["curvature"]["R_S"] == pytest.approx(expected["residual"], rel=1e-3)
    total = report["totals"]["ranks"][1]["curvature"]
    parts = [own["ranks"][1]["curvature"] if own["ranks"] else own["curvature"] for own in report["layers"]]
    assert total["V_S"] == pytest.approx(sum(part["V_S"] for part in parts))
    beside = sum(own["curvature"]["V_S"] for own in report["layers"] if not own["ranks"])
    assert 0 < beside < total["V_S"]
    assert total["V_S_of_non_matrices"] == pytest.approx(beside)
    assert total["eta"] == pytest.approx(sum(part.get("eta", 0) for part in parts))
    assert total["bound"] == pytest.approx(0.5 * (total["V_S"] ** 0.5 + total["R_S"] ** 0.5) ** 2)
    wholes = [load_file(tiny_zoo / folder / "model.safetensors") for folder in ("base", "a", "c")]
    base, a, c = (torch.cat([state[name].flatten() for name in sorted(state)]) for state in wholes)
    expected_cosine = float(torch.cosine_similarity(a - base, c - base, dim=0))
    assert report["totals"]["cosine"][0][2] == pytest.approx(expected_cosine, abs=1e-5)


def test_eta_is_that_of_the_merge(tiny_zoo: Path, run: Run) -> None:
    words = [tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--rank", 4, "--json", "--out"]
    _, looked, _ = run("diagnose", *words, tiny_zoo / "diagnosis")
    code, merged, complaint = run("merge", *words, tiny_zoo / "merged", "--method", "epimer", "--preset", "paper")
    assert code == 0, complaint
    eta = json.loads(looked)["totals"]["ranks"][0]["curvature"]["eta"]
    assert eta == pytest.approx(json.loads(merged)["totals"]["eta"], rel=1e-5)


def test_json_is_one_object_without_layers(tiny_zoo: Path, run: Run) -> None:
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--weights", 2, 1, "--json"]
    code, output, complaint = run(*words, "--out", tiny_zoo / "out")
    assert (code, complaint) == (0, "")
    assert len(output.splitlines()) == 1
    found = json.loads(output)
    assert found["weights"] == pytest.approx([2 / 3, 1 / 3])
    assert sorted(found["pictures"]) == ["cosines.png", "energy.png", "eta.png"]
    assert "layers" not in found


def test_without_fisher_information_the_rest_is_there(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "b" / "fisher.safetensors").rename(tiny_zoo / "b.safetensors")
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base"]
    code, output, complaint = run(*words, "--out", tiny_zoo / "out")
    assert (code, complaint) == (0, "")
    assert "`hf-epimer fisher" in output
    assert contents(tiny_zoo / "out") == ["cosines.png", "diagnosis.json", "energy.png"]
    report = strict(tiny_zoo / "out" / "diagnosis.json")
    assert report["curvature"] is None
    assert "hf-epimer fisher" in report["note"]
    assert {entry["curvature"] for entry in report["totals"]["ranks"]} == {None}
    assert {entry["curvature"] for layer in report["layers"] for entry in layer["ranks"]} == {None}
    assert all(0 < value <= 1 for value in report["totals"]["ranks"][0]["energy_kept"])
    given = ["--fisher", f"b={tiny_zoo / 'b.safetensors'}"]
    assert run(*words, *given, "--out", tiny_zoo / "two")[0] == 0
    assert strict(tiny_zoo / "two" / "diagnosis.json")["curvature"] is not None
    (tiny_zoo / "a" / "fisher.safetensors").unlink()
    fails(run(*words, *given, "--out", tiny_zoo / "three"), "needs the Fisher information of a")


@pytest.mark.parametrize(
    ("words", "pattern", "code"),
    [
        (["a"], "at least two", 2),
        ([], "give the checkpoints", 2),
        (["a", "b", "--rank", "0"], "--rank must be whole numbers of at least 1, not 0", 2),
        (["a", "b", "--rank", "4", "-3"], "-3", 2),
        (["a", "b", "--rank", "x"], "--rank", 2),
        (["a", "b", "--weights", "1"], "2 models, 1 weights", 2),
        (["a", "b", "--fisher", "z=a"], "no model is labelled z", 2),
        (["a", "b", "--alpha", "1"], "--alpha", 2),
        (["a", "nowhere/at/all"], "does not exist", 1),
        (["a", "b", "--out", "b"], "b holds|not empty", 1),
        (["a", "b", "--out", "base", "--overwrite"], "would be lost", 1),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_is_written(
    words: list[str], pattern: str, code: int, tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_zoo)
    before = contents(tiny_zoo)
    fails(run("diagnose", *words, "--base", "base"), pattern, code)
    assert contents(tiny_zoo) == before


def test_task_files_are_taken(clip_zoo: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    words = ["diagnose", *(f"{name}={clip_zoo / name}" for name in "ab"), "--base", clip_zoo / "base"]
    files = ["--task", clip_zoo / "a.json", "--task", clip_zoo / "b.json"]
    code, _, complaint = run(*words, *files, "--samples", 8, "--rank", 2, "--out", tmp_path / "out")
    assert (code, complaint) == (0, "")
    assert strict(tmp_path / "out" / "diagnosis.json")["curvature"] is not None


def test_another_architecture_or_damage_leaves_nothing_behind(tiny_zoo: Path, run: Run) -> None:
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", tiny_zoo / "out"]
    before = contents(tiny_zoo)
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    rewrite(tiny_zoo / "b", lambda s: s[name].view(-1)[7].fill_(float("nan")))
    fails(run(*words), rf"b: NaN or Inf in {name}")
    config = json.loads((tiny_zoo / "b" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tiny_zoo / "b" / "config.json").write_text(json.dumps(config))
    fails(run(*words), r"b is another architecture than the base base \(num_hidden_layers: 2 \| 3\)")
    assert contents(tiny_zoo) == before


@pytest.mark.parametrize("kept", ["", "bias", "mlp.fc1.weight"])
def test_partly_tuned_checkpoints(kept: str, tiny_zoo: Path, run: Run) -> None:
    """a changed only its last norm, biases or one kind of matrix; whatever is undefined then is null, not an error."""
    base = load_file(tiny_zoo / "base" / "model.safetensors")
    same = [name for name in base if not (kept and name.endswith(kept)) and not name.startswith("vision_model.post")]
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--rank", 4, 8]
    rewrite(tiny_zoo / "a", lambda s: s.update({name: base[name] for name in same}))
    code, _, complaint = run(*words, "--out", tiny_zoo / "one")
    assert (code, complaint) == (0, "")
    report = strict(tiny_zoo / "one" / "diagnosis.json")
    assert (report["totals"]["ranks"][0]["energy_kept"][0] is None) == (kept != "mlp.fc1.weight")
    assert report["layers"][2]["cosine"][0] == [None, None]
    rewrite(tiny_zoo / "b", lambda s: s.update({name: base[name] for name in same}))
    code, output, complaint = run(*words, "--out", tiny_zoo / "both")
    assert (code, complaint) == (0, "")
    assert ("Curvature has nothing to act on" in output) == (kept != "mlp.fc1.weight")
    assert ("eta.png" in contents(tiny_zoo / "both")) == (kept == "mlp.fc1.weight")
    assert strict(tiny_zoo / "both" / "diagnosis.json")["totals"]["ranks"][0]["curvature"]["V_S"] > 0


def test_from_python_and_twice(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_epimer.errors import OutputError

    monkeypatch.chdir(tiny_zoo)
    (tiny_zoo / "merged-epimer").mkdir()
    (tiny_zoo / "merged-epimer" / "earlier").write_text("a merge that is not looked at")
    recipe = MergeRecipe(tuple(map(ModelRef.parse, "ab")), ModelRef.parse("base"), method="ties", push_to="org/merged")
    stages: list[tuple[str, int]] = []
    found = diagnose(recipe, (3,), progress=lambda stage, done, total: stages.append((stage, done)))
    assert sum(done for stage, done in stages if stage == "diagnosing") == len(found.layers)
    assert found.out == Path("diagnosis")
    assert found.pictures == ("cosines.png", "energy.png", "eta.png")
    assert found.totals[0].curvature is not None
    with pytest.raises(OutputError, match="not empty"):
        diagnose(recipe)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_epimer import MergeRecipe, ModelRef, diagnose\n"
        "from hf_epimer.pipeline.usage import process_memory\n"
        "folder = Path(sys.argv[1]); peak = 0\n"
        "def look(stage, done, total):\n"
        "    global peak; peak = max(peak, process_memory('RssAnon'))\n"
        "models = tuple(ModelRef.parse(str(folder / name)) for name in 'ab')\n"
        "diagnose(MergeRecipe(models, ModelRef.parse(str(folder / 'base'))), (4, 16), str(folder / 'out'), look)\n"
        "print(peak)"
    )
    peaks = []
    for depth in (4, 24):
        tower = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": depth}
        generator = torch.Generator().manual_seed(0)
        base = {name: torch.randn(shape, generator=generator) for name, shape in CLIP.shapes(tower).items()}
        folder = tmp_path / str(depth)
        write_checkpoint(folder / "base", base, config=tower)
        for name in "ab":
            tuned = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
            write_checkpoint(folder / name, tuned, config=tower, fisher={n: v.square() for n, v in base.items()})
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[0] > 0
    assert peaks[1] - peaks[0] < 30e6


def test_the_pictures_show_something(tiny_zoo: Path, run: Run) -> None:
    from PIL import Image

    words = [tiny_zoo / name for name in "abc"]
    assert run("diagnose", *words, "--base", tiny_zoo / "base", "--out", tiny_zoo / "out")[0] == 0
    for file in (tiny_zoo / "out").glob("*.png"):
        with Image.open(file) as image:
            image.load()
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert min(image.size) > 400
            colours = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
        assert colours is not None
        assert len(colours) > 50
        assert max(count for count, _ in colours) < 0.97 * image.width * image.height


def test_titles_say_the_finding() -> None:
    energy = plots.energy_by_rank(["a", "b"], [4, 8], [[0.2, 0.3], [0.6, 0.4]], [[0.3, 0.4], [0.7, 0.9]])
    assert energy.axes[0].get_title() == (
        "At rank 8 the shared basis keeps 40% of b, the least of all tasks;\nits own directions alone would keep 90%"
    )
    lines = [line for line in energy.axes[0].lines if line.get_label() == "b"]
    assert lines[0].get_ydata().tolist() == [30, 40]  # type: ignore[union-attr]
    against = plots.cosine_matrix(["a", "b", "c"], [[1, -0.3, 0.1], [-0.3, 1, 0], [0.1, 0, 1]])
    assert "a and b point most\nagainst each other (cosine -0.30)" in against.axes[0].get_title()
    values = {"m.layers.3.fc1.weight": (1.0, 4.0), "m.layers.3.fc2.weight": (2.0, 2.0), "m.position.weight": (0.0, 4.0)}
    eta = plots.eta_by_layer(values, values, 8)
    assert eta.get_suptitle() == (
        "Rank 8: curvature can save 30.0% of the loss of plain averaging,\nthe largest part (67% of it) in fc2"
    )
    assert eta.axes[0].get_ylim()[1] > 1.5
    assert [tick.get_text() for tick in eta.axes[1].get_xticklabels()] == ["embed", "3"]
    assert [text.get_text() for text in eta.axes[0].texts] == ["0.0%", "50.0%"]
    assert sorted(bar.get_height() for bar in eta.axes[0].patches if bar.get_height()) == [0.5, 1.0]


def test_without_matplotlib_the_report_is_there_and_the_error_says_what_to_install(
    tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    words = ["diagnose", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", tiny_zoo / "out"]
    code, output, complaint = run(*words)
    assert code == 1
    assert complaint.startswith("error: the pictures need matplotlib: pip install 'hf-epimer[plots]'")
    assert str(tiny_zoo / "out" / "diagnosis.json") in complaint
    assert contents(tiny_zoo / "out") == ["diagnosis.json"]
    assert "Curvature" in output


@pytest.mark.slow
def test_the_package_does_without_matplotlib_until_it_draws() -> None:
    code = "import sys, hf_epimer.analysis.diagnosis, hf_epimer.analysis.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
