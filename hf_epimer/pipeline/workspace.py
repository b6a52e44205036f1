"""What a long stage of a merge keeps until it is done, so that a killed run is gone on with.

A workspace lies in the package's folder of HF_HOME and is named after everything that decides the stage's result: the
merge that it begins with, the images and the settings. The stage removes it at its end; what is left goes by age.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import constants

from hf_epimer.errors import OutputError
from hf_epimer.merging.stream import MergedLayer
from hf_epimer.pipeline.plan import Plan

logger = logging.getLogger(__name__)

KEPT = 7 * 24 * 3600
"""Seconds after which what an interrupted run has left is removed."""


def open_workspace(
    stage: str, plan: Plan, start: Sequence[MergedLayer], settings: Sequence[object], needed: int, content: str
) -> Path:
    """The folder of one stage of this merge; those of others that were left long ago are removed.

    Args:
        stage: the folder's parent, and for messages.
        start: the merge that the stage begins with.
        settings: whatever else decides its result.
        needed: bytes that it will keep.
        content: what these bytes are, for messages.

    Raises:
        OutputError: there is no room for them; naming the folder and what is needed.
    """
    digest = hashlib.sha256()
    for layer in start:
        digest.update(layer.name.encode())
        digest.update(layer.tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    where = [*settings, plan.recipe.device, torch.get_num_threads()]
    sources = [(model.label, model.weight, model.source.identity, str(model.images)) for model in plan.models]
    revisions = [model.images.revision for model in plan.models if model.images]
    digest.update(repr((where, sources, revisions)).encode())
    home = Path(constants.HF_HOME) / "hf-epimer" / stage
    for other in home.glob("*"):
        if time.time() - other.stat().st_mtime > KEPT:
            shutil.rmtree(other, ignore_errors=True)
    workspace = home / digest.hexdigest()[:24]
    workspace.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(workspace).free
    held = sum(file.stat().st_size for file in workspace.rglob("*") if file.is_file())
    logger.info("%s keeps %.1f GB of %s in %s until it is done", stage, needed / 1e9, content, workspace)
    if needed - held > free:
        raise OutputError(
            f"{stage} needs {needed / 1e9:.1f} GB for {content} in {workspace}, and {free / 1e9:.1f} GB are "
            "free: make room, set HF_HOME to another disk, or take fewer --samples"
        )
    return workspace
