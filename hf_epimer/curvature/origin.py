"""Whether a file of statistics was measured on the model and task that it is used for, as far as its header tells.

A header has the name of the model and what pinned it: a commit, or the sha256 of the weights of a local folder. A file
that is published moves its repo to another commit, so that an unlike commit of the same repo says nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_epimer.hub.refs import same_repo
from hf_epimer.models.source import ModelSource
from hf_epimer.tasks.task import Task, infer_task

_OF_WEIGHTS = re.compile(r"[0-9a-f]{64}")


def other_origin(path: Path, model: ModelSource, task: Task | None) -> str | None:
    """What a file says that it was measured on, where that contradicts what it is used for; None where it does not.

    Args:
        path: of the file of statistics.
        model, task: what it is used for.
    """
    try:
        with safe_open(path, "pt") as file:
            stated = dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return None  # whoever reads its tensors says what is wrong with it
    name, about = stated.get("model", ""), stated.get("task", "")
    is_other_task = bool(about) and task is not None and infer_task(about, tasks={task.name: task}) is None
    if _is_other_model(stated, model) or is_other_task:
        pinned = f"@{stated['model_sha'][:12]}" if stated.get("model_sha") else ""
        return f"{name or 'a model without a name'}{pinned}" + (f", task {about}" if about else "")
    return None


def _is_other_model(stated: Mapping[str, str], model: ModelSource) -> bool:
    name, sha = stated.get("model", ""), stated.get("model_sha", "")
    if not sha:
        return False  # measured while it was trained
    if not _OF_WEIGHTS.fullmatch(sha):  # a commit
        return Path(name).name != model.ref.name if model.ref.is_local else not same_repo(name, model.ref.location)
    if model.ref.is_local:
        return model.content_sha != sha
    known = [model.sha256.get(file) for file in model.weight_files]
    return None not in known and hashlib.sha256(b"".join(bytes.fromhex(str(file)) for file in known)).hexdigest() != sha
