"""A layer whose outputs are scaled is calibrated as the one that both are: folding the scale in changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers.families import FAMILIES, SIDE
from hf_epimer.checkpoints.reader import StateDict
from hf_epimer.models.dinov2 import DINOV2
from hf_epimer.models.weights import blocks_of, parameters_of
from hf_epimer.pipeline.calibration.passage import CalibrationTask
from hf_epimer.pipeline.calibration.step import calibrate
from hf_epimer.tasks.images import Batch

POSITIONS = 5


def tower(seed: int) -> Any:
    """A DINOv2 with scales of both signs."""
    torch.manual_seed(seed)
    model = FAMILIES["dinov2"].make(id2label={})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def folded(model: Any) -> Any:
    """Its scales multiplied into the layers before them, and 1 where they were."""
    for block in blocks_of(model, DINOV2):
        for residual in block.residuals(DINOV2):
            scale = block.parameters[f"{block.name}.{residual.scale}"]
            layer: Any = block.layers[residual.writes]
            layer.weight *= scale[:, None]
            layer.bias *= scale
            scale.fill_(1.0)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters_of(model, DINOV2).items()}


def test_a_scaled_layer_is_solved_as_one_with_its_scale(tmp_path: Path) -> None:
    pixels = torch.randn(20, 3, SIDE, SIDE)
    found = []
    for name, seen_as in (("scaled", lambda model: model), ("folded", folded)):
        base, tuned, merged = (seen_as(tower(seed)) for seed in (0, 1, 2))
        heard = {f"{key}.positions": torch.ones(POSITIONS) for key, value in state(tuned).items() if value.ndim == 2}
        batches = [Batch(pixels, torch.zeros(20), range(20))]
        task = CalibrationTask(StateDict("tuned", state(tuned)), 1.0, StateDict("heard", heard), batches)
        calibrate(merged, StateDict("base", state(base)), [task], DINOV2, tmp_path / name)
        found.append(state(folded(merged)))
    before = state(folded(tower(2)))
    scaled, whole = found
    for name, value in whole.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(value, before[name], atol=1e-2) for name, value in whole.items())
