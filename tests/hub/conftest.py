"""A Hub with a base and two fine-tuned checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import utils

from helpers.checkpoints import StateDict, tiny_fisher, tiny_state, write_checkpoint
from helpers.hub_server import READER, STRANGER, StandInHub
from hf_epimer.hub import retry

# releases of huggingface_hub before 1.0 have another HTTP library, with no sessions to close and no time-outs to set
collect_ignore = [] if hasattr(utils, "close_session") else ["test_fault_campaign.py", "test_trouble.py"]


@pytest.fixture
def hub(empty_hub: StandInHub, tmp_path: Path, base_state: StateDict) -> StandInHub:
    """A Hub with org/base, org/vit-b32-dtd and org/vit-b32-svhn."""
    empty_hub.add_user(READER, "ann", role="read", orgs=["org"])
    empty_hub.add_user(STRANGER, "bob")
    empty_hub.add_repo("org/base", write_checkpoint(tmp_path / "src" / "base", base_state))
    for seed, task in enumerate(("dtd", "svhn"), start=1):
        card = "---\nbase_model: org/base\n---\n"
        folder = write_checkpoint(
            tmp_path / "src" / task, tiny_state(seed, base_state), fisher=tiny_fisher(seed), card=card
        )
        empty_hub.add_repo(f"org/vit-b32-{task}", folder)
    return empty_hub


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits between tries, huggingface_hub too, waits no time."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    clock = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
    for module in (file_download, _http, retry):
        monkeypatch.setattr(module, "time", clock)
