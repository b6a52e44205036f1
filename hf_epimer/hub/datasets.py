"""What pins a data set on the Hub, and how large it is."""

from __future__ import annotations

import huggingface_hub
from huggingface_hub import constants

from hf_epimer.errors import HubError
from hf_epimer.hub.notes import cached_commit, read_note, write_note
from hf_epimer.hub.retry import persist


def dataset_commit(repo_id: str) -> str:
    """The commit that a data set's main branch is at; the last one seen when HF_HUB_OFFLINE is set.

    Raises:
        NotFoundError, AccessError, HubError: as in `resolve`.
    """
    where = f"data set {repo_id}"
    if constants.HF_HUB_OFFLINE:
        note = read_note("dataset", repo_id, None) or {}
        commit = note.get("commit") or cached_commit("dataset", repo_id, None)
        if commit is None:
            raise HubError(f"{where}: not in the local cache, and HF_HUB_OFFLINE is set")
        return str(commit)
    commit = persist(lambda: huggingface_hub.HfApi().dataset_info(repo_id), where, "its commit").sha
    write_note("dataset", repo_id, None, {"commit": commit})
    return str(commit)


def dataset_bytes(repo_id: str) -> int:
    """Bytes of all files of a data set; 0 when HF_HUB_OFFLINE is set, where nothing can be fetched anyway.

    Raises:
        NotFoundError, AccessError, HubError: as in `resolve`.
    """
    if constants.HF_HUB_OFFLINE:
        return 0
    info = persist(
        lambda: huggingface_hub.HfApi().dataset_info(repo_id, files_metadata=True),
        f"data set {repo_id}",
        "its list of files",
    )
    return sum(sibling.size or 0 for sibling in info.siblings or [])
