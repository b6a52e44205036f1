"""One merge from beginning to end. `merge(recipe)` reads like the README.

plan -> fetch -> open, and measure what curvature is missing -> choose alpha -> merge layer by layer -> evaluate ->
card and reports -> rename -> push

Whatever can go wrong for reasons known beforehand (rights, configs, missing statistics, a target folder in use) goes
wrong before a weight is read; whatever goes wrong later leaves nothing behind.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_epimer.merging.report import totals_of
from hf_epimer.models.source import PROCESSOR_FILES, ModelSource
from hf_epimer.pipeline.any_architecture import COPIED
from hf_epimer.pipeline.doubts import doubts
from hf_epimer.pipeline.folder import CONFIG, push, write_records
from hf_epimer.pipeline.inputs import fetch, open_inputs
from hf_epimer.pipeline.output import write_merge
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.planner import make_plan
from hf_epimer.pipeline.processes import launched
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.pipeline.report import MergeReport
from hf_epimer.pipeline.usage import Usage
from hf_epimer.types import Progress

if TYPE_CHECKING:
    from hf_epimer.evaluation.results import Results
    from hf_epimer.merging.inputs import Ingredients

logger = logging.getLogger(__name__)


def merge(recipe: MergeRecipe, progress: Progress = lambda stage, done, total: None) -> MergeReport:
    """Carry a recipe out: a merged folder, and a push if it asks for one.

    Raises:
        EpimerError: one of its kinds, with a message that says what is at fault and what to do. Nothing half-written
            is left.
    """
    usage, processes = Usage(), launched()
    with usage.stage("fetching"):
        with processes.said_once():
            plan = make_plan(recipe, any_architecture=True)
        with processes.main_first():
            fetch(plan, progress, COPIED if plan.treatment else PROCESSOR_FILES)
    _announce(plan, progress)
    with usage.stage("statistics"):
        ingredients = open_inputs(plan, progress)
    divergences: dict[float, float] = {}
    if plan.recipe.tune_alpha:
        with usage.stage("choosing alpha"):
            plan, divergences = _tuned(plan, ingredients, progress)
    with processes.atomic_folder(recipe.target, CONFIG, recipe.overwrite) as folder:
        with usage.stage("merging"):
            layers, refinement = write_merge(folder, plan, ingredients, usage, progress)
        totals = totals_of(layers)
        with processes.said_once():
            for doubt in [*doubts(plan, layers), *([totals["note"]] if "note" in totals else [])]:
                logger.warning("%s", doubt)
        if plan.made_from:
            totals["made_from"] = plan.made_from
        if refinement:
            totals["refinement"] = asdict(refinement)
        if divergences:
            totals["alpha"] = plan.recipe.options.alpha
            totals["divergence_at_alpha"] = {f"{alpha:g}": value for alpha, value in divergences.items()}
        results = None
        if recipe.evaluate:
            with usage.stage("evaluating"):
                results = _evaluate(folder, plan, progress)
        accuracies = results.to_json() if results else None
        seconds, memory = usage.seconds(), usage.memory()
        report = MergeReport(recipe.target, None, plan.method.name, totals, layers, seconds, memory, accuracies)
        if processes.is_main:
            write_records(folder, plan, report, results)
    if not recipe.push_to or not processes.is_main:
        return report
    progress("pushing", 0, 0)
    url = push(recipe.target, recipe.push_to, private=recipe.private, create_pr=recipe.create_pr)
    return replace(report, url=url)


def _announce(plan: Plan, progress: Progress) -> None:
    """How long the parts of a merge will take that last."""
    if not plan.recipe.calibrate and not plan.recipe.refine:
        return
    from hf_epimer.pipeline.cost import expected, in_words, leaves_gpu_idle

    hints = {"calibration": "--no-calibrate skips it", "refinement": f"{plan.recipe.refine_steps} steps"}
    for part, seconds in expected(plan).items():
        hint = hints[part] + "; there is a GPU: --device cuda" * leaves_gpu_idle(plan)
        progress(f"{part}: {in_words(seconds)} in all ({hint})", 0, 0)


def _tuned(plan: Plan, ingredients: Ingredients, progress: Progress) -> tuple[Plan, dict[float, float]]:
    """The plan with the alpha whose predictions are nearest, and the divergences at all that were tried."""
    from hf_epimer.pipeline.tune_alpha import divergences, nearest

    tried = divergences(plan, ingredients, progress)
    return plan.at_alpha(nearest(tried)), tried


def _evaluate(folder: Path, plan: Plan, progress: Progress) -> Results:
    """The merge on all tasks; with it, where that is asked for, the base on all and every model on its own."""
    from hf_epimer.evaluation.accuracy import evaluate_folder

    recipe = plan.recipe
    specialists: dict[str, list[ModelSource]] = {}
    for model in plan.models:
        assert model.task
        specialists.setdefault(model.task.name, []).append(model.source)
    progress("evaluating", 0, len(plan.tasks))
    return evaluate_folder(
        folder,
        plan.base,
        plan.tasks,
        name=recipe.push_to or recipe.target.name,
        heads=folder if plan.has_heads else None,
        limit=recipe.limit,
        specialists=specialists if recipe.compare else None,
        on_task=lambda: progress("evaluating", 1, len(plan.tasks)),
    )
