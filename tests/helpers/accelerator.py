"""Torch's meta device in the place of a GPU: what is computed there has shapes and no numbers.

Whatever a GPU would refuse, tensors of two devices in one operation, is an error here too; what makes a program wait
for a GPU is counted, and answered with ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")

_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_SCALAR = torch.ops.aten._local_scalar_dense.default
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class StandIn(TorchDispatchMode):
    """While it is entered, `DEVICE` is a GPU.

    Attributes:
        waits: times that a program would have waited for what a GPU has computed.
        sent: numbers that went to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if tensor.device == DEVICE]
        if func in _COPIES:
            return self._copied(func, args, kwargs)
        if not here:
            return func(*args, **kwargs)
        others = [tensor for tensor in tensors if tensor.device != DEVICE and (tensor.ndim or func in _INDEXED)]
        if others:
            raise AssertionError(f"{func} of tensors on two devices: {[list(each.shape) for each in others]}")
        if func is _SCALAR:
            self.waits += 1
            return torch.ones((), dtype=here[0].dtype).item()
        if func in _INDEXED and any(each.dtype == torch.bool for each in args[1] if each is not None):
            self.waits += 1
            return func(args[0], [_all_of(each) for each in args[1]], *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        *into, source = args[:2]  # copy_(target, source) or _to_copy(source, device=...)
        target = into[0].device if into else torch.device(kwargs.get("device") or source.device)
        if source.device == DEVICE != target:
            self.waits += 1
            source = torch.ones(source.shape, dtype=source.dtype)
        elif source.device != DEVICE == target:
            self.sent += source.numel()
        copied: Tensor = func(*into, source, *args[2:], **kwargs)
        return copied


def _all_of(index: Tensor | None) -> Tensor | None:
    """A mask that holds everywhere."""
    if index is None or index.dtype != torch.bool:
        return index
    return torch.arange(len(index), device=index.device)
