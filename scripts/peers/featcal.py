"""FeatCal (Gu et al., 2026, arXiv:2605.13030), after the paper, to compare with.

Block by block, with x what a layer reads in the merge and x_t what it reads in task t's own model on the same image:

    weight   minimise  sum_t |G_t|_F^-1 E |W x - W_t x_a|^2 + ridge |W - A|^2,   x_a = a x_t + (1 - a) x,  G_t = E x x^T
    bias     b = (sum_t (b_t + W_t E x_a - W E x) / |G_t|_F + ridge A) / (sum_t 1 / |G_t|_F + ridge)
    norm     minimise  sum_t E |g z + b - g_t z - b_t|^2 + ridge |(g, b) - A|^2, z normalised: 2 x 2 for every channel

A = r theta_merge + (1 - r) theta_0 is the anchor. In the last block positions other than the class token's count a
hundredth, but in keys and values. Weights of a block are solved from one pass with the merge as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from blocks import States, first_states, passed, watched
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.models.clip import CLIP
from hf_epimer.models.weights import Block, blocks_of, parameters_of, put_weights

RIDGE, ANCHOR, TOWARDS = 0.05, 2.2, 0.25
"""The paper's ridge, r and a, for ViT-B/32."""


@dataclass
class Moments:
    """Means over a task's images and positions: of x (or z), x_a, x x^T (or z^2) and x x_a^T."""

    student: Tensor
    teacher: Tensor
    gram: Tensor
    cross: Tensor


@torch.no_grad()
def featcal(
    tower: nn.Module, base: TensorSource, tuned: Sequence[TensorSource], pictures: Sequence[Sequence[Tensor]]
) -> None:
    """Calibrate a merge in a tower.

    Args:
        base: theta_0.
        tuned: theta_t.
        pictures: of every task, in batches [n, 3, h, w].
    """
    parameters = parameters_of(tower, CLIP)
    merge = StateDict("merge", {name: value.detach().clone() for name, value in parameters.items()})
    blocks = blocks_of(tower, CLIP)
    students = [first_states(tower, blocks[0], of_task) for of_task in pictures]
    teachers: list[States] = []
    for model, of_task in zip(tuned, pictures, strict=True):
        put_weights(parameters, model)
        teachers.append(first_states(tower, blocks[0], of_task))
    put_weights(parameters, merge)
    own = copy.deepcopy(blocks[0])  # takes the weights of any block of any task
    for number, block in enumerate(blocks):
        is_last = number == len(blocks) - 1
        moments = []
        for model, student, teacher in zip(tuned, students, teachers, strict=True):
            own = replace(own, name=block.name, parameters=_named_as(block, own))
            put_weights(own.parameters, model)
            moments.append(_moments(block, own, student, teacher, is_last))
        put_weights(block.parameters, StateDict("solved", _solved(block, merge, base, tuned, moments)))
        students = [[passed(block, batch) for batch in of_task] for of_task in students]


def _named_as(block: Block, other: Block) -> dict[str, nn.Parameter]:
    """Another block's parameters, by the names of this one's."""
    return dict(zip(block.parameters, other.parameters.values(), strict=True))


def _moments(block: Block, own: Block, student: States, teacher: States, is_last: bool) -> dict[str, Moments]:
    """Of every layer, on one task's images, whose states in its own model move on.

    Args:
        own: the block with the weights of that model.
    """
    sums: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(student):
        with watched(block) as reads:
            passed(block, batch)
        with watched(own) as of_teacher:
            teacher[number] = passed(own, teacher[number])
        for name, layer in block.layers.items():
            x, x_a = reads[name], TOWARDS * of_teacher[name] + (1 - TOWARDS) * reads[name]
            heard = x.new_ones(x.shape[:-1])
            if is_last and not name.endswith(("k_proj", "v_proj")):
                heard[:, 1:] = 0.01
            heard = heard.flatten()[:, None]
            x, x_a = x.flatten(0, 1), x_a.flatten(0, 1)
            if isinstance(layer, nn.LayerNorm):
                x = x_a = layer_norm(x, layer.normalized_shape, eps=layer.eps)
                second, cross = ((heard * x.square()).sum(0),) * 2
            else:
                second, cross = x.mT @ (heard * x), x.mT @ (heard * x_a)
            new = [(heard * x).sum(0), (heard * x_a).sum(0), second, cross, heard.sum()]
            sums[name] = [old + more for old, more in zip(sums[name], new)] if name in sums else new
    return {name: Moments(*(each / of_layer[-1] for each in of_layer[:-1])) for name, of_layer in sums.items()}


def _solved(
    block: Block,
    merge: TensorSource,
    base: TensorSource,
    tuned: Sequence[TensorSource],
    moments: Sequence[dict[str, Moments]],
) -> dict[str, Tensor]:
    """Canonical name -> weights of every layer of a block."""
    device = next(iter(block.parameters.values())).device

    def read(source: TensorSource, name: str) -> Tensor:
        return source.tensor(name).to(device).float()

    def anchor(name: str) -> Tensor:
        return ANCHOR * read(merge, name) + (1 - ANCHOR) * read(base, name)

    solved = {}
    for layer, module in block.layers.items():
        weight, bias = (f"{block.name}.{layer}.{part}" for part in ("weight", "bias"))
        of_tasks = [of_task[layer] for of_task in moments]
        weights, biases = ([read(model, name) for model in tuned] for name in (weight, bias))
        if isinstance(module, nn.LayerNorm):
            energy = RIDGE + cast(Tensor, sum(each.gram for each in of_tasks))
            mean = cast(Tensor, sum(each.student for each in of_tasks))
            count = RIDGE + len(tuned)
            pairs = list(zip(of_tasks, weights, biases, strict=True))
            first = RIDGE * anchor(weight) + sum(each.gram * g + each.student * b for each, g, b in pairs)
            second = RIDGE * anchor(bias) + sum(each.student * g + b for each, g, b in pairs)
            determinant = energy * count - mean.square()
            solved[weight] = (count * first - mean * second) / determinant
            solved[bias] = (energy * second - mean * first) / determinant
            continue
        scales = [1 / each.gram.norm() for each in of_tasks]
        ridge = RIDGE * torch.eye(weights[0].shape[1], device=device)
        left = sum(scale * each.gram for scale, each in zip(scales, of_tasks)) + ridge
        right = RIDGE * anchor(weight).mT + sum(
            scale * each.cross @ w.mT for scale, each, w in zip(scales, of_tasks, weights)
        )
        solved[weight] = torch.linalg.solve(left, right).mT
        lacks = [b + w @ each.teacher - solved[weight] @ each.student for each, w, b in zip(of_tasks, weights, biases)]
        total = RIDGE * anchor(bias) + sum(scale * lack for scale, lack in zip(scales, lacks))
        solved[bias] = total / (RIDGE + sum(scales))
    return solved
