"""Statistics stored small merge like those stored in full, from memory and from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_epimer import merge_state_dicts
from hf_epimer.errors import MismatchError
from hf_epimer.merging.compact import halved, means_of
from hf_epimer.methods.fisher_averaging import FisherConfig
from hf_epimer.methods.regmean import RegMeanConfig

SHAPES = {"a.weight": (5, 4), "a.bias": (5,), "b.weight": (3, 5), "b.bias": (3,)}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]


def module(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)})
    return layers


def grams(seed: int, suffix: str = ".input_factor") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xs = {name: torch.randn(9, SHAPES[name][1], generator=generator) for name in MATRICES}
    return {name + suffix: x.mT @ x for name, x in xs.items()}


def fisher(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def test_grams_by_half_under_either_name_and_beside_others(tmp_path: Path) -> None:
    base, tuned = module(0), [module(1), module(2)]
    full = RegMeanConfig().merge(base, tuned, [grams(1, ""), grams(2, "")])
    for number in (1, 2):
        others = {f"{name}.output_factor": torch.eye(SHAPES[name][0]) for name in MATRICES}
        save_file(halved(grams(number) | others), tmp_path / f"{number}.safetensors")
    files = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    small = RegMeanConfig().merge(base, tuned, files)
    assert all(torch.equal(full[name], small[name]) for name in full)
    mean = {name: (tuned[0].state_dict()[name] + tuned[1].state_dict()[name]) / 2 for name in full}
    assert not torch.allclose(full["a.weight"], mean["a.weight"], atol=1e-3)  # so that the statistics were read


def test_fisher_information_by_means(tmp_path: Path) -> None:
    base, tuned = module(0), [module(1), module(2)]
    means = [means_of(fisher(number)) for number in (1, 2)]
    rank_one = []
    for stored in means:
        rebuilt = {
            name: torch.outer(stored[f"{name}.rows"], stored[f"{name}.columns"]) / stored[f"{name}.rows"].mean()
            for name in MATRICES
        }
        rank_one.append({name: rebuilt.get(name, stored.get(name)) for name in SHAPES})
    full = FisherConfig().merge(base, tuned, rank_one)
    small = FisherConfig().merge(base, tuned, means)
    for name, value in full.items():
        torch.testing.assert_close(small[name], value)


def test_shapes_of_statistics_are_compared_with_the_parameters() -> None:
    base, tuned = module(0).state_dict(), [module(1).state_dict(), module(2).state_dict()]
    wrong = grams(1) | {"a.weight.input_factor": torch.eye(5)}
    with pytest.raises(MismatchError, match=r"a\.weight\.input_factor has shape \[5, 5\] instead of \[4, 4\]"):
        merge_state_dicts(base, tuned, "regmean", statistics=[wrong, grams(2)])
    with pytest.raises(MismatchError, match=r"a\.weight\.input_factor has shape \[11\] instead of \[4, 4\]"):
        merge_state_dicts(
            base, tuned, "regmean", statistics=[grams(1) | {"a.weight.input_factor": torch.ones(11)}, grams(2)]
        )
    with pytest.raises(MismatchError, match=r"unexpected c\.weight\.input_factor"):
        merge_state_dicts(
            base, tuned, "regmean", statistics=[grams(1) | {"c.weight.input_factor": torch.eye(4)}, grams(2)]
        )
