"""Per-sample gradients of a model's parameters out of one ordinary backward pass.

A layer's input and the gradient of its output are all that is needed; no gradient of a weight is computed by autograd
and no copy of the model per sample is ever held. Every gradient comes in one of two forms, for N samples:

    Outer    G_n = sum_t left[n, t] right[n, t]^T       Linear, convolution (unfolded), Embedding (left one-hot), and
                                                        nn.MultiheadAttention, projection by projection
    Direct   G_n = values[n]                            biases, LayerNorm, LayerScale, parameters that stand alone

A layer called several times in one forward pass contributes the sum over its calls, as it must before squaring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm, linear, one_hot, pad, scaled_dot_product_attention, unfold

from hf_epimer.errors import StatisticsError


@dataclass(frozen=True)
class Outer:
    """Gradients of a matrix as sums of outer products: `left` N x t x m, `right` N x t x n."""

    left: Tensor
    right: Tensor

    def per_sample(self) -> Iterator[Tensor]:
        """G_n one by one, m x n each, in a buffer that is used again."""
        buffer = self.left.new_empty(self.left.shape[2], self.right.shape[2])
        for left, right in zip(self.left, self.right, strict=True):
            yield torch.mm(left.mT, right, out=buffer)

    def heard(self) -> Outer:
        """Without the positions of which the loss hears nothing: in a last block, all that nobody reads."""
        kept = self.left.abs().amax((0, 2)) != 0  # NaN is kept, to be found
        return self if bool(kept.all()) else Outer(self.left[:, kept], self.right[:, kept])


@dataclass(frozen=True)
class Direct:
    """Gradients as they are: `values` N x the shape of the parameter."""

    values: Tensor


Gradient = Outer | Direct


def no_gradient(shape: torch.Size, device: torch.device) -> Gradient:
    """That of a parameter which the loss does not depend on, for one sample."""
    if len(shape) in (2, 4):
        return Outer(torch.zeros(1, 1, shape[0], device=device), torch.zeros(1, 1, math.prod(shape[1:]), device=device))
    return Direct(torch.zeros(1, *shape, device=device))


Consume = Callable[[str, Gradient], None]
"""Takes the parameter's name and its gradients for the samples of one batch, in float32 or better."""


@contextmanager
def per_sample_gradients(model: nn.Module, names: Mapping[str, str], consume: Consume) -> Iterator[Callable[..., Any]]:
    """Hand the per-sample gradients of some parameters to `consume` during every backward pass.

    All parameters are frozen meanwhile, since autograd's own gradients of weights are not wanted, and released after.

    Args:
        model: computes with the parameters; anything that torch's autograd follows.
        names: the parameter's name in the model -> the name that `consume` gets.
        consume: called once per parameter and backward pass.

    Yields:
        forward(samples, *arguments, **keywords): the model's output, observed. Sample n must stand at index n of
        the first dimension of every tapped layer's input.

    Raises:
        StatisticsError: a parameter belongs to two layers, or to a kind of layer that is not known here.
    """
    observer = _Observer(model, names, consume)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = [module.register_forward_hook(observer.on_forward) for module in observer.owned]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield observer.forward
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Observer:
    def __init__(self, model: nn.Module, names: Mapping[str, str], consume: Consume) -> None:
        self.model = model
        self.consume = consume
        self.samples = 0
        self.owned: dict[nn.Module, dict[str, str]] = {}  # module -> its own parameter -> name for `consume`
        self.bare: dict[str, str] = {}
        self.waiting: dict[nn.Module, int] = {}
        self.pieces: dict[nn.Module, list[dict[str, Gradient]]] = {}
        owners: dict[nn.Parameter, str] = {}
        for path, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                full = f"{path}.{own}" if path else own
                if parameter in owners and (full in names or owners[parameter] in names):
                    raise StatisticsError(f"{full} and {owners[parameter]} share one parameter; untie them first")
                owners[parameter] = full
                if full not in names:
                    continue
                if _gradients_of(module) is not None:
                    self.owned.setdefault(module, {})[own] = names[full]
                elif _is_scale(module) or (next(module.children(), None) is not None and _is_token(parameter)):
                    self.bare[full] = names[full]
                else:
                    raise StatisticsError(
                        f"{full}: per-sample gradients of a {type(module).__name__} are not known here"
                    )

    def forward(self, samples: int, *arguments: Any, **keywords: Any) -> Any:
        self.samples = samples
        self.waiting.clear()
        self.pieces.clear()
        copies = {full: self._one_per_sample(full, name) for full, name in self.bare.items()}
        return functional_call(self.model, copies, arguments, keywords)

    def _one_per_sample(self, full: str, name: str) -> Tensor:
        """A token with a copy for every sample, N x 1 x w, for models that write `token.expand(N, 1, -1)`."""
        parameter = self.model.get_parameter(full).detach()
        copies = parameter.reshape(1, -1, parameter.shape[-1]).repeat(self.samples, 1, 1).requires_grad_(True)

        def deliver(gradient: Tensor) -> None:
            self.consume(name, Direct(_precise(gradient).reshape(self.samples, *parameter.shape)))

        copies.register_hook(deliver)
        return copies

    def on_forward(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():  # the first of the two forward passes of gradient checkpointing
            return None
        if isinstance(module, nn.MultiheadAttention):
            return self._attended(module, *arguments[:3]), None
        replaced = None
        if isinstance(module, nn.Embedding) and len(output) == 1 and self.samples > 1:
            # one lookup for the whole batch, as for positions: without a copy per sample their gradients arrive summed
            output = replaced = output.expand(self.samples, *output.shape[1:])
        self._await(module, arguments[0], output)
        return replaced

    def _attended(self, layer: nn.MultiheadAttention, *inputs: Tensor) -> Tensor:
        """What it gives for queries, keys and values, computed anew by its projections, which are observed one by one:
        it has them in one matrix, and none of them is a layer."""
        width = layer.embed_dim
        heads = []
        for part, read in enumerate(inputs):
            rows = slice(part * width, (part + 1) * width)
            projected = linear(read, layer.in_proj_weight[rows], layer.in_proj_bias[rows])
            self._await(layer, read, projected, (part * width, (len(inputs) - 1 - part) * width))
            heads.append(projected.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2))
        attended: Tensor = layer.out_proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return attended

    def _await(self, module: nn.Module, inputs: Tensor, output: Tensor, beside: tuple[int, int] = (0, 0)) -> None:
        """Have the gradient of an output delivered.

        Args:
            beside: how many rows of the module's matrix lie before and after those that gave this output.
        """
        if not output.requires_grad:
            output.requires_grad_(True)
        self.waiting[module] = self.waiting.get(module, 0) + 1
        read = inputs.detach()
        output.register_hook(lambda gradient: self._on_gradient(module, read, pad(gradient, beside)))

    def _on_gradient(self, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        gradients_of = _gradients_of(module)
        assert gradients_of is not None
        found = gradients_of(module, inputs, _precise(gradient))
        calls = self.pieces.setdefault(module, [])
        calls.append({own: found[own] for own in self.owned[module]})
        self.waiting[module] -= 1
        if self.waiting[module] == 0:
            del self.pieces[module]
            for own, name in self.owned[module].items():
                self.consume(name, _sum([call[own] for call in calls]))


def _is_token(parameter: Tensor) -> bool:
    """Whether a parameter that stands alone in a module is a row or rows put beside the tokens: w or 1 x ... x w."""
    return parameter.ndim == 1 or (parameter.ndim == 3 and len(parameter) == 1)


def _is_scale(module: nn.Module) -> bool:
    """Whether a layer has one vector and nothing else, by which it multiplies every position (LayerScale)."""
    parameters = list(module.parameters())
    return len(parameters) == 1 and parameters[0].ndim == 1 and next(module.children(), None) is None


def _precise(tensor: Tensor) -> Tensor:
    """Half precision is for the two passes only; sums are taken in float32 or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sum(calls: list[Gradient]) -> Gradient:
    """The gradients of several calls of one layer, added up."""
    if len(calls) == 1:
        return calls[0]
    outer = [call for call in calls if isinstance(call, Outer)]
    if outer:
        return Outer(torch.cat([call.left for call in outer], 1), torch.cat([call.right for call in outer], 1))
    return Direct(torch.stack([call.values for call in calls if isinstance(call, Direct)]).sum(0))


def _tokens(tensor: Tensor) -> Tensor:
    """N x ... x d as N x t x d."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


# --- one function per kind of layer: (layer, its input, the gradient of its output) -> parameter -> gradients ---------


def _linear(layer: Any, inputs: Tensor, gradient: Tensor) -> dict[str, Gradient]:
    left, right = _tokens(gradient), _tokens(inputs.to(gradient.dtype))
    return {"weight": Outer(left, right), "bias": Direct(left.sum(1))}


def _convolution(layer: Any, inputs: Tensor, gradient: Tensor) -> dict[str, Gradient]:
    left = gradient.flatten(2).mT
    padding = 0 if layer.padding == "valid" else layer.padding
    patches = unfold(inputs.to(gradient.dtype), layer.kernel_size, layer.dilation, padding, layer.stride)
    return {"weight": Outer(left, patches.mT), "bias": Direct(left.sum(1))}


def _layer_norm(layer: Any, inputs: Tensor, gradient: Tensor) -> dict[str, Gradient]:
    normalised = layer_norm(inputs.to(gradient.dtype), layer.normalized_shape, eps=layer.eps)
    shape = (len(gradient), -1, *layer.normalized_shape)
    return {
        "weight": Direct((gradient * normalised).reshape(shape).sum(1)),
        "bias": Direct(gradient.reshape(shape).sum(1)),
    }


def _embedding(layer: Any, inputs: Tensor, gradient: Tensor) -> dict[str, Gradient]:
    looked_up = one_hot(inputs.reshape(len(inputs), -1), layer.num_embeddings).to(gradient.dtype)
    return {"weight": Outer(looked_up.expand(len(gradient), -1, -1), _tokens(gradient))}


def _fused_projections(layer: Any, inputs: Tensor, gradient: Tensor) -> dict[str, Gradient]:
    return {f"in_proj_{name}": found for name, found in _linear(layer, inputs, gradient).items()}


_KINDS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], dict[str, Gradient]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.MultiheadAttention: _fused_projections,
}


def _gradients_of(module: nn.Module) -> Callable[[Any, Tensor, Tensor], dict[str, Gradient]] | None:
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding == "same"):
        return None
    if isinstance(module, nn.MultiheadAttention) and not _is_plain(module):
        return None
    return next((found for kind, found in _KINDS.items() if isinstance(module, kind)), None)


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether queries, keys and values have one width and biases, samples come first, and no token is added."""
    added = attention.bias_k is not None or attention.add_zero_attn
    return (
        attention.batch_first
        and attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and not added
    )
