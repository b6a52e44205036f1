"""Curvature of one checkpoint on its task as a file, and back to the checkpoint's repo. `hf-epimer fisher` is this.

Runs unchanged under `accelerate launch`: all processes measure, the first one writes and pushes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from hf_epimer.checkpoints.atomic import atomic_file
from hf_epimer.checkpoints.cache import keep
from hf_epimer.checkpoints.manifest import entering
from hf_epimer.curvature.card import statistics_section
from hf_epimer.curvature.estimate import estimate_files
from hf_epimer.curvature.files import Compression, StatisticsMetadata, save_statistics
from hf_epimer.curvature.request import CurvatureRequest, Gradients
from hf_epimer.errors import OutputError, UsageError
from hf_epimer.hub.conversion import pickled_weights
from hf_epimer.hub.push_beside import push_beside
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.rights import check_push_access
from hf_epimer.methods.statistic import FISHER_FILE, STATISTICS_FILES, StatisticsFile
from hf_epimer.models.base import base_of
from hf_epimer.models.head import check_head
from hf_epimer.models.source import ModelSource, resolve_model
from hf_epimer.tasks.dataset import Sampling, TaskImages, is_large
from hf_epimer.tasks.task import find_task
from hf_epimer.types import Progress


@dataclass(frozen=True)
class StatisticsRecipe:
    """What is to be measured, and where it goes.

    Attributes:
        model: the checkpoint.
        task: a built-in task's name, or a task file.
        base: whose head and image processor are used; None to infer it as in a merge.
        sampling: which samples.
        gradients: which of their gradients.
        files: what is measured, all in one pass.
        compress: how Fisher information is stored, `bf16` or `rank1`; None for fp32.
        batch_size: per process; changes nothing but speed and memory.
        probe: look for randomness first.
        out: file to write; in a folder, which several files need, they get the usual names.
        push: add the files to the checkpoint's repo.
    """

    model: ModelRef
    task: str
    base: ModelRef | None = None
    sampling: Sampling = field(default_factory=Sampling)
    gradients: Gradients = field(default_factory=Gradients)
    files: tuple[StatisticsFile, ...] = (FISHER_FILE,)
    compress: Compression | None = None
    batch_size: int = 32
    probe: bool = True
    out: Path | None = None
    push: bool = False

    def __post_init__(self) -> None:
        sampling = self.sampling
        if (self.out is None) == (not self.push):
            raise UsageError("say where the file goes: either --out FILE or --push")
        if self.push and self.model.is_local:
            raise UsageError(f"--push adds to a repo on the Hub, and {self.model} is a local folder: use --out")
        if sampling.samples is not None and sampling.samples < 1:
            raise UsageError(f"--samples must be a whole number of at least 1, not {sampling.samples}")
        if sampling.fraction is not None and not 0 < sampling.fraction <= 1:
            raise UsageError(f"--fraction must be above 0 and at most 1, not {sampling.fraction}")
        if sampling.streaming and sampling.samples is None:
            raise UsageError("--streaming needs --samples: the length of a stream is not known")
        if not 0 <= sampling.seed < 2**63:
            raise UsageError(f"--seed must be a whole number from 0 to 2^63 - 1, not {sampling.seed}")
        if self.gradients.precision not in ("no", "bf16"):
            raise UsageError(f"--mixed-precision {self.gradients.precision} would lose small gradients: use bf16 or no")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, not {self.batch_size}")
        others = [file.title for file in self.files if file is not FISHER_FILE]
        if self.compress and FISHER_FILE not in self.files:
            raise UsageError(f"--compress is for {FISHER_FILE.title}, not for {others[0]}")
        if self.gradients.kind != "per-sample" and others:
            raise UsageError(f"--squared-mean is for {FISHER_FILE.title} alone, not for {others[0]}")
        if self.out and len(self.files) > 1 and not self.out.is_dir():
            raise UsageError(f"--out {self.out}: {len(self.files)} files need a folder that is there")


@dataclass(frozen=True)
class StatisticsReport:
    """The files (none on all processes but the first, and when pushed), the commit when they were pushed, the header of
    the first, and how long it took."""

    paths: tuple[Path, ...]
    url: str | None
    metadata: dict[str, str]
    seconds: float


def measure(recipe: StatisticsRecipe, progress: Progress = lambda stage, done, total: None) -> StatisticsReport:
    """Estimate the statistics of a checkpoint, unless the cache has them, and write or push the files.

    Raises:
        EpimerError: one of its kinds. Nothing half-written is left; an estimate that could not be pushed is kept.
    """
    started = time.monotonic()
    targets = {file: _target(recipe.out, file.name) for file in recipe.files if recipe.out}
    task = find_task(recipe.task)
    if recipe.push and recipe.model.subfolder:
        raise UsageError(f"{recipe.model}: --push adds files at the top of a repo, not to a subfolder: use --out")
    if recipe.push:
        check_push_access(recipe.model.location)
    model = resolve_model(recipe.model)
    if recipe.push and recipe.model.revision == model.ref.revision:
        raise UsageError(f"--push needs a branch to add to, and {recipe.model.revision} is a commit")
    base = base_of(model, recipe.base)
    check_head(model, base, task)
    sampling = recipe.sampling
    if sampling.streaming is None:
        sampling = replace(sampling, streaming=sampling.samples is not None and is_large(task))
    request = CurvatureRequest(model, base, TaskImages(task, sampling), recipe.gradients)
    accelerator = Accelerator()
    total = recipe.sampling.samples or 0
    progress("measuring", 0, total)
    cached = estimate_files(
        request,
        recipe.files,
        batch_size=recipe.batch_size,
        probe=recipe.probe,
        accelerator=accelerator,
        on_samples=lambda count: progress("measuring", count * accelerator.num_processes, total),
    )
    url = None
    if accelerator.is_main_process:
        paths = {file: _published(path, file, recipe.compress) for file, path in cached.items()}
        for file, out in targets.items():
            with entering(out), atomic_file(out) as unfinished:
                shutil.copyfile(paths[file], unfinished)
        if recipe.push:
            progress("pushing", 0, 0)
            url = _push(paths, recipe.model, model)
    metadata = _header(cached[recipe.files[0]])
    accelerator.end_training()
    written = tuple(targets.values()) if accelerator.is_main_process else ()
    return StatisticsReport(written, url, metadata, time.monotonic() - started)


def _target(out: Path, name: str) -> Path:
    """The file to write, known to be writable; an existing one is replaced only if it holds statistics.

    Raises:
        OutputError: saying what is in the way.
    """
    out = out / name if out.is_dir() else out
    if out.exists() and _header(out).get("format") not in {file.format for file in STATISTICS_FILES}:
        raise OutputError(f"--out {out} exists and is no file of statistics: choose another name")
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"--out {out}: cannot write to {existing}")
    return out


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def _published(path: Path, file: StatisticsFile, compress: Compression | None) -> Path:
    """The file in the form in which it is given away, beside it in the cache."""
    compress = compress if file is FISHER_FILE else file.published_as
    if compress is None:
        return path
    small = path.with_name(f"{path.stem}-{compress}{path.suffix}")
    if not small.is_file():
        header = _header(path)
        fields = {name: header[name] for name in StatisticsMetadata.__dataclass_fields__}
        origin = StatisticsMetadata(**{**fields, "samples": int(fields["samples"]), "seed": int(fields["seed"])})  # type: ignore[arg-type]
        tensors = load_file(path)
        small = keep(small, lambda target: save_statistics(target, tensors, origin, file, compress))
    return small


def _push(paths: Mapping[StatisticsFile, Path], ref: ModelRef, measured: ModelSource) -> str:
    """Add the files and a section of the card each in one commit, to the weights that were measured and no others."""
    names = pickled_weights(measured.files) if measured.conversion else measured.weight_files
    return push_beside(
        ref.location,
        ref.revision,
        {file.name: path for file, path in paths.items()},
        expected={name: measured.sha256.get(name) for name in names},
        sections=[statistics_section(file, ref.location, _header(path)) for file, path in paths.items()],
        title=f"Add {' and '.join(file.name for file in paths)} (hf-epimer)",
    )
