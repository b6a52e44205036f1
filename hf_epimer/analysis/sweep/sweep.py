"""Rank x alpha x method in one go: `sweep(recipe, grid)`.

resolve and check as for a merge -> choose validation samples -> merge all candidates at alpha = 1 in one pass over the
checkpoints -> put base + alpha tau into one tower, setting by setting -> count hits -> choose by average and by worst
task -> CSV, Markdown, JSON, pictures

Settings are compared and chosen on validation samples of the training splits alone. The test splits are used for `test`
only, after the choice, and for the chosen settings only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_epimer.analysis.sweep.bench import Bench
from hf_epimer.analysis.sweep.candidates import (
    TaskVectorFile,
    group_candidates,
    largest_rank,
    merge_candidates,
    task_vector_file,
)
from hf_epimer.analysis.sweep.files import write_report
from hf_epimer.analysis.sweep.grid import Candidate, Grid, Setting, config_of
from hf_epimer.analysis.sweep.report import REPORT, SweepReport, best_rows
from hf_epimer.analysis.sweep.stopping import SHARES
from hf_epimer.analysis.sweep.validation import check_disjoint, validation_samples
from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.errors import UsageError
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.models.head import check_head
from hf_epimer.models.source import PROCESSOR_FILES
from hf_epimer.pipeline.inputs import fetch, open_inputs
from hf_epimer.pipeline.output import dtype_of
from hf_epimer.pipeline.plan import CurvatureFile, Plan
from hf_epimer.pipeline.planner import make_plan, with_method
from hf_epimer.pipeline.processes import check_alone
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.images import Samples, read_samples
from hf_epimer.types import Progress

logger = logging.getLogger(__name__)


def sweep(
    recipe: MergeRecipe,
    grid: Grid | None = None,
    out: str = "sweep",
    progress: Progress = lambda stage, done, total: None,
    *,
    limit: int | None = None,
    stop_hopeless: bool = False,
    test: bool = False,
) -> SweepReport:
    """Try every setting of a grid on the tasks of the checkpoints, and say which one is best.

    Args:
        recipe: of the merges; its method, options and destination are not looked at.
        grid: what is tried; EpiMer at a few ranks and alphas for None.
        out: folder to write; a non-empty one is refused unless `recipe.overwrite`.
        progress: called as by `hf_epimer.merge`.
        limit: validation images per task, of a tenth of the training split.
        stop_hopeless: show the first quarter of every task's validation images to all settings, the second quarter and
            the second half only to those that are not yet far behind (`stopping.py`).
        test: measure the chosen settings on the test splits, too.

    Raises:
        UsageError: a checkpoint without a task; statistics would be estimated on validation samples.
        EpimerError: what `merge` raises; nothing half-written is left.
    """
    check_alone("sweep")
    grid = grid or Grid()
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be a whole number of at least 1, not {limit}")
    started = time.monotonic()
    local = replace(recipe.looked_into(out), evaluate=True)
    plans, candidates = _plans(local, grid)
    settings = {setting: number for number, candidate in enumerate(candidates) for setting in grid.settings(candidate)}
    plan = plans[0][0]
    for task, model in plan.tuned_on:
        check_head(model, plan.base, task)
    chosen = {task.name: validation_samples(task, recipe.seed, limit) for task in plan.tasks}
    data = {name: samples for name, (samples, _) in chosen.items()}
    unseen = {task.name: read_samples(task, task.test_split) for task in plan.tasks} if test else {}
    for each, _ in plans:
        fetch(each, progress, PROCESSOR_FILES)
        _check_disjoint(each, chosen)
    ingredients = [open_inputs(each, progress) for each, _ in plans]
    seconds = {"preparing": time.monotonic() - started}
    with atomic_folder(local.target, REPORT, recipe.overwrite) as folder:
        with task_vector_file(folder / "task-vectors.tmp", plan.shapes, len(candidates)) as stored:
            _merge_all(plans, ingredients, candidates, stored, progress)
            seconds["merging"] = time.monotonic() - started - seconds["preparing"]
            dtype = dtype_of(plan, ingredients[0].base)
            bench = Bench(plan, stored, settings, dtype, progress)
            rows = bench.measure(list(settings), data, "validating", SHARES if stop_hopeless else ())
            best = best_rows(rows)
            wanted = dict.fromkeys(row.setting for by_criterion in best.values() for row in by_criterion.values())
            tested = bench.measure(list(wanted), unseen, "testing") if test else []
            seconds["evaluating"] = time.monotonic() - started - sum(seconds.values())
        report = SweepReport(
            base=str(plan.recipe.base),
            models=tuple(map(str, plan.recipe.models)),
            weights=plan.weights,
            statistics=tuple(
                _origin(entry) for each, _ in plans for model in each.models for entry in model.curvature.values()
            ),
            methods={name: _options(candidates, name) for name in grid.methods},
            ranks=tuple(dict.fromkeys(candidate.rank for candidate in candidates if candidate.rank is not None)),
            alphas=tuple(grid.alphas),
            seed=recipe.seed,
            splits={name: (samples.task.train_split, before) for name, (samples, before) in chosen.items()},
            rows=tuple(rows),
            stop_hopeless=stop_hopeless,
            best=best,
            test=tuple(tested),
            commands=_commands(plans, candidates, {setting: settings[setting] for setting in wanted}),
            seconds=seconds,
            out=local.target,
        )
        pictures = write_report(report, folder)
    return replace(report, pictures=pictures)


# --- before any work ------------------------------------------------------------------------------------------------


def _plans(recipe: MergeRecipe, grid: Grid) -> tuple[list[tuple[Plan, list[int]]], list[Candidate]]:
    """One plan per pass over the files, with the numbers of the candidates it serves; references resolved once."""
    sample = grid.candidates(1)
    lead = next((candidate for candidate in sample if candidate.statistic), sample[0])
    plan = make_plan(replace(recipe, method=lead.method.name, options=lead.config))
    candidates = grid.candidates(largest_rank(plan.shapes, len(plan.models)))
    groups = group_candidates(candidates)
    leads = [
        next((candidates[n] for n in numbers if candidates[n].statistic), candidates[numbers[0]]) for numbers in groups
    ]
    files = {candidate.statistic.file: candidate.method.name for candidate in leads if candidate.statistic}
    if recipe.fisher and len(files) > 1:
        raise UsageError(
            f"--fisher: {' and '.join(files.values())} need files of different kinds: sweep them one after the other"
        )
    return [
        (
            with_method(plan, candidate.method, candidate.config) if candidate.statistic else plan.without_curvature(),
            members,
        )
        for candidate, members in zip(leads, groups, strict=True)
    ], candidates


def _check_disjoint(plan: Plan, chosen: Mapping[str, tuple[Samples, int]]) -> None:
    for model in plan.models:
        assert model.task  # the planner has refused models without
        for curvature in model.curvature.values():
            warning = check_disjoint(*chosen[model.task.name], curvature)
            if warning:
                logger.warning("%s", warning)


# --- merging --------------------------------------------------------------------------------------------------------


def _merge_all(
    plans: Sequence[tuple[Plan, list[int]]],
    ingredients: Sequence[Ingredients],
    candidates: Sequence[Candidate],
    stored: TaskVectorFile,
    progress: Progress,
) -> None:
    """Every group of candidates in a pass of its own; nearly always there is one group."""
    total = len(plans) * len(stored.shapes)
    progress("merging", 0, total)
    for (plan, members), read in zip(plans, ingredients, strict=True):
        merge_candidates(
            read,
            {number: candidates[number] for number in members},
            stored,
            seed=plan.recipe.seed,
            exact=plan.recipe.exact,
            device=plan.recipe.device,
            on_layer=lambda stage, done: progress("merging" if stage == "merge" else "surveying", done, total),
        )


# --- what is said of it ---------------------------------------------------------------------------------------------


def _origin(statistics: CurvatureFile | CurvatureRequest) -> str:
    if isinstance(statistics, CurvatureFile):
        return statistics.label
    return f"{statistics.model.label}, estimated on {statistics.images.sampling.samples} samples"


def _options(candidates: Sequence[Candidate], name: str) -> dict[str, object]:
    """A method's options as they were, but for what the grid varies."""
    config = next(candidate.config for candidate in candidates if candidate.method.name == name)
    return {key: value for key, value in vars(config).items() if key not in ("rank", "alpha")}


def _commands(
    plans: Sequence[tuple[Plan, list[int]]], candidates: Sequence[Candidate], chosen: Mapping[Setting, int]
) -> dict[Setting, str]:
    """The merge of every chosen setting, as words for the shell."""
    plan_of = {number: plan for plan, members in plans for number in members}
    commands = {}
    for setting, number in chosen.items():
        candidate = candidates[number]
        plan = plan_of[number] if candidate.statistic else plan_of[number].without_curvature()
        recipe = replace(plan.recipe, method=candidate.method.name, options=config_of(candidate, setting))
        commands[setting] = (recipe if plan.statistic else replace(recipe, fisher=())).command_line()
    return commands
