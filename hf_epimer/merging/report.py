"""What a merge did: one `LayerReport` for each parameter, and their totals. `merge_report.json` is made of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hf_epimer.methods.report import RankReport, SolveReport
from hf_epimer.types import Shape


@dataclass(frozen=True)
class AdapterReport:
    """One layer of a merged adapter.

    Attributes:
        ranks: of the adapters that were merged.
        out_rank: of the result.
        cut_off: the share of the layer's norm beyond that rank, in [0, 1].
    """

    ranks: tuple[int, ...]
    out_rank: int
    cut_off: float


@dataclass(frozen=True)
class CalibrationReport:
    """One layer that was solved again.

    Attributes:
        calibration_size: norm of the change, relative to that of the weight.
    """

    calibration_size: float


@dataclass(frozen=True)
class LayerReport:
    """One merged parameter; sections that do not apply to it are None.

    Attributes:
        merged_norm: ||W - W_0||.
        task_vector_norms: ||D_t||; None where the task vectors were never formed.
        base_norm: ||W_0||, of the same layers; it is not in the JSON.
    """

    name: str
    shape: Shape
    merged_norm: float
    task_vector_norms: tuple[float, ...] | None = None
    base_norm: float | None = None
    adapter: AdapterReport | None = None
    rank: RankReport | None = None
    solve: SolveReport | None = None
    calibration: CalibrationReport | None = None

    def to_json(self) -> dict[str, Any]:
        """All sections side by side, without what is None."""
        fields: dict[str, Any] = {"name": self.name, "shape": self.shape}
        for section in (self.adapter, self.rank, self.solve):
            fields |= vars(section) if section else {}
        fields |= {"merged_norm": self.merged_norm, "task_vector_norms": self.task_vector_norms}
        fields |= vars(self.calibration) if self.calibration else {}
        return {name: value for name, value in fields.items() if value is not None}


def joined(parts: Sequence[LayerReport], shape: Shape) -> LayerReport:
    """The report of one parameter that was merged in pieces, entry by entry: its norms are all there is to say."""
    norms = [part.task_vector_norms or () for part in parts]
    return LayerReport(
        parts[0].name,
        shape,
        merged_norm=math.hypot(*(part.merged_norm for part in parts)),
        task_vector_norms=tuple(math.hypot(*of_task) for of_task in zip(*norms, strict=True)),
        base_norm=math.hypot(*(part.base_norm or 0.0 for part in parts)),
    )


def totals_of(layers: Sequence[LayerReport]) -> dict[str, Any]:
    """Sums and extremes over all layers; a total that has no meaning for this merge is left out."""
    totals: dict[str, Any] = {
        "parameters": sum(math.prod(layer.shape) for layer in layers),
        "layers": len(layers),
        "capped": [layer.name for layer in layers if layer.rank and layer.rank.capped],
        "merged_norm": math.sqrt(math.fsum(layer.merged_norm**2 for layer in layers)),
    }
    solves = [layer.solve for layer in layers if layer.solve]
    etas = [solve.eta for solve in solves if solve.eta is not None]
    if etas:
        totals["eta"] = math.fsum(etas)
    steps = [solve.steps for solve in solves if solve.steps is not None]
    if steps:
        totals["steps"] = sum(steps)
        totals["worst_condition"] = max(solve.condition or 1.0 for solve in solves if solve.steps is not None)
    calibrations = {layer.name: layer.calibration.calibration_size for layer in layers if layer.calibration}
    if calibrations:
        totals["calibrated"] = len(calibrations)
        totals["typical_calibration"] = median(calibrations.values())
        totals["largest_calibration"] = max(calibrations.values())
        totals["most_calibrated"] = max(calibrations, key=lambda name: calibrations[name])
    factored = [layer.adapter for layer in layers if layer.adapter]
    if factored:
        totals["largest_rank"] = max(layer.out_rank for layer in factored)
        totals["largest_cut_off"] = max(layer.cut_off for layer in factored)
    if note := _far_apart(layers):
        totals["note"] = note
    return totals


def further_than_their_base(layers: Sequence[LayerReport]) -> list[int]:
    """Which models differ from the base by more than its own norm, over all layers: it is hardly theirs."""
    known = [(layer.task_vector_norms, layer.base_norm) for layer in layers if layer.task_vector_norms]
    if not known:
        return []
    base = math.fsum((norm or 0.0) ** 2 for _, norm in known)
    squares = _sums([[norm**2 for norm in norms] for norms, _ in known])
    return [number for number, square in enumerate(squares) if square >= base > 0]


def spiked_shares(layers: Sequence[LayerReport]) -> list[float]:
    """How much of every model's task vector stands out among the others, as a share of its square."""
    spiked = [
        [share * norm**2 for share, norm in zip(layer.rank.spikes, layer.task_vector_norms)]
        for layer in layers
        if layer.rank and layer.rank.spikes and layer.task_vector_norms
    ]
    squares = [[norm**2 for norm in layer.task_vector_norms] for layer in layers if layer.task_vector_norms]
    return [_ratio(part, whole) for part, whole in zip(_sums(spiked), _sums(squares))]


def curvature_shares(layers: Sequence[LayerReport]) -> list[float]:
    """Every model's share of the summed curvature, where it was left at its own size; else nothing."""
    sums = _sums([layer.solve.curvature for layer in layers if layer.solve and layer.solve.curvature])
    return [_ratio(own, math.fsum(sums)) for own in sums]


def _sums(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) for column in zip(*rows)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _far_apart(layers: Sequence[LayerReport]) -> str | None:
    """One line for all layers in which adapters are too far apart for a unique mean, and what was done there."""
    far = [layer.solve for layer in layers if layer.solve and layer.solve.unique is False]
    if not far:
        return None
    angle = max(solve.angle or 0.0 for solve in far) * 180 / math.pi
    unsettled = sum("limit of steps" in (solve.note or "") for solve in far)
    ends = f"; in {unsettled} of them the iteration stopped at its limit of steps" if unsettled else ""
    return (
        f"in {len(far)} of {len(layers)} layers the adapters are too far apart for a unique mean (principal angles up "
        f"to {angle:.0f} degrees, 45 is safe): the local mean that the chordal one leads to was taken{ends}; "
        "--lora-mean chordal has no such limit"
    )
