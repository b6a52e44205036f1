"""merge_report.json: one flat object per layer, with the fields that it has had since the first release."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.checkpoints import StateDict, tiny_state
from helpers.statistics import statistics
from hf_epimer.checkpoints.reader import StateDict as InMemory
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.report import (
    AdapterReport,
    CalibrationReport,
    LayerReport,
    curvature_shares,
    further_than_their_base,
    spiked_shares,
    totals_of,
)
from hf_epimer.merging.stream import merge_layers
from hf_epimer.methods import METHODS
from hf_epimer.methods.report import RankReport, SolveReport

MATRIX = "vision_model.encoder.layers.0.mlp.fc1.weight"
START, END = ["name", "shape"], ["merged_norm", "task_vector_norms"]
DIRECTIONS, SOLVE = ["rank", "capped", "atoms", "spikes"], ["steps", "residual", "condition"]


@pytest.mark.parametrize(
    ("method", "between"),
    [
        ("mean", []),
        ("tsv-m", DIRECTIONS),
        ("iso-cts", ["common", "specific"]),
        ("epimer", [*DIRECTIONS, "eta", *SOLVE]),
        ("epimer-core", ["spikes"]),
        ("kronecker-core", [*DIRECTIONS, *SOLVE]),
    ],
)
def test_fields_of_a_layer(method: str, between: list[str], base_state: StateDict) -> None:
    layers = {report.name: report.to_json() for report in _reports(method, base_state)}
    assert list(layers[MATRIX]) == [*START, *between, *END]
    assert list(layers[MATRIX.replace("weight", "bias")]) == [*START, *END]
    json.dumps(layers, allow_nan=False)


def test_fields_of_adapters_and_calibration() -> None:
    solve = SolveReport(steps=3, residual=0.1, angle=0.9, unique=False, note="far apart")
    adapter = LayerReport(
        "a", (4, 2), 1.0, adapter=AdapterReport((1, 2), 3, 0.25), rank=RankReport(2, False, 4), solve=solve
    )
    assert adapter.to_json() == {
        "name": "a", "shape": (4, 2), "ranks": (1, 2), "out_rank": 3, "cut_off": 0.25, "rank": 2, "capped": False,
        "atoms": 4, "steps": 3, "residual": 0.1, "angle": 0.9, "unique": False, "note": "far apart", "merged_norm": 1.0,
    }  # fmt: skip
    calibrated = LayerReport("b", (4,), 2.0, (1.0, 2.0), calibration=CalibrationReport(0.5))
    fields = ["calibration_size"]
    assert list(calibrated.to_json()) == [*START, *END, *fields]


def test_totals_are_those_of_what_was_done(base_state: StateDict) -> None:
    always = ["parameters", "layers", "capped", "merged_norm"]
    assert list(totals_of(_reports("mean", base_state))) == always
    layers = _reports("epimer", base_state)
    totals = totals_of(layers)
    assert list(totals) == [*always, "eta", "steps", "worst_condition"]
    assert totals["parameters"] == sum(value.numel() for value in base_state.values())
    assert totals["steps"] == sum(layer.solve.steps for layer in layers if layer.solve)
    adapter = LayerReport("a", (4, 2), 3.0, adapter=AdapterReport((1, 2), 3, 0.25))
    other = LayerReport("b", (4, 2), 4.0, adapter=AdapterReport((1, 2), 2, 0.5), calibration=CalibrationReport(0.5))
    totals = totals_of([adapter, other])
    assert (totals["largest_rank"], totals["largest_cut_off"], totals["merged_norm"]) == (3, 0.5, 5.0)
    assert (totals["calibrated"], totals["typical_calibration"], totals["largest_calibration"]) == (1, 0.5, 0.5)
    assert totals["most_calibrated"] == "b"


def _reports(method: str, base: StateDict) -> list[LayerReport]:
    tuned = [InMemory(f"{index}", tiny_state(index + 1, base)) for index in range(2)]
    chosen = METHODS[method]
    given: Any = statistics(method, 2)
    measured = [InMemory(f"{index}", tensors) for index, tensors in enumerate(given)] if given else None
    ingredients = Ingredients(InMemory("base", base), tuned, [0.5, 0.5], measured)
    return [layer.report for layer in merge_layers(ingredients, chosen, chosen.config())]


def test_a_model_further_from_the_base_than_zero_is_named() -> None:
    layers = [
        LayerReport("a", (2,), 1.0, (0.1, 3.0), base_norm=2.0),
        LayerReport("b", (2,), 1.0, (0.1, 0.0), base_norm=1.0),
    ]
    assert further_than_their_base(layers) == [1]
    assert further_than_their_base([LayerReport("a", (2,), 1.0)]) == []


def test_shares_are_of_all_layers_together() -> None:
    layers = [
        LayerReport(
            "a", (2, 2), 1.0, (2.0, 1.0), rank=RankReport(spikes=(0.5, 0.0)), solve=SolveReport(curvature=(1.0, 2.0))
        ),
        LayerReport(
            "b", (2, 2), 1.0, (2.0, 3.0), rank=RankReport(spikes=(0.0, 0.1)), solve=SolveReport(curvature=(0.0, 7.0))
        ),
        LayerReport("c", (2,), 1.0, (4.0, 0.0)),
    ]
    assert spiked_shares(layers) == pytest.approx([2 / 24, 0.9 / 10])
    assert curvature_shares(layers) == pytest.approx([0.1, 0.9])
    bare = [LayerReport("c", (2,), 1.0, (4.0, 0.0))]
    assert (spiked_shares(bare), curvature_shares(bare)) == ([], [])
