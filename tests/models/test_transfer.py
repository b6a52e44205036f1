"""What fits onto a device."""

from __future__ import annotations

import pytest
import torch

from hf_epimer.models.transfer import SHARE, has_room


def test_hidden_states_take_a_share_of_what_a_gpu_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 4000))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert has_room(gpu, int(1000 * SHARE)) and not has_room(gpu, int(1000 * SHARE) + 1)
    assert not has_room(cpu, 1)
