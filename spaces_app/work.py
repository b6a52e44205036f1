"""What runs in children: every function takes `report` and plain values, and returns plain values.

All mathematics is in hf_epimer; here its public functions are called in order and their progress is put on one scale.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from PIL import Image
from selection import Selection

from hf_epimer import (
    METHODS,
    EpimerError,
    Grid,
    MergeRecipe,
    ModelRef,
    Plan,
    Task,
    diagnose,
    evaluate,
    make_plan,
    make_zoo,
    merge,
    predict,
    push_merged,
    sweep,
)

disable_progress_bars()
datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

Report = Callable[[float, str], None]
Progress = Callable[[str, int, int], None]

BASELINES = ("mean", "tsv-m")
"""What every merge is compared with."""

SHARES = {
    "fetching": (0.0, 0.3, "Downloading"),
    "estimating curvature": (0.3, 0.7, "Estimating curvature"),
    "surveying": (0.7, 0.75, "Surveying layers"),
    "merging": (0.75, 0.8, "Merging layers"),
    "calibrating": (0.8, 0.95, "Calibrating layers"),
    "diagnosing": (0.75, 0.95, "Looking at layers"),
    "evaluating": (0.95, 1.0, "Measuring"),
    "validating": (0.2, 1.0, "Measuring settings"),
}
"""Stage of hf_epimer -> its share of the whole, and its name on the page; one that has nothing to do is passed over."""


def look_up(report: Report, selection: Selection) -> dict[str, Any]:
    """What would be merged: nothing but configs and cards is downloaded."""
    report(0.1, "Looking the checkpoints up")
    return _described(_checked_plan(selection, selection.recipe(), statistics_optional=True))


def fetch(report: Report, selection: Selection) -> dict[str, Any]:
    """Download the weights that any work on a selection reads: how many models there are, and all their bytes."""
    report(0.0, "Checking the checkpoints")
    plan = _checked_plan(selection, selection.recipe(), statistics_optional=True)
    sources = [plan.base, *(model.source for model in plan.models)]
    for number, source in enumerate(sources):
        report(0.02 + 0.2 * number / len(sources), f"Downloading {source.title}")
        source.folder()
    return {"models": len(plan.models), "bytes": plan.summary()["bytes_to_read"]}


def merge_and_measure(
    report: Report,
    selection: Selection,
    method: str,
    options: dict[str, Any],
    calibrate: bool,
    images: int | None,
    shared: str,
    home: str,
) -> dict[str, Any]:
    """Merge, and compare with the fine-tuned models and the baselines.

    Args:
        options: of the method.
        calibrate: solve the merge's layers again on training images.
        images: test images per task; None to measure nothing.
        shared: where accuracies are kept that do not depend on the method.
        home: an empty folder for the results.
    """
    report(0.0, "Checking the checkpoints")
    out = Path(home) / f"merged-{method}"
    name = f"{method}, calibrated" if calibrate else method
    recipe = selection.recipe(
        method=method,
        options=METHODS[method].config(**options),
        device=_device(),
        calibrate=calibrate,
        evaluate=images is not None,
        limit=images,
        out=str(out),
    )
    plan = _checked_plan(selection, recipe)
    recipe = plan.recipe
    merged = merge(recipe, _on_scale(report, 0.02, 0.5 if images else 0.9))
    rows: list[dict[str, Any]] = []
    if images:
        rows = _compared(report, plan, images, Path(home), Path(shared))
        rows = [row for row in rows if row["name"] != name]
        assert merged.results
        rows.append({"name": name, "tasks": _accuracies(merged.results)})
    report(0.95, "Packing")
    card = (out / "README.md").read_text(encoding="utf-8")
    archive = shutil.make_archive(str(out), "zip", root_dir=home, base_dir=out.name)
    return {
        **_described(plan),
        "selection": replace(selection, models=plan.recipe.models, base=plan.recipe.base),
        "method": method,
        "name": name,
        "options": asdict(recipe.options),
        "images": images,
        "rows": rows,
        "card": card,
        "command": recipe.command_line(),
        "totals": {name: value for name, value in merged.totals.items() if name != "capped"},
        "seconds": merged.seconds,
        "folder": str(out),
        "archive": archive,
    }


def diagnosis(report: Report, selection: Selection, ranks: Sequence[int], home: str) -> dict[str, Any]:
    """What is known before a merge; diagnosis.json."""
    report(0.0, "Checking the checkpoints")
    recipe = selection.recipe(device=_device())
    _checked_plan(selection, recipe, statistics_optional=True)
    diagnosis = diagnose(recipe, ranks, str(Path(home) / "diagnosis"), _on_scale(report, 0.02, 1.0))
    return diagnosis.to_json()


def swept(
    report: Report,
    selection: Selection,
    methods: Sequence[str],
    ranks: Sequence[int],
    alphas: Sequence[float],
    images: int,
    home: str,
) -> dict[str, Any]:
    """Methods x ranks x alphas on validation images; sweep.json."""
    report(0.0, "Checking the checkpoints")
    recipe = selection.recipe(method=methods[0] if methods else "epimer", device=_device())
    grid = Grid(tuple(methods), tuple(ranks), tuple(alphas))
    _checked_plan(selection, recipe)
    return sweep(recipe, grid, str(Path(home) / "sweep"), _on_scale(report, 0.02, 1.0), limit=images).to_json()


def classify(
    report: Report,
    selection: Selection,
    merged: str | None,
    image: Image.Image,
    task: str,
    classes: Sequence[str],
    shared: str,
) -> dict[str, Any]:
    """The most probable classes of a picture: by the base, every model, and the merge.

    Args:
        merged: its folder; None for EpiMer's merge with its defaults, made now if need be.
        task: a built-in name or a task file; empty for `classes`.
        classes: names to choose from.
        shared: where the default merge is kept.
    """
    recipe = selection.recipe(method="epimer", device=_device())
    plan = _checked_plan(selection, recipe)
    assert plan.recipe.base
    chosen = Task("own", dataset="", class_names=tuple(classes), templates=("a photo of a {}.",)) if classes else task
    folder = merged or _default_merge(plan, Path(shared), _on_scale(report, 0.0, 0.5))
    models = {"base": plan.recipe.base}
    models |= {str(ref.label): ref for ref in plan.recipe.models}
    models["merged"] = ModelRef(folder)
    rows = []
    for number, (name, ref) in enumerate(models.items()):
        report(0.5 + 0.5 * number / len(models), f"Asking {name}")
        rows.append({"name": name, "classes": predict(ref, [image], chosen, plan.recipe.base)[0]})
    return {"rows": rows}


def push(report: Report, folder: str, repo: str, private: bool, token: str | None) -> str:
    """Push a merged folder; the token lives in this child's memory and ends with it."""
    report(0.2, f"Pushing to {repo}")
    if token:
        os.environ["HF_TOKEN"] = token
    return push_merged(Path(folder), repo, private=private)


def build_zoo(report: Report, folder: str) -> None:
    """Draw and train the demo zoo, if it is not there."""
    seen: list[str] = []

    def show(stage: str, fraction: float) -> None:
        if stage not in seen:
            seen.append(stage)
        if stage == "base":
            report(0.5 * fraction, "training the base model")
        else:  # four tasks share the second half
            report(min(0.99, 0.5 + 0.125 * (len(seen) - 2 + fraction)), f"fine-tuning on {stage}")

    make_zoo(Path(folder), show)


def _device() -> str:
    """Where layers are solved: the GPU of paid hardware or of a ZeroGPU worker, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- checking -------------------------------------------------------------------------------------------------------


def _checked_plan(selection: Selection, recipe: MergeRecipe, statistics_optional: bool = False) -> Plan:
    """Everything resolved, and small enough.

    Raises:
        EpimerError: what `make_plan` raises, or it is too large.
    """
    plan = make_plan(recipe, statistics_optional=statistics_optional)
    sources = (plan.base, *(model.source for model in plan.models))
    remote = [source for source in sources if not source.ref.is_local]
    size = plan.summary()["bytes_to_read"] if remote else 0
    if size > selection.largest:
        largest = max(remote, key=lambda source: sum(source.sizes.values()))
        raise EpimerError(
            f"these checkpoints are {size / 1e9:.1f} GB to download, and at most {selection.largest / 1e9:g} GB are "
            f"allowed here (the largest is {largest.title}): choose fewer or smaller ones, or run hf-epimer on your "
            "own machine"
        )
    return plan


def _described(plan: Plan) -> dict[str, Any]:
    summary = plan.summary()
    return {
        "base": plan.base.title,
        "base_commit": plan.base.ref.revision,
        "models": [
            {
                "label": model.label,
                "name": model.source.title,
                "commit": model.source.ref.revision,
                "task": model.task.name if model.task else None,
                "classes": list(model.task.class_names or ()) if model.task else [],
            }
            for model in plan.models
        ],
        "bytes": summary["bytes_to_read"],
        "statistics": plan.statistic is not None,
    }


# --- measuring ------------------------------------------------------------------------------------------------------


def _compared(report: Report, plan: Plan, images: int, home: Path, shared: Path) -> list[dict[str, Any]]:
    """Base, fine-tuned models and baselines, measured once for the same checkpoints and number of images."""
    kept = shared / f"{_identity(plan, images)}.json"
    if kept.is_file():
        rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
        return rows
    base = plan.recipe.base
    assert base
    specialists = {model.task.name: (model.source.pinned, model.task) for model in plan.models if model.task}
    tasks = [task for _, task in specialists.values()]
    report(0.5, "Measuring the base")
    rows = [{"name": "base", "tasks": _accuracies(evaluate(base, tasks, base, limit=images).to_json())}]
    fine_tuned: dict[str, float] = {}
    for number, (model, task) in enumerate(specialists.values()):
        report(0.55 + 0.15 * number / len(tasks), f"Measuring the model of {task.name}")
        fine_tuned |= _accuracies(evaluate(model, [task], base, limit=images).to_json())
    rows.append({"name": "fine-tuned", "tasks": fine_tuned})
    for number, method in enumerate(BASELINES):
        out, low = home / f"baseline-{method}", 0.7 + 0.12 * number
        plain = replace(plan.recipe, calibrate=False, fisher=(), out=str(out))
        recipe = replace(plain, method=method, options=METHODS[method].config())
        measured = merge(recipe, _on_scale(report, low, low + 0.12, f"{method}: ")).results
        shutil.rmtree(out)
        assert measured
        rows.append({"name": method, "tasks": _accuracies(measured)})
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(rows), encoding="utf-8")
    os.replace(unfinished, kept)
    return rows


def _accuracies(results: dict[str, Any]) -> dict[str, float]:
    return {name: row["accuracy"] for name, row in results["tasks"].items()}


def _identity(plan: Plan, images: int | None) -> str:
    """What the accuracies of the comparison depend on: pinned references, and when local files were changed."""
    stamps = [str(plan.base), *map(str, plan.models), *(str(model.task) for model in plan.models), str(images)]
    for source in (plan.base, *(model.source for model in plan.models)):
        if source.ref.is_local:
            stamps += [str(Path(source.ref.location, name).stat().st_mtime_ns) for name in sorted(source.files)]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:24]


def _default_merge(plan: Plan, shared: Path, progress: Progress) -> str:
    """The folder of EpiMer's merge with its defaults, made once for the same checkpoints."""
    out = shared / f"default-{_identity(plan, None)}"
    if not out.is_dir():
        merge(replace(plan.recipe, options=None, out=str(out)), progress)
    return str(out)


def _on_scale(report: Report, low: float, high: float, prefix: str = "") -> Progress:
    """The progress of hf_epimer as a share of the whole, never going back."""
    done: dict[str, int] = {}

    def progress(stage: str, step: int, total: int) -> None:
        done[stage] = done.get(stage, 0) + step
        kind = "validating" if stage in ("validating", "testing") else stage
        if kind not in SHARES or not total:
            return
        start, end, name = SHARES[kind]
        share = start + (end - start) * min(1.0, done[stage] / total)
        amount = (
            f"{done[stage] / 1e9:.1f} of {total / 1e9:.1f} GB" if stage == "fetching" else f"{done[stage]} of {total}"
        )
        report(low + (high - low) * share, f"{prefix}{name}: {amount}")

    return progress
