"""One merge from beginning to end. `merge(recipe)` reads like the README.

resolve -> find the base -> check that everything fits -> stream layer by layer -> card and reports -> rename -> push

Whatever can go wrong for reasons known beforehand (rights, configs, missing statistics, a target folder in use) goes
wrong before a weight is read; whatever goes wrong later leaves nothing behind.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_epimer.checkpoints.atomic import atomic_folder
from hf_epimer.checkpoints.reader import TensorSource, read_json
from hf_epimer.checkpoints.writer import write_tensors
from hf_epimer.errors import NotFoundError
from hf_epimer.hub import push as pushing
from hf_epimer.hub.refs import check_new_repo_id
from hf_epimer.hub.source import Source
from hf_epimer.lora.adapter import ADAPTER_CONFIG
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import LayerReport, totals_of
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.models.files import PROCESSOR_FILES, config_of
from hf_epimer.pipeline.adapter_output import dense_layers, write_merged_adapter
from hf_epimer.pipeline.calibration.step import calibrated_layers
from hf_epimer.pipeline.card import merge_card
from hf_epimer.pipeline.inputs import fetch, gather
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.planner import make_plan
from hf_epimer.pipeline.recipe import MergeRecipe, recipe_to_json
from hf_epimer.pipeline.tune_alpha import divergences, nearest
from hf_epimer.types import Progress

if TYPE_CHECKING:
    from hf_epimer.evaluation.results import Results

logger = logging.getLogger(__name__)

PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `merge_report.json` is its JSON.

    Attributes:
        out: the merged folder.
        url: the commit or pull request, None when nothing was pushed.
        totals: eta, layers, capped layers, solver steps, norms.
        layers: one entry per parameter.
        seconds: per stage and in all.
        memory: peak bytes of the process (resident, and anonymous where the system tells).
        results: accuracies, None unless evaluated.
    """

    out: Path
    url: str | None
    method: str
    totals: dict[str, Any]
    layers: tuple[LayerReport, ...]
    seconds: dict[str, float]
    memory: dict[str, int]
    results: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but where it went."""
        content = {
            "method": self.method,
            "totals": self.totals,
            "seconds": self.seconds,
            "memory": self.memory,
            "results": self.results,
            "layers": [layer.to_json() for layer in self.layers],
        }
        return _strict(content)


def merge(recipe: MergeRecipe, progress: Progress = lambda stage, done, total: None) -> MergeReport:
    """Carry a recipe out: a merged folder, and a push if it asks for one.

    Raises:
        EpimerError: one of its kinds, with a message that says what is at fault and what to do. Nothing half-written
            is left.
    """
    started = time.monotonic()
    plan = make_plan(recipe)
    fetch(plan, progress, PROCESSOR_FILES)
    seconds = {"fetching": time.monotonic() - started}
    ingredients = gather(plan, progress)
    seconds["statistics"] = time.monotonic() - started - seconds["fetching"]
    tried: dict[float, float] = {}
    if plan.recipe.tune_alpha:
        tried = divergences(plan, ingredients, progress)
        plan = plan.at_alpha(nearest(tried))
        seconds["choosing alpha"] = time.monotonic() - started - sum(seconds.values())
    out = recipe.target
    with atomic_folder(out, recipe.overwrite) as folder:
        report = _merge_into(folder, plan, ingredients, progress, seconds, tried)
    url = None
    if recipe.push_to:
        progress("pushing", 0, 0)
        url = pushing.push_folder(
            out,
            _files_of(out),
            recipe.push_to,
            private=recipe.private,
            create_pr=recipe.create_pr,
            title=_commit_title(len(plan.models), plan.method.name, plan.writes_adapter),
        )
    return replace(report, out=out, url=url)


def push_merged(folder: Path, repo_id: str, *, private: bool = False, create_pr: bool = False) -> str:
    """Push a folder that `merge` has written; also the second try after a failed push.

    Returns:
        The address of the commit or pull request.

    Raises:
        UsageError: `repo_id` is no name for a repo, or one of the models that were merged.
        NotFoundError: it is no merged folder.
        AccessError, PushError: as in `merge`.
    """
    check_new_repo_id(repo_id)
    if not (folder / "merge_config.json").is_file():
        raise NotFoundError(f"{folder} is no merged folder: there is no merge_config.json")
    content = read_json(folder / "merge_config.json", str(folder))
    if not content.get("models") or "method" not in content:
        raise NotFoundError(f"{folder} is no merged folder: its merge_config.json names no models")
    named = [str(text) for text in (content.get("base"), *content["models"])]
    inputs = [text.rpartition("=")[2].partition("@")[0] for text in named]
    pushing.check_not_an_input(repo_id, inputs)
    pushing.check_not_an_input(pushing.check_push_access(repo_id, create_pr=create_pr, private=private), inputs)
    title = _commit_title(len(content["models"]), content["method"], (folder / ADAPTER_CONFIG).is_file())
    return pushing.push_folder(folder, _files_of(folder), repo_id, private=private, create_pr=create_pr, title=title)


def _files_of(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def _merge_into(
    folder: Path,
    plan: Plan,
    ingredients: Ingredients,
    progress: Progress,
    seconds: dict[str, float],
    tried: dict[float, float],
) -> MergeReport:
    recipe, method = plan.recipe, plan.method
    started = time.monotonic()
    layers: list[LayerReport] = []
    anonymous = 0
    total = len(plan.shapes)

    def keep(report: LayerReport) -> None:
        nonlocal anonymous
        layers.append(report)
        anonymous = max(anonymous, _memory("RssAnon"))

    def passed(merged: MergedLayer) -> tuple[str, torch.Tensor]:
        keep(merged.report)
        return merged.name, merged.tensor

    def on_layer(stage: str, done: int) -> None:
        progress("merging" if stage == "merge" else "surveying", done, total)

    progress("merging", 0, total)
    if plan.writes_adapter:
        dtype = getattr(torch, recipe.dtype or "float32")
        write_merged_adapter(folder, plan, ingredients, dtype, keep, on_layer)
    else:
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else dtype_of(ingredients.base)
        stream = dense_layers(plan, ingredients, dtype, on_layer)
        if recipe.calibrate:
            stream = calibrated_layers(stream, plan, ingredients, folder, progress)
        write_tensors(folder, plan.shapes, dtype, map(passed, stream))
        _write_json(folder / "config.json", _output_config(plan, dtype))
        _copy_processor(plan.base, folder)
    seconds = {**seconds, "merging": time.monotonic() - started}
    totals = totals_of(layers)
    if "note" in totals:
        logger.warning("%s", totals["note"])
    results: Results | None = None
    if recipe.evaluate:
        results = _evaluate(folder, plan, progress)
        seconds["evaluating"] = time.monotonic() - started - seconds["merging"]
        _write_json(folder / "results.json", results.to_json())
    seconds["total"] = sum(seconds.values())
    memory = {"peak_anonymous": anonymous, "peak_resident": _memory("VmHWM")}
    accuracies = results.to_json() if results else None
    if tried:
        totals["alpha"] = recipe.options.alpha
        totals["divergence_at_alpha"] = {f"{alpha:g}": value for alpha, value in tried.items()}
    report = MergeReport(folder, None, method.name, totals, tuple(layers), seconds, memory, accuracies)
    _write_json(folder / "merge_config.json", recipe_to_json(recipe) | _conversions(plan) | {"versions": _versions()})
    _write_json(folder / "merge_report.json", report.to_json())
    card = merge_card(
        recipe,
        method,
        plan.architecture,
        plan.base,
        plan.models,
        _diagnostics(report),
        _datasets(plan),
        results,
        as_adapter=plan.writes_adapter,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report


# --- what goes into the folder --------------------------------------------------------------------------------------


def _output_config(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    config = config_of(plan.base)
    return {
        "architectures": [plan.architecture.output_class],
        "model_type": plan.architecture.output_type,
        **plan.vision_config,
        **{field: config[field] for field in plan.architecture.carried if field in config},
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name before transformers 5
    }


def dtype_of(base: TensorSource) -> torch.dtype:
    """The type that a merge is written in unless another one is asked for."""
    dtype = base.tensor(next(iter(base.shapes))).dtype
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _copy_processor(base: Source, folder: Path) -> None:
    if PROCESSOR in base.files:
        (folder / PROCESSOR).write_bytes(base.fetch(PROCESSOR).read_bytes())
    elif "processor_config.json" in base.files:
        nested = read_json(base.fetch("processor_config.json"), str(base)).get("image_processor")
        if nested:
            _write_json(folder / PROCESSOR, nested)
    if not (folder / PROCESSOR).exists():
        logger.warning("%s has no %s; the merged model has none either", base, PROCESSOR)


def _diagnostics(report: MergeReport) -> dict[str, str]:
    totals = report.totals
    shown = {
        "parameters": f"{totals['parameters']:,}",
        "norm of the merged task vector": f"{totals['merged_norm']:.4g}",
    }
    if totals["capped"]:
        shown["layers with capped rank"] = str(len(totals["capped"]))
    if "eta" in totals:
        shown["curvature heterogeneity eta"] = f"{totals['eta']:.4g}"
    if "steps" in totals:
        shown["solver steps, all layers"] = str(totals["steps"])
    if "alpha" in totals:
        when = "before calibration, " if "calibrated" in totals else ""
        shown["alpha"] = f"{totals['alpha']:g}: {when}where predictions are nearest to those of the models merged"
    if "calibrated" in totals:
        shown["calibrated layers"] = str(totals["calibrated"])
        shown["largest change of a layer by calibration"] = f"{totals['largest_calibration']:.1%} of its weight"
    if "largest_rank" in totals:
        shown["largest rank of a merged layer"] = str(totals["largest_rank"])
        shown["largest part of a layer's norm cut off"] = f"{totals['largest_cut_off']:.2%}"
    if "note" in totals:
        shown["unique"] = totals["note"]
    shown["seconds"] = f"{report.seconds['merging']:.1f}"
    return shown


def _datasets(plan: Plan) -> list[str]:
    return sorted({task.dataset for task in plan.tasks if not Path(task.dataset).is_absolute()})


def _evaluate(folder: Path, plan: Plan, progress: Progress) -> Results:
    from hf_epimer.evaluation.accuracy import evaluate_folder

    progress("evaluating", 0, len(plan.tasks))
    return evaluate_folder(
        folder,
        plan.base,
        plan.tasks,
        name=plan.recipe.push_to or plan.recipe.target.name,
        limit=plan.recipe.limit,
        on_task=lambda: progress("evaluating", 1, len(plan.tasks)),
    )


def _commit_title(models: int, method: str, adapters: bool) -> str:
    return f"Merge {models} {'adapters' if adapters else 'checkpoints'} with {method} (hf-epimer)"


def _conversions(plan: Plan) -> dict[str, Any]:
    """For the record: which commits are those of a bot's pull request, and what was asked for instead."""
    found = {
        f"{source.title}@{source.ref.revision}": asdict(source.conversion)
        for source in (plan.base, *(model.source for model in plan.models))
        if source.conversion
    }
    return {"conversions": found} if found else {}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("hf-epimer", "torch", "safetensors", "huggingface_hub", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _memory(field: str) -> int:
    """A memory figure of this process in bytes (RssAnon: backed by no file; VmHWM: peak); 0 where not told."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith(field))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _write_json(file: Path, content: Any) -> None:
    text = json.dumps(_strict(content), indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def _strict(content: Any) -> Any:
    """NaN and Infinity, which JSON does not have, as null."""
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
