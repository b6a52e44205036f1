"""How long the parts of a merge that last will take, said before they begin."""

from __future__ import annotations

import math
import time

import torch

from hf_epimer.methods.statistic import POSITIONS
from hf_epimer.numerics.product import product
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.refinement.muon import ITERATIONS
from hf_epimer.pipeline.refinement.training import PICTURES, VIEWS
from hf_epimer.types import Shape

PASSES = 4.5
"""Of a calibration: forward passes that cost as much, as counted in `hf_epimer.pipeline.calibration.step`."""

PASSES_OF_STATISTICS = 4.5
"""Of the statistics that it needs: forward and backward (3), and the Gram matrices of the inputs."""

PASSES_OF_TRAINING = 3.0
"""Of a picture in a step of a refinement: forward and backward."""

REACHED = 0.55
"""Share of a large product's speed that was reached on the whole (the real weights of docs/results.md, two cores)."""


def expected(plan: Plan) -> dict[str, float]:
    """Seconds of the parts of a merge that last, on its device: those that there are of calibration and refinement."""
    operations = {}
    if plan.recipe.calibrate:
        operations["calibration"] = calibration_operations(plan)
    if plan.recipe.refine:
        operations["refinement"] = refinement_operations(plan)
    return {part: expected_seconds(each, plan.recipe.device) for part, each in operations.items()}


def calibration_operations(plan: Plan) -> float:
    """Floating-point operations of a plan's calibration, with the statistics that are still to be measured for it."""
    measured = sum(request.images.sampling.samples or 0 for kind, request in plan.to_estimate if kind is POSITIONS)
    return _a_pass(plan) * (PASSES * _images(plan) * plan.recipe.views + PASSES_OF_STATISTICS * measured)


def refinement_operations(plan: Plan) -> float:
    """Floating-point operations of a plan's refinement."""
    steps = plan.recipe.refine_steps
    passes = PASSES_OF_TRAINING * steps * PICTURES * len(plan.models) + VIEWS * _images(plan)
    sides = [sorted(shape) for shape in _matrices(plan)]
    of_muon = ITERATIONS * sum(4.0 * short**2 * long + 2.0 * short**3 for short, long in sides)
    return _a_pass(plan) * passes + steps * of_muon


def expected_seconds(operations: float, device: str, size: int = 1024) -> float:
    """Seconds on a device, from the time of one product of two `size` x `size` matrices."""
    x = torch.ones(size, size, device=device)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        float(product(x, x.mT)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return operations / (REACHED * 2 * size**3 / best)


def leaves_gpu_idle(plan: Plan) -> bool:
    """Whether there is a GPU, and a plan does without."""
    return plan.recipe.device == "cpu" and torch.cuda.is_available()


def in_words(seconds: float) -> str:
    """About how long, without a precision that it has not."""
    if seconds < 90:
        return "about a minute" if seconds > 30 else "less than a minute"
    minutes = seconds / 60
    return f"about {minutes:.0f} minutes" if minutes < 90 else f"about {minutes / 60:.1f} hours"


def _a_pass(plan: Plan) -> float:
    """Floating-point operations of one image's forward pass."""
    return 2.0 * sum(map(math.prod, _matrices(plan))) * plan.architecture.positions(plan.base.vision_config)


def _matrices(plan: Plan) -> list[Shape]:
    """The shapes of those of the blocks."""
    return [shape for name, shape in plan.shapes.items() if plan.architecture.blocks in name and len(shape) == 2]


def _images(plan: Plan) -> int:
    return sum(model.images.sampling.samples or 0 for model in plan.models if model.images)
