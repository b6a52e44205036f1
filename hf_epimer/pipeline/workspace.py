"""What a long stage of a merge keeps until it is done, so that a killed run is gone on with.

A workspace lies in the package's folder of HF_HOME and is named after everything that decides the stage's result: the
merge that it begins with, the images and the settings. The stage removes it at its end; what killed runs have left goes
by age and by size.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor

from hf_epimer.checkpoints.atomic import Busy, locked
from hf_epimer.errors import OutputError
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.processes import launched

logger = logging.getLogger(__name__)

KEPT = 7 * 24 * 3600
"""Seconds after which what a killed run has left is removed."""

ROOM = 20 * 10**9
"""Bytes that workspaces of one stage may take together, if they can: the oldest left ones make room."""


@contextmanager
def workspace_of(
    stage: str, plan: Plan, start: Mapping[str, Tensor], settings: Sequence[object], needed: int, content: str
) -> Iterator[Path]:
    """The folder of one stage of this merge, nobody else's while the block lasts.

    Args:
        stage: the folder's parent, and for messages.
        start: the weights that the stage begins with, by name.
        settings: whatever else decides its result.
        needed: bytes that it will keep.
        content: what these bytes are, for messages.

    Raises:
        OutputError: another run is at the same stage of the same merge; there is no room for it, naming the folder and
            what is needed.
    """
    home = Path(constants.HF_HOME) / "hf-epimer" / stage
    workspace = home / _name(plan, start, settings)
    workspace.mkdir(parents=True, exist_ok=True)
    processes = launched()
    lock = workspace / f"{processes.rank}{_LOCK}"
    lock.touch()
    try:
        with locked(lock):
            processes.gather(None)  # none removes what another of this run is about to lock
            _make_room([path for path in home.iterdir() if path != workspace], ROOM - needed)
            free, held = shutil.disk_usage(workspace).free, _size(workspace)
            logger.info("%s keeps %.1f GB of %s in %s until it is done", stage, needed / 1e9, content, workspace)
            if needed - held > free:
                raise OutputError(
                    f"{stage} needs {needed / 1e9:.1f} GB for {content} in {workspace}, and {free / 1e9:.1f} GB are "
                    "free: make room, set HF_HOME to another disk, or take fewer --samples"
                )
            yield workspace
    except Busy as error:
        raise OutputError(f"another run is at the {stage} of this very merge, in {workspace}: wait for it") from error


_LOCK = ".lock"


def _name(plan: Plan, start: Mapping[str, Tensor], settings: Sequence[object]) -> str:
    digest = hashlib.sha256()
    for name, weights in start.items():
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    where = [*settings, plan.recipe.device, torch.get_num_threads()]
    sources = [(model.label, model.weight, model.source.identity, str(model.images)) for model in plan.models]
    revisions = [model.images.revision for model in plan.models if model.images]
    digest.update(repr((where, sources, revisions)).encode())
    return digest.hexdigest()[:24]


def _make_room(others: Sequence[Path], room: int) -> None:
    """Remove what killed runs have left: what is old, then the oldest until it fits into `room` bytes.

    An empty one takes no room, and another run may be about to lock it.
    """
    newest_first = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        size = _size(path)
        room -= size
        if (size and room < 0) or time.time() - path.stat().st_mtime > KEPT:
            with suppress(Busy), ExitStack() as locks:
                for lock in path.glob(f"*{_LOCK}"):
                    locks.enter_context(locked(lock))
                shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
