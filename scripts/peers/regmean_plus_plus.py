"""RegMean++ (Nguyen et al., 2025, arXiv:2508.03121), after the paper, to compare with.

    W = (sum_t W_t G_t) (sum_t G_t)^-1        block by block

G_t is what a linear layer of task t's own block reads on images of the task, when the blocks before are the merged
ones; its off-diagonal elements are multiplied by `SHRINKAGE`, as in RegMean. Whatever is no matrix is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blocks import first_states, passed, watched
from torch import Tensor, nn

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.models.clip import CLIP
from hf_epimer.models.weights import blocks_of, parameters_of, put_weights

SHRINKAGE = 0.95


@torch.no_grad()
def regmean_plus_plus(tower: nn.Module, tuned: Sequence[TensorSource], pictures: Sequence[Sequence[Tensor]]) -> None:
    """Merge into a tower.

    Args:
        tuned: theta_t.
        pictures: of every task, in batches [n, 3, h, w].
    """
    parameters = parameters_of(tower, CLIP)
    mean = {name: torch.stack([model.tensor(name).float() for model in tuned]).mean(0) for name in parameters}
    put_weights(parameters, StateDict("mean", mean))
    blocks = blocks_of(tower, CLIP)
    states = [first_states(tower, blocks[0], of_task) for of_task in pictures]
    for block in blocks:
        linears = [name for name, layer in block.layers.items() if isinstance(layer, nn.Linear)]
        grams: dict[str, list[Tensor]] = {name: [] for name in linears}
        for model, of_task in zip(tuned, states, strict=True):
            put_weights(block.parameters, model)
            sums: dict[str, Tensor] = {}
            for batch in of_task:
                with watched(block) as seen:
                    passed(block, batch)
                for name in linears:
                    x = seen[name].flatten(0, 1)
                    sums[name] = sums.get(name, 0) + (x.mT @ x).double()
            for name, gram in sums.items():
                grams[name].append(SHRINKAGE * gram + (1 - SHRINKAGE) * gram.diagonal().diag())
        put_weights(block.parameters, StateDict("mean", mean))
        for name in linears:
            weight = f"{block.name}.{name}.weight"
            right = sum(gram @ model.tensor(weight).double().mT for gram, model in zip(grams[name], tuned, strict=True))
            inverse = torch.linalg.pinv(torch.stack(grams[name]).sum(0), hermitian=True)  # some inputs may always be 0
            block.parameters[weight].copy_((inverse @ right).mT)
        states = [[passed(block, batch) for batch in of_task] for of_task in states]
