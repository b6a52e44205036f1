"""What is said of a calibration and of a refinement before they begin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hf_epimer import MergeRecipe, ModelRef, merge
from hf_epimer.pipeline import cost
from hf_epimer.pipeline.merge import _announce
from hf_epimer.pipeline.planner import make_plan


def recipe(zoo: Path, **changes: object) -> MergeRecipe:
    given = MergeRecipe(
        tuple(ModelRef.parse(f"{name}={zoo / name}") for name in "ab"),
        base=ModelRef.parse(str(zoo / "base")),
        method="mean",
        calibrate=True,
        samples=16,
        tasks=(str(zoo / "a.json"), str(zoo / "b.json")),
        out=str(zoo / "merged"),
    )
    return replace(given, **changes)  # type: ignore[arg-type]


def test_operations_are_those_of_the_passes(clip_zoo: Path) -> None:
    plan = make_plan(recipe(clip_zoo))
    config = plan.base.vision_config
    width, hidden = config["hidden_size"], config["intermediate_size"]
    positions = (config["image_size"] // config["patch_size"]) ** 2 + 1
    of_a_pass = 2 * positions * config["num_hidden_layers"] * (4 * width**2 + 2 * width * hidden)
    assert cost.calibration_operations(plan) == pytest.approx(of_a_pass * 2 * 16 * (4.5 + 4.5))
    assert cost.calibration_operations(make_plan(recipe(clip_zoo, views=3))) == pytest.approx(
        of_a_pass * 2 * 16 * (13.5 + 4.5)
    )
    refined = make_plan(recipe(clip_zoo, refine=True, refine_steps=50))
    of_a_step = 5 * (4 * 6 * width**3 + 2 * (4 * width**2 * hidden + 2 * width**3))
    of_muon = 50 * config["num_hidden_layers"] * of_a_step
    passes = of_a_pass * (3 * 50 * 16 * 2 + 4 * 2 * 16)
    assert cost.refinement_operations(refined) == pytest.approx(passes + of_muon)
    assert 0 < cost.expected_seconds(cost.calibration_operations(plan), "cpu", size=64) < 60


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "less than a minute"), (80, "about a minute"), (720, "about 12 minutes"), (9000, "about 2.5 hours")],
)
def test_no_more_precision_than_there_is(seconds: float, words: str) -> None:
    assert cost.in_words(seconds) == words


def test_a_merge_says_it_before_it_measures_anything(clip_zoo: Path) -> None:
    stages: list[str] = []
    merge(recipe(clip_zoo), lambda stage, done, total: stages.append(stage))
    first = next(number for number, stage in enumerate(stages) if stage.startswith("calibration: "))
    assert "(--no-calibrate skips it)" in stages[first]
    assert first < stages.index("estimating curvature") < stages.index("calibrating")
    stages.clear()
    merge(recipe(clip_zoo, calibrate=False, overwrite=True), lambda stage, done, total: stages.append(stage))
    assert not any("calibrat" in stage or "refin" in stage for stage in stages)
    stages.clear()
    merge(
        recipe(clip_zoo, calibrate=False, refine=True, refine_steps=2, overwrite=True), lambda *of: stages.append(of[0])
    )
    assert any(stage.endswith("in all (2 steps)") for stage in stages[: stages.index("merging")])


def test_a_gpu_that_would_be_idle_is_pointed_out(clip_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(recipe(clip_zoo, overwrite=True))
    stages: list[str] = []
    assert not cost.leaves_gpu_idle(plan)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    _announce(plan, lambda stage, done, total: stages.append(stage))
    assert stages[0].endswith("(--no-calibrate skips it; there is a GPU: --device cuda)")
    assert not cost.leaves_gpu_idle(replace(plan, recipe=replace(plan.recipe, device="cuda")))
