"""What a whole merge did: `MergeReport`, as JSON and in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_epimer.checkpoints.writer import strict_json
from hf_epimer.merging.report import LayerReport


@dataclass(frozen=True)
class RefinementReport:
    """What training a merge has brought.

    Attributes:
        steps: of the training.
        best_step: the one whose weights were taken; 0 for those at the start.
        images: of each task that it was trained on, none of them with its label.
        before, after: d_t of each task on images that it was not trained on (`refinement.objective`).
        seconds: of the process that ended it.
    """

    steps: int
    best_step: int
    images: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; `merge_report.json` is its JSON.

    Attributes:
        out: the merged folder.
        url: the commit or pull request, None when nothing was pushed.
        totals: eta, layers, capped layers, solver steps, norms.
        layers: one entry per parameter.
        seconds: per stage and in all.
        memory: peak bytes of the process (resident, and anonymous where the system tells).
        results: accuracies, None unless evaluated.
    """

    out: Path
    url: str | None
    method: str
    totals: dict[str, Any]
    layers: tuple[LayerReport, ...]
    seconds: dict[str, float]
    memory: dict[str, int]
    results: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything but where it went."""
        content = {
            "method": self.method,
            "totals": self.totals,
            "seconds": self.seconds,
            "memory": self.memory,
            "results": self.results,
            "layers": [layer.to_json() for layer in self.layers],
        }
        strict: dict[str, Any] = strict_json(content)
        return strict

    def in_words(self) -> dict[str, str]:
        """The totals for people: what it is -> its value. The card and the terminal show them."""
        totals = self.totals
        words = {
            "parameters": f"{totals['parameters']:,}",
            "norm of the merged task vector": f"{totals['merged_norm']:.4g}",
        }
        if "made_from" in totals:
            words["made from"] = totals["made_from"]
        if totals["capped"]:
            words["layers with capped rank"] = str(len(totals["capped"]))
        if "eta" in totals:
            words["curvature heterogeneity eta"] = f"{totals['eta']:.4g}"
        if "steps" in totals:
            words["solver steps, all layers"] = str(totals["steps"])
        if "alpha" in totals:
            when = "before calibration, " if "calibrated" in totals else ""
            words["alpha"] = f"{totals['alpha']:g}: {when}where predictions are nearest to those of the models merged"
        if "calibrated" in totals:
            words["calibrated layers"] = str(totals["calibrated"])
            typical, largest = totals["typical_calibration"], totals["largest_calibration"]
            words["change of a layer by calibration"] = (
                f"{typical:.1%} of its weight (median), at most {largest:.1%} ({totals['most_calibrated']})"
            )
        if "refinement" in totals:
            refinement = totals["refinement"]
            words["refined"] = f"trained for {refinement['best_step']} steps, in {refinement['seconds']:.0f} s"
            words["distance to the features of each model"] = ", ".join(
                f"{label} {before:.3g} -> {refinement['after'][label]:.3g}"
                for label, before in refinement["before"].items()
            )
        if "largest_rank" in totals:
            words["largest rank of a merged layer"] = str(totals["largest_rank"])
            words["largest part of a layer's norm cut off"] = f"{totals['largest_cut_off']:.2%}"
        if "note" in totals:
            words["unique"] = totals["note"]
        return words | {"seconds": f"{self.seconds['merging']:.1f}"}
