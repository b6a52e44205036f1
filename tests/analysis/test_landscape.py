"""The plane against dense least squares in float64, its losses against models loaded from their folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers.checkpoints import tiny_state
from helpers.classifiers import load_classifier, source_of
from hf_epimer import MergeRecipe, ModelRef, landscape, merge
from hf_epimer.analysis.landscape.contours import loss_contours
from hf_epimer.analysis.landscape.landscape import Landscape
from hf_epimer.analysis.landscape.losses import Tower
from hf_epimer.analysis.landscape.plane import Plane, fit_plane, grid, plane_of
from hf_epimer.checkpoints.reader import Checkpoint, StateDict
from hf_epimer.errors import OutputError, UsageError
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.models.clip import CLIP
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import load_task_file


def models(tasks: int) -> tuple[Ingredients, list[StateDict], dict[str, Tensor]]:
    """Random towers, two of them only marked, and all of them flattened in float64."""
    base = tiny_state(0)
    states = {name: tiny_state(1 + index, base) for index, name in enumerate([*"abcdef"[:tasks], "x", "y"])}
    sources = [StateDict(name, state) for name, state in states.items()]
    flat = {name: torch.cat([v.double().flatten() for v in s.values()]) for name, s in {**states, "base": base}.items()}
    ingredients = Ingredients(StateDict("base", base), sources[:tasks], [1 / tasks] * tasks)
    return ingredients, sources[tasks:], flat


def axes_of(plane: Plane, flat: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The centre and the two axes, dense."""
    vectors = torch.stack([flat[label] - flat["base"] for label in plane.labels])
    return flat["base"] + vectors.mean(0), plane.axes @ vectors


# --- the plane ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_axes_are_orthonormal_and_places_are_least_squares_projections(tasks: int) -> None:
    ingredients, marked, flat = models(tasks)
    plane = plane_of(ingredients, marked)
    centre, axes = axes_of(plane, flat)
    torch.testing.assert_close(axes @ axes.mT, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert set(plane.positions) == set(flat)
    for name, weights in flat.items():
        solution = torch.linalg.lstsq(axes.mT, (weights - centre)[:, None]).solution[:, 0]
        assert plane.positions[name] == pytest.approx(solution.tolist(), abs=1e-5)
        assert plane.outside[name] == pytest.approx(float((weights - centre - solution @ axes).norm()), abs=1e-4)


@pytest.mark.parametrize("tasks", [2, 3])
def test_two_or_three_models_lie_in_their_plane(tasks: int) -> None:
    ingredients, marked, _ = models(tasks)
    plane = plane_of(ingredients, marked)
    assert plane.explained == pytest.approx(1)
    assert all(plane.outside[label] < 1e-5 for label in plane.labels)
    assert plane.outside["x"] > 1
    if tasks == 2:
        assert plane.outside["base"] < 1e-5


def test_axes_are_the_principal_ones() -> None:
    ingredients, _, flat = models(5)
    plane = plane_of(ingredients)
    cloud = torch.stack([flat[label] for label in plane.labels])
    _, singular, directions = torch.linalg.svd(cloud - cloud.mean(0), full_matrices=False)
    _, axes = axes_of(plane, flat)
    assert (axes @ directions[:2].mT).diagonal().abs().tolist() == pytest.approx([1, 1], abs=1e-6)
    assert plane.explained == pytest.approx(float(singular[:2].square().sum() / singular.square().sum()))
    assert all(max(place, key=abs) > 0 for place in zip(*(plane.positions[label] for label in plane.labels)))


def test_the_order_of_models_does_not_matter() -> None:
    ingredients, _, _ = models(5)
    turned = Ingredients(ingredients.base, ingredients.models[::-1], ingredients.weights)
    plain, other = plane_of(ingredients), plane_of(turned)
    for name, place in plain.positions.items():
        assert other.positions[name] == pytest.approx(place, abs=1e-6)


def test_models_that_span_no_plane_are_refused() -> None:
    one = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(UsageError, match="the same"):
        fit_plane(one, ["a", "b"])
    line = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    with pytest.raises(UsageError, match="on one line"):
        fit_plane(line, ["a", "b"])
    square = fit_plane(torch.eye(2, dtype=torch.float64), ["a", "b"])
    assert square.positions["base"] == pytest.approx((0, 0.5**0.5))


def test_the_grid_is_a_square_around_all_models() -> None:
    first, second = grid([(0.0, 0.0), (4.0, 1.0)], 5, 0.25)
    assert first == pytest.approx((-1, 0.5, 2, 3.5, 5))
    assert second == pytest.approx((-2.5, -1, 0.5, 2, 3.5))


# --- the losses -----------------------------------------------------------------------------------------------------


def recipe_of(zoo: Path) -> MergeRecipe:
    return MergeRecipe(
        tuple(ModelRef.parse(f"{name}={zoo / name}") for name in "ab"),
        ModelRef.parse(str(zoo / "base")),
        tasks=tuple(str(zoo / f"{name}.json") for name in "ab"),
    )


@pytest.fixture(scope="module")
def found(clip_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Landscape:
    folder = tmp_path_factory.mktemp("landscape")
    recipe = recipe_of(clip_zoo)
    merged = merge(MergeRecipe(recipe.models, recipe.base, "mean", out=str(folder / "mean"))).out
    return landscape(recipe, [ModelRef.parse(str(merged))], str(folder / "out"), steps=3, samples=20, margin=0)


def loss_of(folder: Path, zoo: Path, name: str) -> float:
    """The loss of a folder's model on the same images, by loading it."""
    task = load_task_file(zoo / f"{name}.json")
    samples = read_samples(task, "test", limit=20, seed=0)
    model = load_classifier(folder, zoo / "base", task, samples.class_names)
    (batch,) = ImageBatches(samples, model.pixels, 64)
    with torch.no_grad():
        return float(cross_entropy(model(batch.inputs), batch.labels))


@pytest.fixture(scope="module")
def tower(clip_zoo: Path, found: Landscape) -> Tower:
    base = source_of(clip_zoo / "base")
    tower = Tower(base, [(load_task_file(clip_zoo / f"{name}.json"), base) for name in "ab"], 20)
    base, *tuned = [
        Checkpoint(name, [clip_zoo / name / "model.safetensors"], CLIP.canonical) for name in ("base", "a", "b")
    ]
    base.shapes = {name: base.shapes[name] for name in tuned[0].shapes}
    tower.span(Ingredients(base, tuned, [0.5, 0.5]), found.plane)
    return tower


def test_a_models_place_has_the_loss_of_the_model(clip_zoo: Path, found: Landscape, tower: Tower) -> None:
    for name in ("a", "b", "base"):  # two models and their base lie in the plane
        there = tower.loss_at(found.plane.positions[name])
        for task in "ab":
            expected = loss_of(clip_zoo / name, clip_zoo, task)
            assert there[task] == pytest.approx(expected, rel=1e-4), (name, task)
            assert found.models[name][task] == pytest.approx(expected, rel=1e-5)
    assert tower.loss_at((0, 0)) == pytest.approx(found.models["mean"], rel=1e-4)


def test_the_grid_has_the_losses_of_its_points(found: Landscape, tower: Tower) -> None:
    places = found.plane.positions
    assert found.first[0] == pytest.approx(min(a for a, _ in places.values()))
    assert found.first[-1] == pytest.approx(max(a for a, _ in places.values()))
    assert found.samples == {"a": 20, "b": 20}
    for row, b in enumerate(found.second):
        for column, a in enumerate(found.first):
            for task, loss in tower.loss_at((a, b)).items():
                assert found.losses[task][row][column] == pytest.approx(loss, rel=1e-6)
    assert found.losses["a"][0][2] != pytest.approx(found.losses["a"][2][0], rel=1e-3)


def test_report_and_picture_are_written(found: Landscape) -> None:
    content = json.loads((found.out / "landscape.json").read_text())
    assert content["grid"]["loss"]["a"] == found.losses["a"]
    assert content["models"]["mean"]["position"] == pytest.approx([0, 0], abs=1e-6)
    assert content["tuned"] == {"a": "a", "b": "b"}
    assert found.pictures == ("landscape.png",)
    with Image.open(found.out / "landscape.png") as image:
        image.load()
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        colours = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
    assert colours is not None
    assert len(colours) > 50


def test_every_panel_names_its_models() -> None:
    rows = [[0.5, 1.0], [2.0, 4.0]]
    figure = loss_contours(
        {"a": rows, "b": rows},
        ([0.0, 1.0], [0.0, 1.0]),
        {"a": (0.0, 0.0), "b": (1.0, 1.0), "base": (0.5, 0.5), "merge": (0.5, 0.0)},
        {"a": 0.0, "b": 1.5, "base": 0.0, "merge": 2.0},
        {name: {"a": 1.0, "b": 3.0} for name in ("a", "b", "base", "merge")},
        {"a": "a", "b": "b"},
    )
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [
        "a: 1.00 at its own model\n(star, 0.0 away from the plane)",
        "b: 3.00 at its own model\n(star, 1.5 away from the plane)",
        "mean over the tasks",
    ]
    for axes in panels:
        assert [text.get_text() for text in axes.texts] == ["a", "b", "base", "merge"]
    assert [line.get_marker() for line in panels[1].lines] == ["o", "*", "s", "D"]
    assert "lowest mean loss on the grid is 0.50" in figure.get_suptitle()
    assert "merge 2.00" in figure.get_suptitle()


def test_what_cannot_be_drawn_is_refused(clip_zoo: Path, tmp_path: Path) -> None:
    recipe = recipe_of(clip_zoo)
    out = str(tmp_path / "out")
    with pytest.raises(UsageError, match="at least two"):
        landscape(MergeRecipe(recipe.models[:1], recipe.base), out=out)
    with pytest.raises(UsageError, match="2 steps"):
        landscape(recipe, out=out, steps=1)
    with pytest.raises(UsageError, match="two models are called a"):
        landscape(recipe, [ModelRef.parse(f"a={clip_zoo / 'b'}")], out)
    unknown = MergeRecipe(tuple(ModelRef.parse(str(clip_zoo / name)) for name in "ab"), recipe.base)
    with pytest.raises(UsageError, match="its task must be known"):
        landscape(unknown, out=out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    with pytest.raises(OutputError, match="not empty"):
        landscape(recipe, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, hf_epimer.analysis.landscape.landscape; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
