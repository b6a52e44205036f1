"""A stand-in for a GPU: tensors that lie on the CPU and say that they lie on `DEVICE`, torch's meta device.

What is computed there is what the CPU computes. Whatever a GPU would refuse is an error here, too: an operation on
tensors of two devices, a generator of the other device. What makes a program wait for a GPU is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_epimer.merging import stream

DEVICE = torch.device("meta")

_TO = torch.ops.aten._to_copy.default
_COPY = torch.ops.aten.copy_.default
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class There(Tensor):
    """A tensor on `DEVICE`; `numbers` are its own, on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> There:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, numbers.size(), numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on {DEVICE} outside of a StandIn")


class _Above(TorchFunctionMode):
    """What torch does above its operations, where a tensor on `DEVICE` has no numbers to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist:
            return func(args[0].cpu())
        if func is Tensor.__getitem__ and isinstance(args[0], There):
            return func(args[0], tree_map(_index, args[1], is_leaf=lambda part: isinstance(part, list)))
        return func(*args, **kwargs)


class StandIn(TorchDispatchMode):
    """While it is entered, there is a device `DEVICE`.

    Args:
        float64: whether it has that type, which Apple's have not.

    Attributes:
        waits: times that a program would have waited for what a GPU has computed.
        sent: numbers that went to it.
    """

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.waits = 0
        self.sent = 0
        self._beside = ExitStack()

    def __enter__(self) -> StandIn:
        self._beside.enter_context(_Above())
        self._beside.enter_context(patch.object(torch, "autocast", _autocast))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._beside.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.device == DEVICE and not isinstance(leaf, There) for leaf in leaves):
            raise AssertionError(f"{func} of a tensor whose numbers are lost")
        there = [leaf for leaf in leaves if isinstance(leaf, There)]
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, There)]
        target = torch.device(kwargs["device"]) if kwargs.get("device") else DEVICE if there else torch.device("cpu")
        if func in (_TO, _COPY):
            source = args[-1] if func is _TO else args[1]
            target = target if func is _TO else args[0].device
            self.waits += isinstance(source, There) and target != DEVICE
            self.sent += source.numel() * (not isinstance(source, There) and target == DEVICE)
        else:
            self._check(func, args, there, here, kwargs.get("generator"), target)
        if "device" in kwargs and target == DEVICE:
            kwargs["device"] = torch.device("cpu")
        owners = {id(leaf.numbers): leaf for leaf in there}
        found = func(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor) or target != DEVICE:
                return value
            if value.dtype == torch.float64 and not self.float64:
                raise AssertionError(f"{func} gives float64")
            return owners[id(value)] if id(value) in owners else There(value)

        return tree_map(placed, found)

    def _check(self, func: Any, args: Any, there: Any, here: Any, generator: Any, target: torch.device) -> None:
        may_index = func in _INDEXED and isinstance(args[0], There)
        others = [tensor for tensor in here if tensor.ndim and not may_index]
        if there and others:
            raise AssertionError(f"{func} of tensors on two devices: {[list(each.shape) for each in others]}")
        if generator is not None and target == DEVICE:
            raise AssertionError(f"{func} with a generator of the CPU")
        masks = func in _INDEXED and any(each.dtype == torch.bool for each in args[1] if each is not None)
        self.waits += bool(there) and (func in _WAITS or masks)


_AUTOCAST = torch.autocast


def _autocast(device_type: str, *arguments: Any, **keywords: Any) -> Any:
    """Nothing on `DEVICE`, which torch does not know any precisions of."""
    return nullcontext() if device_type == DEVICE.type else _AUTOCAST(device_type, *arguments, **keywords)


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, There) else value


def _index(part: Any) -> Any:
    return torch.tensor(part) if isinstance(part, list) else part


class _Here(Executor):
    """Work done in the thread that asks for it."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **keywords))
        return done


def solve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have layers solved in the thread of the test, the only one in which there is a stand-in."""

    @contextmanager
    def pool(workers: int) -> Iterator[Executor]:
        yield _Here()

    monkeypatch.setattr(stream, "_pool", pool)
