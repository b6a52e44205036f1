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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_epimer import hub
from hf_epimer.architectures import CLIP_VISION, Architecture
from hf_epimer.card import base_from_cards, merge_card
from hf_epimer.checkpoints import (
    FISHER,
    WEIGHTS_INDEX,
    Checkpoint,
    atomic_folder,
    check_target,
    choose_weights,
    read_json,
    write_tensors,
)
from hf_epimer.config import MergeRecipe, ModelRef, recipe_to_json
from hf_epimer.errors import CheckpointError, MismatchError, NotFoundError, StatisticsError, UsageError
from hf_epimer.hub import Source
from hf_epimer.merging import Ingredients, MergedLayer, check_shapes, find_method, merge_layers, normalized_weights
from hf_epimer.methods import METHODS, Method
from hf_epimer.numerics.subspace import capped_rank
from hf_epimer.tasks import Task, benchmark_tasks, infer_task, load_task_file

logger = logging.getLogger(__name__)

FISHER_FORMAT = "hf-epimer.fisher/1"
PROCESSOR = "preprocessor_config.json"
TEXT_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}

Progress = Callable[[str, int, int], None]
"""(what is going on, units done since the last call, units in all); 0 done announces a stage."""


@dataclass(frozen=True)
class Plan:
    """A merge that has been resolved and checked, with nothing read but configs and file lists."""

    recipe: MergeRecipe
    method: Method
    base: Source
    models: tuple[Source, ...]
    fisher: tuple[Source, ...] | None
    tasks: tuple[Task | None, ...]
    weights: tuple[float, ...]
    tower: dict[str, Any]
    architecture: Architecture = CLIP_VISION

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter that will be merged."""
        return self.architecture.shapes(self.tower)

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        rank = getattr(self.recipe.options, "rank", None)
        matrices = {name: shape for name, shape in self.shapes.items() if len(shape) == 2}
        capped = {
            name: capped_rank(rank, (shape[0], shape[1]), len(self.models))
            for name, shape in matrices.items()
            if rank and capped_rank(rank, (shape[0], shape[1]), len(self.models)) < rank
        }
        sources = [self.base, *self.models]
        return {
            "base": str(self.base),
            "models": [str(model) for model in self.models],
            "tasks": {m.label: task.name for m, task in zip(self.models, self.tasks, strict=True) if task},
            "method": self.method.name,
            "options": vars(self.recipe.options) if self.recipe.options else {},
            "weights": list(self.weights),
            "statistics": [str(source) for source in self.fisher or ()],
            "to_estimate": [],
            "parameters": len(self.shapes),
            "matrices": len(matrices),
            "capped_ranks": capped,
            "bytes_to_read": sum(s.sizes.get(name, 0) for s in sources for name in weight_names(s))
            + sum(s.sizes.get(statistics_name(s), 0) for s in self.fisher or ()),
            "out": str(target_folder(self.recipe)),
            "push_to": self.recipe.push_to,
        }


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
    layers: list[dict[str, Any]]
    seconds: dict[str, float]
    memory: dict[str, int]
    results: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but where it went."""
        return {
            "method": self.method,
            "totals": self.totals,
            "seconds": self.seconds,
            "memory": self.memory,
            "layers": self.layers,
        }


def merge(recipe: MergeRecipe, progress: Progress = lambda stage, done, total: None) -> MergeReport:
    """Carry a recipe out: a merged folder, and a push if it asks for one.

    Raises:
        EpimerError: one of its kinds, with a message that says what is at fault and what to do. Nothing half-written
            is left.
    """
    started = time.monotonic()
    plan = make_plan(recipe)
    files = [(source, name) for source in (plan.base, *plan.models) for name in _needed_files(source)]
    files += [(source, statistics_name(source)) for source in plan.fisher or ()]
    remote = [(source, name) for source, name in files if not source.ref.is_local]
    size = sum(source.sizes.get(name, 0) for source, name in remote)
    progress("fetching", 0, size)
    hub.fetch_all(remote, lambda done: progress("fetching", done, size))
    fetched = time.monotonic()
    ingredients = open_ingredients(plan)
    out = target_folder(recipe)
    with atomic_folder(out) as folder:
        report = _merge_into(folder, plan, ingredients, progress, {"fetching": fetched - started})
    url = None
    if recipe.push_to:
        progress("pushing", 0, 0)
        url = hub.push_folder(
            out,
            recipe.push_to,
            private=recipe.private,
            create_pr=recipe.create_pr,
            title=_commit_title(len(plan.models), plan.method.name),
        )
    return replace(report, out=out, url=url)


def push_merged(folder: Path, repo_id: str, *, private: bool = False, create_pr: bool = False) -> str:
    """Push a folder that `merge` has written; also the second try after a failed push.

    Returns:
        The address of the commit or pull request.

    Raises:
        NotFoundError: it is no merged folder.
        AccessError, PushError: as in `merge`.
    """
    if not (folder / "merge_config.json").is_file():
        raise NotFoundError(f"{folder} is no merged folder: there is no merge_config.json")
    content = read_json(folder / "merge_config.json", str(folder))
    hub.check_push_access(repo_id, create_pr)
    title = _commit_title(len(content["models"]), content["method"])
    return hub.push_folder(folder, repo_id, private=private, create_pr=create_pr, title=title)


def make_plan(recipe: MergeRecipe) -> Plan:
    """Resolve, infer and check everything that needs no weights."""
    method = find_method(recipe.method)
    options = method.config() if recipe.options is None else recipe.options
    if not isinstance(options, method.config):
        raise UsageError(f"{method.name} takes a {method.config.__name__}, not a {type(options).__name__}")
    weights = tuple(normalized_weights(recipe.weights, len(recipe.models)))
    if recipe.device != "cpu" and not _device_works(recipe.device):
        raise UsageError(f"--device {recipe.device} is not available here")
    check_target(target_folder(recipe), recipe.overwrite)
    if recipe.push_to:
        hub.check_push_access(recipe.push_to, recipe.create_pr)
    found = [hub.resolve(ref) for ref in recipe.models]
    cards = [source.card() for source in found]
    tasks = _tasks_of(recipe, found, cards)
    models = _labelled(found, tasks)
    towers = [_tower(source) for source in models]
    base = _find_base(recipe, models, cards, towers)
    tower = _tower(base)
    _check_towers(base, tower, models, towers)
    _check_distinct(base, models)
    for source in (base, *models):
        weight_names(source)
    fisher = _find_statistics(recipe, method, models)
    pinned = replace(
        recipe,
        options=options,
        base=replace(base.pinned, label=None),
        models=tuple(model.pinned for model in models),
        fisher=tuple(source.pinned for source in fisher or ()) if recipe.fisher else (),
        tasks=tuple(str(Path(task).absolute()) for task in recipe.tasks),
    )
    return Plan(pinned, method, base, tuple(models), fisher, tuple(tasks), weights, tower)


def target_folder(recipe: MergeRecipe) -> Path:
    """Where the merged folder goes."""
    return Path(recipe.out or f"merged-{recipe.method}")


def weight_names(source: Source) -> list[str]:
    """The names of a checkpoint's weight files.

    Raises:
        CheckpointError: it has none that may be read.
    """
    return choose_weights(source.files, str(source), lambda: source.read_text(WEIGHTS_INDEX))


def statistics_name(source: Source) -> str:
    """The name of the statistics file of a reference: its own, or the one in its folder."""
    return FISHER if FISHER in source.files else next(iter(source.files), FISHER)


def open_ingredients(plan: Plan) -> Ingredients:
    """Open all files and compare names and shapes with the base's config, before any weight is read."""
    canonical = plan.architecture.canonical
    opened = []
    for source in (plan.base, *plan.models):
        paths = [source.fetch(name) for name in weight_names(source)]
        checkpoint = Checkpoint(source.label, paths, canonical)
        check_shapes(plan.shapes, checkpoint, "the checkpoint")
        opened.append(checkpoint)
    base, *models = opened
    base.label = str(replace(plan.base.pinned, label=None))
    base.shapes = {name: base.shapes[name] for name in plan.shapes}  # in the order of the model, not of the file
    if plan.fisher is None:
        statistics = None
    else:
        statistics = [_open_statistics(plan, s, m) for s, m in zip(plan.fisher, plan.models, strict=True)]
    _check_not_the_base(base, models)
    return Ingredients(base, models, plan.weights, statistics)


def _merge_into(
    folder: Path, plan: Plan, ingredients: Ingredients, progress: Progress, seconds: dict[str, float]
) -> MergeReport:
    recipe, method = plan.recipe, plan.method
    started = time.monotonic()
    layers: list[dict[str, Any]] = []
    anonymous = 0
    total = len(plan.shapes)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else _dtype_of(ingredients.base)

    def keep(merged: MergedLayer) -> tuple[str, torch.Tensor]:
        nonlocal anonymous
        layers.append(merged.report)
        anonymous = max(anonymous, _memory("RssAnon"))
        return merged.name, merged.tensor

    stream = merge_layers(
        ingredients,
        method,
        recipe.options,
        seed=recipe.seed,
        exact=recipe.exact,
        device=recipe.device,
        dtype=dtype,
        on_layer=lambda stage, done: progress("merging" if stage == "merge" else "surveying", done, total),
    )
    progress("merging", 0, total)
    write_tensors(folder, plan.shapes, dtype, map(keep, stream))
    seconds = {**seconds, "merging": time.monotonic() - started}
    _write_json(folder / "config.json", _output_config(plan, dtype))
    _copy_processor(plan.base, folder)
    results = None
    if recipe.evaluate:
        results = _evaluate(folder, plan, progress)
        seconds["evaluating"] = time.monotonic() - started - seconds["merging"]
        _write_json(folder / "results.json", {key: value for key, value in results.items() if key != "datasets"})
    seconds["total"] = sum(seconds.values())
    memory = {"peak_anonymous": anonymous, "peak_resident": _memory("VmHWM")}
    report = MergeReport(folder, None, method.name, _totals(layers), layers, seconds, memory, results)
    _write_json(folder / "merge_config.json", recipe_to_json(recipe) | {"versions": _versions()})
    _write_json(folder / "merge_report.json", report.to_json())
    card = merge_card(
        recipe, method, plan.base, plan.models, plan.weights, _diagnostics(report), _datasets(plan), results
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report


# --- finding things -------------------------------------------------------------------------------------------------


def _tasks_of(recipe: MergeRecipe, models: Sequence[Source], cards: Sequence[dict[str, Any]]) -> list[Task | None]:
    given = {task.name: task for task in map(load_task_file, recipe.tasks)}
    known = {**benchmark_tasks(), **given}
    found = []
    for source, card in zip(models, cards, strict=True):
        datasets = card.get("datasets") or ()
        task = infer_task(
            source.ref.label, [datasets] if isinstance(datasets, str) else datasets, source.ref.name, known
        )
        if task is None and recipe.evaluate:
            raise UsageError(
                f"{source}: --evaluate needs its task; label it (mnist={source.ref.location}) or add --task FILE; "
                f"known tasks: {', '.join(known)}"
            )
        found.append(task)
    return found


def _labelled(models: Sequence[Source], tasks: Sequence[Task | None]) -> list[Source]:
    """Every model with a unique label: its own, its task's name, or its repo's name."""
    labels: list[str] = []
    for source, task in zip(models, tasks, strict=True):
        wanted = source.ref.label or (task.name if task else source.ref.name)
        taken = sum(label == wanted or label.startswith(f"{wanted}-") for label in labels)
        labels.append(f"{wanted}-{taken + 1}" if wanted in labels else wanted)
    return [replace(source, label=label) for source, label in zip(models, labels, strict=True)]


def _tower(source: Source) -> dict[str, Any]:
    if "config.json" not in source.files:
        raise CheckpointError(f"{source}: there is no config.json")
    return CLIP_VISION.tower_config(read_json(source.fetch("config.json"), str(source)), str(source))


def _find_base(
    recipe: MergeRecipe,
    models: Sequence[Source],
    cards: Sequence[dict[str, Any]],
    towers: Sequence[dict[str, Any]],
) -> Source:
    if recipe.base is not None:
        return hub.resolve(recipe.base)
    labelled = [(model.label, card) for model, card in zip(models, cards, strict=True)]
    ref, why = base_from_cards(labelled)
    if ref is not None:
        return hub.resolve(ref)
    if why.startswith("the model cards disagree"):
        raise MismatchError(f"{why}; name the right one with --base")
    known = CLIP_VISION.known_base(towers[0])
    if known is None:
        raise UsageError(f"{why} and {models[0]} is not shaped like a well-known CLIP model: name the base with --base")
    logger.info("base %s, by the shape of %s", known, models[0])
    return hub.resolve(ModelRef(known))


def _find_statistics(recipe: MergeRecipe, method: Method, models: Sequence[Source]) -> tuple[Source, ...] | None:
    if method.needs != "fisher":
        if recipe.fisher:
            users = ", ".join(m.name for m in METHODS.values() if m.needs == "fisher")
            raise UsageError(f"--fisher: {method.name} uses no Fisher information; {users} do")
        if method.needs:
            raise StatisticsError(
                f"{method.name} needs Gram matrices of every layer's inputs: give them to merge_state_dicts in Python"
            )
        return None
    given = _given_statistics(recipe, models)
    found, lacking = [], []
    for model in models:
        source = given.get(model.label, model)
        if model.label in given or FISHER in source.files:
            found.append(source)
        else:
            lacking.append(str(model))
    if lacking:
        free = ", ".join(name for name, other in METHODS.items() if other.needs is None)
        raise StatisticsError(
            f"{method.name} needs the Fisher information of {', '.join(lacking)}: give it with --fisher, put {FISHER} "
            f"beside the checkpoint's weights, or choose a method that needs no data: {free}"
        )
    return tuple(found)


def _given_statistics(recipe: MergeRecipe, models: Sequence[Source]) -> dict[str, Source]:
    """--fisher references by the label of the model they belong to."""
    labelled = [ref for ref in recipe.fisher if ref.label]
    if labelled and len(labelled) < len(recipe.fisher):
        raise UsageError("--fisher: label all references (dtd=REF) or none of them")
    if not labelled:
        if recipe.fisher and len(recipe.fisher) != len(models):
            raise UsageError(f"--fisher: {len(models)} models but {len(recipe.fisher)} unlabelled references")
        labelled = [replace(ref, label=model.label) for ref, model in zip(recipe.fisher, models, strict=False)]
    labels = {model.label for model in models}
    given = {}
    for ref in labelled:
        if ref.label not in labels:
            raise UsageError(
                f"--fisher {ref}: no model is labelled {ref.label} (there are {', '.join(sorted(labels))})"
            )
        given[str(ref.label)] = _statistics_source(ref)
    return given


def _statistics_source(ref: ModelRef) -> Source:
    path = Path(ref.location)
    if ref.is_local and path.is_file():
        return Source(ref, str(ref.label), frozenset({path.name}), {path.name: path.stat().st_size})
    source = hub.resolve(ref)
    if FISHER not in source.files:
        raise NotFoundError(f"--fisher {ref}: there is no {FISHER}")
    return source


def _open_statistics(plan: Plan, source: Source, model: Source) -> Checkpoint:
    path = source.fetch(statistics_name(source))
    label = f"Fisher information of {model.label} ({path.name})"
    statistics = Checkpoint(label, [path], plan.architecture.canonical)
    if statistics.metadata.get("format") != FISHER_FORMAT:
        logger.warning("%s: %s carries no %s metadata; taken as it is", model.label, path, FISHER_FORMAT)
    check_shapes(plan.shapes, statistics, "the file")
    return statistics


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_towers(
    base: Source, tower: dict[str, Any], models: Sequence[Source], towers: Sequence[dict[str, Any]]
) -> None:
    for model, other in zip(models, towers, strict=True):
        unlike = [field for field, value in tower.items() if other[field] != value]
        if unlike:
            listed = "; ".join(f"{field}: {tower[field]} | {other[field]}" for field in unlike)
            raise MismatchError(f"{model} is another architecture than the base {base.title} ({listed})")


def _check_distinct(base: Source, models: Sequence[Source]) -> None:
    seen: dict[str, Source] = {}
    for model in models:
        if model.identity == base.identity:
            raise MismatchError(f"{model} is its own base: it has nothing to merge; name its real base with --base")
        if model.identity in seen:
            logger.warning("%s is merged twice (as %s and %s)", model.title, seen[model.identity].label, model.label)
        seen[model.identity] = model


def _check_not_the_base(base: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """A copy of the base under another name; any real fine-tuned model differs in the first tensor compared."""
    for model in models:
        if all(torch.equal(model.tensor(name).float(), base.tensor(name).float()) for name in base.shapes):
            raise MismatchError(f"{model.label}: every tensor equals the base's; a model cannot be its own base")


def _device_works(device: str) -> bool:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True


# --- what goes into the folder --------------------------------------------------------------------------------------


def _output_config(plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": [plan.architecture.output_class],
        "model_type": plan.architecture.output_type,
        **plan.tower,
        **_projection_dim(plan.base),
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name before transformers 5
    }


def _projection_dim(base: Source) -> dict[str, int]:
    config = read_json(base.fetch("config.json"), str(base))
    return {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}


def _dtype_of(base: Checkpoint | Any) -> torch.dtype:
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


def _needed_files(source: Source) -> list[str]:
    return [*weight_names(source), *(name for name in (PROCESSOR, "processor_config.json") if name in source.files)]


def _totals(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    solved = [layer for layer in layers if "steps" in layer]
    totals: dict[str, Any] = {
        "parameters": sum(math.prod(layer["shape"]) for layer in layers),
        "layers": len(layers),
        "capped": [layer["name"] for layer in layers if layer.get("capped")],
        "merged_norm": math.sqrt(math.fsum(layer["merged_norm"] ** 2 for layer in layers)),
    }
    if any("eta" in layer for layer in layers):
        totals["eta"] = math.fsum(layer.get("eta", 0.0) for layer in layers)
        totals["steps"] = sum(layer["steps"] for layer in solved)
        totals["worst_condition"] = max((layer["condition"] for layer in solved), default=1.0)
    return totals


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
        shown["solver steps, all layers"] = str(totals["steps"])
    shown["seconds"] = f"{report.seconds['merging']:.1f}"
    return shown


def _datasets(plan: Plan) -> list[str]:
    return sorted({task.dataset for task in plan.tasks if task and not Path(task.dataset).is_absolute()})


def _evaluate(folder: Path, plan: Plan, progress: Progress) -> dict[str, Any]:
    from hf_epimer.evaluation import evaluate_folder

    tasks = [task for task in plan.tasks if task]
    progress("evaluating", 0, len(tasks))
    for name in TEXT_FILES & plan.base.files:
        plan.base.fetch(name)
    return evaluate_folder(
        folder,
        plan.base.fetch("config.json").parent,
        tasks,
        name=plan.recipe.push_to or target_folder(plan.recipe).name,
        base_name=plan.base.title,
        on_task=lambda: progress("evaluating", 1, len(tasks)),
    )


def _commit_title(models: int, method: str) -> str:
    return f"Merge {models} checkpoints with {method} (hf-epimer)"


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
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
