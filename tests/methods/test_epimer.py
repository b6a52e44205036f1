"""EpiMer: equations 13 and 14, its limits and its other metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import reference
from helpers.checkpoints import StateDict, tiny_fisher
from helpers.merges import MATRIX, VECTOR, distance, merged, models
from helpers.statistics import statistics
from hf_epimer import EpiMerConfig, merge_state_dicts
from hf_epimer.errors import StatisticsError, UsageError
from hf_epimer.methods import METHODS
from hf_epimer.methods.fisher_averaging import FisherConfig
from hf_epimer.methods.statistic import FISHER_DIAGONAL, PROJECTED_FISHER
from hf_epimer.methods.tsv import TSVMConfig
from hf_epimer.numerics.subspace import tagged_basis


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("aggregator", ["sum", "mean"])
@pytest.mark.parametrize("coordinates", ["projected", "tagged"])
@pytest.mark.parametrize("normalize", ["none", "trace"])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 10.0])
def test_epimer_solves_equations_13_and_14(
    base_state: StateDict, exact: bool, aggregator: str, coordinates: str, normalize: str, damping: float
) -> None:
    if exact:  # or the rounding of the stored result would be all that is measured
        base_state = {name: value.double() for name, value in base_state.items()}
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    options: dict[str, Any] = {
        "rank": 6, "alpha": 0.7, "aggregator": aggregator, "coordinates": coordinates,
        "normalize": normalize, "damping": damping,
    }  # fmt: skip
    weights = [0.5, 0.2, 0.3]
    expected, _ = reference.epimer(
        base_state[MATRIX], [m[MATRIX] for m in tuned], [f[MATRIX] for f in measured], weights=weights, **options
    )
    config = EpiMerConfig(**options)
    found = merged("epimer", base_state, tuned, config=config, weights=weights, exact=exact, statistics=measured)
    assert reference.relative_error(found[MATRIX], expected, base_state[MATRIX]) < (1e-6 if exact else 1e-3)
    mean = sum(w * (m[VECTOR] - base_state[VECTOR]) for w, m in zip(weights, tuned, strict=True))
    assert torch.allclose(found[VECTOR], base_state[VECTOR] + 0.7 * mean, atol=1e-6)


def test_epimer_caps_the_rank_where_orthonormal_columns_end(base_state: StateDict) -> None:
    name = "vision_model.embeddings.position_embedding.weight"  # 5 x 32: with three tasks, one direction each
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    expected, _ = reference.epimer(base_state[name], [m[name] for m in tuned], [f[name] for f in measured], rank=32)
    config = EpiMerConfig(preset="paper")
    found = merged("epimer", base_state, tuned, statistics=measured, config=config)
    assert reference.relative_error(found[name], expected, base_state[name]) < 1e-3


def test_equal_metrics_give_alpha_times_the_sum(base_state: StateDict) -> None:
    """The homogeneous limit of eq 14: with tagged coordinates it is TSV-M."""
    tuned, one = models(base_state), tiny_fisher(5)
    config = EpiMerConfig(rank=8, coordinates="tagged", damping=0.0)
    found = merged("epimer", base_state, tuned, statistics=[one] * 3, config=config)
    expected = merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=8))
    assert distance(expected, found, base_state) < 1e-4


def test_huge_damping_is_tsv_m(base_state: StateDict) -> None:
    tuned = models(base_state)
    measured = [tiny_fisher(t) for t in range(3)]
    equal_means = [{n: v / v.mean() for n, v in f.items()} for f in measured]
    expected = merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=8))
    for normalize, fisher in (("none", equal_means), ("trace", measured)):
        config = EpiMerConfig(rank=8, damping=1e6, normalize=normalize)  # type: ignore[arg-type]
        found = merged("epimer", base_state, tuned, statistics=fisher, config=config)
        assert distance(expected, found, base_state) < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e12])
def test_a_common_scale_of_all_metrics_cancels(base_state: StateDict, scale: float) -> None:
    tuned, measured = models(base_state), [tiny_fisher(t) for t in range(3)]
    scaled = [{n: (v.double() * scale).float() for n, v in f.items()} for f in measured]
    one = merged("epimer", base_state, tuned, statistics=measured)
    two = merged("epimer", base_state, tuned, statistics=scaled)
    assert distance(one, two, base_state) < 1e-3


def test_one_task_alone_keeps_its_leading_directions(base_state: StateDict) -> None:
    tuned = models(base_state, 1)
    found = merged("epimer", base_state, tuned, config=EpiMerConfig(rank=4))
    u, s, vh = torch.linalg.svd(tuned[0][MATRIX] - base_state[MATRIX], full_matrices=False)
    expected = base_state[MATRIX] + (u[:, :4] * s[:4]) @ vh[:4]
    assert reference.relative_error(found[MATRIX], expected, base_state[MATRIX]) < 1e-3


def test_a_layer_that_a_task_left_alone_brings_no_directions(base_state: StateDict) -> None:
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    tuned[1][MATRIX] = base_state[MATRIX].clone()
    found = merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=5))
    expected = reference.tsv_m(base_state[MATRIX], [tuned[0][MATRIX], tuned[2][MATRIX]], rank=5)
    assert reference.relative_error(found[MATRIX], expected, base_state[MATRIX]) < 1e-3
    assert bool(merged("epimer", base_state, tuned, statistics=measured)[MATRIX].isfinite().all())


def test_no_curvature_at_all_is_the_flat_metric(base_state: StateDict) -> None:
    tuned = models(base_state)
    nothing = [{n: torch.zeros_like(v) for n, v in base_state.items()} for _ in tuned]
    found = merged("epimer", base_state, tuned, statistics=nothing, config=EpiMerConfig(rank=8, coordinates="tagged"))
    assert distance(merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=8)), found, base_state) < 1e-4


def test_epimers_projected_metric_is_the_diagonal_one_when_that_is_what_is_projected(base_state: StateDict) -> None:
    tuned, measured = models(base_state), statistics("epimer", 3)
    assert measured is not None
    deltas = torch.stack([model[MATRIX] - base_state[MATRIX] for model in tuned])
    basis = tagged_basis(deltas.double(), 5, exact=True)
    assert basis is not None
    s = reference.subspace_matrix(basis.u, basis.v)
    projected = []
    for fisher in measured:
        h = s.mT @ (fisher[MATRIX].double().flatten()[:, None] * s)
        projected.append({MATRIX: h, f"{MATRIX}.shrinkage": torch.zeros(1)})
    only = {MATRIX: base_state[MATRIX]}
    own = [{MATRIX: model[MATRIX]} for model in tuned]
    options: dict[str, Any] = {"rank": 5, "damping": 0.0, "coordinates": "projected"}
    config = EpiMerConfig(metric="projected", **options)
    found = merge_state_dicts(only, own, config=config, statistics=projected, bases={MATRIX: basis}, exact=True)
    diagonal = merge_state_dicts(
        only, own, config=EpiMerConfig(**options), statistics=[{MATRIX: f[MATRIX]} for f in measured], exact=True
    )
    assert distance(diagonal, found, only) < 1e-5
    # a share of 1 leaves the traces only, whatever was estimated
    flat = EpiMerConfig(metric="projected", shrinkage=1.0, normalize="trace", **options)
    found = merge_state_dicts(only, own, config=flat, statistics=projected, bases={MATRIX: basis}, exact=True)
    c = torch.stack([basis.project(delta.double()) for delta in deltas])
    assert torch.allclose(found[MATRIX].double() - only[MATRIX], basis.expand(c.sum(0)), atol=1e-5)
    for entry in projected:  # Ledoit and Wolf's share is used where none is given
        entry[f"{MATRIX}.shrinkage"] = torch.ones(1)
    config = EpiMerConfig(metric="projected", normalize="trace", **options)
    again = merge_state_dicts(only, own, config=config, statistics=projected, bases={MATRIX: basis}, exact=True)
    assert torch.allclose(again[MATRIX], found[MATRIX], atol=1e-6)


def test_epimers_kronecker_metric_of_a_rank_one_fisher_is_the_diagonal_one(base_state: StateDict) -> None:
    tuned = [{MATRIX: model[MATRIX]} for model in models(base_state)]
    only = {MATRIX: base_state[MATRIX]}
    generator = torch.Generator().manual_seed(0)
    m, n = only[MATRIX].shape
    rows, columns = torch.rand(3, m, generator=generator), torch.rand(3, n, generator=generator)
    diagonals = [{MATRIX: torch.outer(r, c)} for r, c in zip(rows, columns, strict=True)]
    factors = [
        {f"{MATRIX}.input_factor": torch.diag(c), f"{MATRIX}.output_factor": torch.diag(r)}
        for r, c in zip(rows, columns, strict=True)
    ]
    options = {"rank": 5, "damping": 0.0}
    one = merge_state_dicts(only, tuned, config=EpiMerConfig(**options), statistics=diagonals)
    two = merge_state_dicts(only, tuned, config=EpiMerConfig(metric="kronecker", **options), statistics=factors)
    assert distance(one, two, only) < 1e-3
    with pytest.raises(StatisticsError, match="there are no statistics for this parameter"):
        merge_state_dicts(only, tuned, config=EpiMerConfig(metric="kronecker"), statistics=[{}, {}, {}])


@pytest.mark.parametrize("normalize", ["none", "trace"])
def test_vectors_by_their_fisher_are_the_fisher_average_on_the_same_scale(
    base_state: StateDict, normalize: Any
) -> None:
    tuned, measured = models(base_state), statistics("epimer", 3)
    config = EpiMerConfig(vectors="fisher", normalize=normalize, damping=0.01)
    ours = merged("epimer", base_state, tuned, config=config, statistics=measured)
    fisher = merged("fisher", base_state, tuned, config=FisherConfig(normalize, 0.01), statistics=measured)
    assert torch.equal(ours[VECTOR], fisher[VECTOR])


def test_options_that_belong_to_another_metric_are_refused() -> None:
    with pytest.raises(UsageError, match="--vectors fisher needs the Fisher diagonal"):
        EpiMerConfig(metric="kronecker", vectors="fisher")
    with pytest.raises(UsageError, match="--shrinkage is of the projected metric"):
        EpiMerConfig(shrinkage=0.5)
    assert METHODS["epimer"].statistic(EpiMerConfig(metric="projected")) is PROJECTED_FISHER
    assert METHODS["epimer"].statistic(EpiMerConfig()) is METHODS["epimer"].needs is FISHER_DIAGONAL


def test_the_papers_settings_are_one_option_away() -> None:
    paper = EpiMerConfig(preset="paper")
    assert (paper.rank, paper.coordinates, paper.normalize) == (32, "projected", "none")
    assert (paper.alpha, paper.aggregator, paper.metric, paper.damping) == (1.0, "sum", "diagonal", 1e-6)
    assert EpiMerConfig(preset="paper", rank=8).rank == 8
    assert replace(paper, alpha=0.5) == EpiMerConfig(preset="paper", alpha=0.5)
    assert EpiMerConfig(**vars(paper)) == paper  # as a recipe repeats it
