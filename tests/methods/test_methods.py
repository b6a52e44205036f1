"""Every method of the METHODS table under the same invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.checkpoints import StateDict, tiny_fisher
from helpers.merges import MATRIX, distance, merged, models
from helpers.statistics import statistics
from hf_epimer import EpiMerConfig, merge_state_dicts
from hf_epimer.errors import MismatchError, StatisticsError, UsageError
from hf_epimer.methods import METHODS
from hf_epimer.methods.statistic import FISHER_DIAGONAL
from hf_epimer.methods.ties import TIESConfig
from hf_epimer.methods.tsv import TSVMConfig

ALL = list(METHODS)


@pytest.mark.parametrize("method", ALL)
def test_shape_dtype_and_finiteness(method: str, base_state: StateDict) -> None:
    half = {name: value.half() for name, value in base_state.items()}
    mixed = [{n: v.to(dtype) for n, v in m.items()} for m, dtype in zip(models(base_state), _DTYPES, strict=True)]
    result = merged(method, half, mixed)
    assert result.keys() == half.keys()
    assert all(result[n].shape == half[n].shape and result[n].dtype == torch.float16 for n in half)
    assert all(bool(v.isfinite().all()) for v in result.values())


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("method", ALL)
def test_base_merged_with_itself_is_the_base_exactly(method: str, base_state: StateDict) -> None:
    result = merged(method, base_state, [dict(base_state) for _ in range(3)])
    assert all(torch.equal(result[n], base_state[n]) for n in base_state)


@pytest.mark.parametrize("method", ALL)
def test_order_of_tasks_does_not_matter(method: str, base_state: StateDict) -> None:
    tuned, labels = models(base_state), ["a", "b", "c"]
    measured = statistics(method, 3)
    first = merged(method, base_state, tuned, labels=labels, statistics=measured)
    order = [2, 0, 1]
    second = merged(
        method,
        base_state,
        [tuned[i] for i in order],
        labels=[labels[i] for i in order],
        statistics=measured and [measured[i] for i in order],
    )
    assert distance(first, second, base_state) < 1e-4


@pytest.mark.parametrize("method", ALL)
def test_same_seed_same_bits(method: str, base_state: StateDict) -> None:
    first, second = (merged(method, base_state, models(base_state), seed=7) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("method", ALL)
def test_weights_are_normalised_and_matter(method: str, base_state: StateDict) -> None:
    tuned = models(base_state)
    equal, scaled = (merged(method, base_state, tuned, weights=w) for w in (None, [4.0, 4.0, 4.0]))
    assert distance(equal, scaled, base_state) < 1e-5
    assert distance(equal, merged(method, base_state, tuned, weights=[4.0, 1.0, 1.0]), base_state) > 1e-3


@pytest.mark.parametrize("method", ALL)
def test_alpha_scales_the_whole_merged_task_vector(method: str, base_state: StateDict) -> None:
    if not hasattr(METHODS[method].config(), "alpha"):
        return
    default = METHODS[method].config()
    doubled = METHODS[method].config(alpha=2 * default.alpha)
    one = merged(method, base_state, models(base_state), config=default)
    two = merged(method, base_state, models(base_state), config=doubled)
    for name in base_state:
        assert torch.allclose(two[name] - base_state[name], 2 * (one[name] - base_state[name]), atol=1e-5)


@pytest.mark.parametrize("method", sorted(set(ALL) - {"dare", "ties", "iso-c", "iso-cts", "task-arithmetic", "wudi"}))
def test_identical_models_give_that_model_back(method: str, base_state: StateDict) -> None:
    """Spectral methods keep the leading directions only, so the task vectors have rank 1 here. TIES and DARE thin
    them out, Iso changes their spectrum, task arithmetic adds them up, WUDI begins at the sum and is held there by its
    damping: for those it is no invariant."""
    model = {}
    for name, value in models(base_state, 1)[0].items():
        delta = value - base_state[name]
        if delta.ndim == 2:
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            delta = (u[:, :1] * s[:1]) @ vh[:1]
        model[name] = base_state[name] + delta
    result = merged(method, base_state, [model] * 3)
    assert distance({n: model[n] for n in base_state}, result, base_state) < 1e-3


@pytest.mark.parametrize("method", ALL)
def test_exact_mode_agrees_with_the_default(method: str, base_state: StateDict) -> None:
    tuned = models(base_state)
    assert distance(merged(method, base_state, tuned), merged(method, base_state, tuned, exact=True), base_state) < 1e-3


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_every_option_rejects_nonsense(method: str) -> None:
    from dataclasses import fields

    for item in fields(METHODS[method].config):
        bad = "nonsense" if "Literal" in str(item.type) else float("nan")
        with pytest.raises(UsageError, match="--" + item.name.replace("_", "-")):
            METHODS[method].config(**{item.name: bad})


def test_ranks_and_shares_out_of_range() -> None:
    for make in (lambda: EpiMerConfig(rank=0), lambda: TIESConfig(density=1.5), lambda: EpiMerConfig(damping=-1)):
        with pytest.raises(UsageError):
            make()


# --- merge_state_dicts ----------------------------------------------------------------------------------------------


def test_any_architecture_and_any_kind_of_tensor() -> None:
    """Counters, empty tensors, scalars, parameters with gradients, transposed views, rows: nothing special needed."""
    generator = torch.Generator().manual_seed(0)
    base = {
        "w": torch.nn.Parameter(torch.randn(6, 4, generator=generator)),
        "transposed": torch.randn(4, 6, generator=generator).mT,
        "row": torch.randn(1, 5, generator=generator),
        "scale": torch.tensor(2.0),
        "kernel": torch.randn(2, 3, 3, 3, generator=generator),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor(7),
    }
    tuned = [{n: v.detach() + 1 if v.is_floating_point() else v for n, v in base.items()} for _ in range(2)]
    fisher = [{n: torch.ones_like(v) for n, v in base.items() if v.ndim == 2 and v.numel()} for _ in tuned]
    for method in ALL:
        measured = fisher if METHODS[method].needs is FISHER_DIAGONAL else [{} for _ in tuned]
        if method in ("fisher", "gradient-matching"):
            measured = [{n: torch.ones_like(v) for n, v in base.items() if v.is_floating_point()} for _ in tuned]
        result = merge_state_dicts(base, tuned, method=method, statistics=measured)
        assert list(result) == list(base)
        assert all(result[n].shape == base[n].shape and result[n].dtype == base[n].dtype for n in base), method
        assert int(result["steps"]) == 7
        assert not result["w"].requires_grad


def test_misuse_is_explained(base_state: StateDict) -> None:
    tuned = models(base_state)
    fisher = [tiny_fisher(t) for t in range(3)]
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (StatisticsError, "needs fisher", {}),
        (StatisticsError, "3 models but 2", {"statistics": fisher[:2]}),
        (StatisticsError, "no statistics", {"statistics": [{}, {}, {}]}),
        (UsageError, "takes a EpiMerConfig", {"statistics": fisher, "config": TSVMConfig()}),
        (UsageError, "no method", {"method": "magic"}),
        (UsageError, "3 models, 2 weights", {"statistics": fisher, "weights": [1, 2]}),
        (MismatchError, "has shape", {"statistics": [*fisher[:2], {**fisher[2], MATRIX: torch.ones(2, 2)}]}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            merge_state_dicts(base_state, tuned, **{"method": "epimer", **arguments})
    with pytest.raises(MismatchError, match="missing"):
        merge_state_dicts(base_state, [{MATRIX: tuned[0][MATRIX]}], method="mean")
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_state_dicts(base_state, [])


def test_a_config_names_its_method_and_nothing_names_the_best(base_state: StateDict) -> None:
    tuned = models(base_state)
    by_config = merge_state_dicts(base_state, tuned, config=TSVMConfig(rank=2))
    assert distance(by_config, merged("tsv-m", base_state, tuned, config=TSVMConfig(rank=2)), base_state) == 0
    plain = merge_state_dicts(base_state, tuned)
    assert distance(plain, merge_state_dicts(base_state, tuned, "epimer-core"), base_state) == 0


def test_papers_are_cited_by_their_authors() -> None:
    paper = METHODS["epimer"].paper
    people = "Juanwu Lu, Anand Bhaskar, Brian Axelrod, Ekaterina Tolstaya and Tristan Emrich"
    assert paper.names == METHODS["kronecker-core"].paper.names == people
    assert "author = {Lu, Juanwu and Bhaskar, Anand and " in paper.bibtex() and "2605.26693" in paper.bibtex()
    assert METHODS["ties"].paper.names == "Prateek Yadav and others"
    assert METHODS["frechet-lora"].paper.cited == "da Silva, arXiv 2026"
