"""A LoRA adapter as PEFT stores it, read as a task vector and as a checkpoint.

    D = scaling B A,  scaling = alpha / r or alpha / sqrt(r) (rsLoRA), with r and alpha per module where patterns say so

Stored keys are base_model.model.<module>.lora_A.weight (r x n) and .lora_B.weight (m x r); modules are named as in the
model that was trained, with `vision_model.` before transformers 5.6 and in every CLIPModel. Names are made canonical
by the architecture, as those of checkpoints. Convolutions are folded to m x (n k k); embeddings (num x m) store A as
r x num and B as m x r, so that D = (B A)^T. `modules_to_save` and trained biases replace the base's values.
`fan_in_fan_out` says nothing here: PEFT itself drops it for Linear layers.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import Checkpoint, TensorSource, read_json
from hf_epimer.errors import CheckpointError, MismatchError
from hf_epimer.lora.patterns import Patterns
from hf_epimer.lora.peft_files import ADAPTER_CONFIG, adapter_weights, check_config
from hf_epimer.lora.peft_keys import FACTOR, plain_keys, why_not
from hf_epimer.merging.finite import check_weights
from hf_epimer.numerics.lowrank import LowRank, factorize, low_rank
from hf_epimer.types import Shape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Low:
    """Where the factors of one weight lie, and how B A becomes its task vector."""

    a: str
    b: str
    scaling: float
    embedding: bool


class Adapter:
    """A `TensorSource` over an adapter and its base: every tensor is base + scaling B A.

    Args:
        label: how messages name it.
        config: the content of adapter_config.json.
        stored: the adapter's tensors under PEFT's names.
        base: what it was trained on.
        canonical: maps a parameter's name in the trained model to a canonical one; None for other parts of the model.

    Raises:
        CheckpointError: it is no LoRA adapter, or of a kind that adds no low-rank matrix (DoRA and others).
        MismatchError: it does not fit the base.
    """

    def __init__(
        self,
        label: str,
        config: Mapping[str, Any],
        stored: TensorSource,
        base: TensorSource,
        canonical: Callable[[str], str | None] = lambda name: name,
    ) -> None:
        self.label = label
        self.config = config
        self.base = base
        self._stored = stored
        check_config(config, label)
        where = f"{label}: {ADAPTER_CONFIG}"
        self._alphas = Patterns("alpha_pattern", config.get("alpha_pattern"), where)
        self._ranks = Patterns("rank_pattern", config.get("rank_pattern"), where)
        self._roots = {name.split(".")[0] for name in base.shapes}
        self._keys = plain_keys(stored.shapes, label)
        self._low: dict[str, _Low] = {}
        self._replaced: dict[str, str] = {}
        self._added: dict[str, tuple[str, float]] = {}
        self.foreign: list[str] = []
        """Stored tensors that belong to other parts of the model."""
        unmatched = [key for name, key in self._keys.items() if not self._place(name, key, canonical)]
        if 2 * len(unmatched) >= len(stored.shapes):
            raise MismatchError(
                f"{label}: {len(unmatched)} of its {len(stored.shapes)} tensors fit nothing in the base, the first is "
                f"{unmatched[0]}: the adapter was trained on another model, or its keys are of another program"
            )
        self.foreign += unmatched
        touched = {*self._low, *self._replaced, *self._added}
        self.changed = [name for name in base.shapes if name in touched]
        """Canonical names of the parameters that it changes, in the order of the base."""
        if not touched:
            raise CheckpointError(
                f"{label}: its adapter changes nothing in the vision tower; there is nothing to merge"
            )
        self._check()

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Those of the base."""
        return self.base.shapes

    def plain(self, key: str) -> str:
        """The name in PEFT's plain layout of a tensor that is stored under this key."""
        return next(name for name, stored in self._keys.items() if stored == key)

    def rank(self, name: str) -> int:
        """r of one matrix: of its factors, full where it is replaced as a whole, 0 where it is left alone."""
        if name in self._low:
            return self._shape(self._low[name].a)[0]
        shape = self.base.shapes[name]
        return min(shape[0], math.prod(shape[1:])) if name in self._replaced else 0

    def tensor(self, name: str) -> Tensor:
        """base + D in the base's dtype, rounded once."""
        base = self.base.tensor(name)
        if name not in self.changed:
            return base
        difference = torch.empty(base.shape, dtype=torch.float32)
        self.task_vector_to(name, difference)
        return (base.float() + difference).to(base.dtype)

    def copy_to(self, name: str, out: Tensor) -> None:
        self.base.copy_to(name, out)
        if name in self.changed:
            difference = torch.empty_like(out)
            self.task_vector_to(name, difference)
            out.add_(difference)

    def task_vector_to(self, name: str, out: Tensor) -> None:
        """D itself, computed in the precision of `out`; exactly low-rank, as base + D - base would not be."""
        if name in self._low:
            b, a = self.factors(name, out.dtype)
            torch.mm(b, a, out=out.view(len(b), -1))
        elif name in self._replaced:
            out.copy_(self._read(self._replaced[name], out.dtype))
            out.sub_(self.base.tensor(name).to(out.dtype))
        else:
            out.zero_()
        if name in self._added:
            key, scaling = self._added[name]
            out.add_(self._read(key, out.dtype), alpha=scaling)

    def is_zero(self) -> bool:
        """Whether it changes nothing: a factor of every update is zero, and what is replaced is the base's own."""

        def is_zero(name: str) -> bool:
            return not bool(self._read(name, torch.float32).any())

        low = all(not place.scaling or is_zero(place.b) or is_zero(place.a) for place in self._low.values())
        added = all(not scaling or is_zero(name) for name, scaling in self._added.values())
        return (
            low
            and added
            and all(
                torch.equal(self._read(name, torch.float32), self.base.tensor(parameter).float())
                for parameter, name in self._replaced.items()
            )
        )

    def factors(self, name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """B (m x r, scaling included) and A (r x n) of one weight, folded to a matrix."""
        place = self._low[name]
        a, b = self._read(place.a, dtype).flatten(1), self._read(place.b, dtype).flatten(1)
        return (a.mT * place.scaling, b.mT) if place.embedding else (b * place.scaling, a)

    def low_rank(self, name: str) -> LowRank:
        """The task vector of one matrix by its thin SVD, float64; of rank 0 where the adapter leaves it alone."""
        if name in self._low:
            return low_rank(*self.factors(name))
        shape = self.base.shapes[name]
        rows, columns = shape[0], math.prod(shape[1:])
        if name not in self._replaced:
            nothing = torch.zeros(0, dtype=torch.float64)
            return LowRank(nothing.new_zeros(rows, 0), nothing, nothing.new_zeros(columns, 0))
        difference = torch.empty(shape, dtype=torch.float32)
        self.task_vector_to(name, difference)
        thin = factorize(difference.view(rows, columns))
        return LowRank(thin.u.double(), thin.s.double(), thin.v.double())

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        values = self._stored.tensor(self._keys[name]).to(dtype)
        check_weights(values, self.label, self._keys[name])
        return values

    # --- from stored names to parameters ---

    def _place(self, name: str, key: str, canonical: Callable[[str], str | None]) -> bool:
        """Note what a stored tensor is for; False where nothing like it is known.

        Args:
            name: in PEFT's plain layout.
            key: under which it is stored.
        """
        match = FACTOR.fullmatch(name)
        if match is None and re.search(r"(?:^|[._])lora[._]", name):
            raise CheckpointError(
                f"{self.label}: {key} belongs to a kind of LoRA that cannot be merged: {why_not(name)}"
            )
        module, part = (match["module"], match["part"]) if match else ("", "")
        weight = f"{module}.{'bias' if part == 'lora_B.bias' else 'weight'}" if match else name
        parameter = canonical(weight.replace(".base_layer.", "."))
        if parameter is None:
            self.foreign.append(key)
            return True
        if parameter.split(".")[0] not in self._roots:
            return False
        if not match:
            self._replaced[self._new(parameter, key)] = name
            return True
        a, b = (name.removesuffix(part) + part.replace(f"_{given}", f"_{wanted}") for given, wanted in ("BA", "AB"))
        if part == "lora_B.bias":
            a, b = name.removesuffix(part) + "lora_A.weight", name
        for needed in (a, b):
            if needed not in self._keys:
                raise CheckpointError(f"{self.label}: {key} is there, but {needed} is missing: it is incomplete")
        factors = [self._shape(needed) for needed in (a, b) if not needed.endswith(".bias")]
        if any(len(shape) < 2 or 0 in shape for shape in factors):
            raise CheckpointError(
                f"{self.label}: {key} is empty or no matrix; a sharded adapter must be gathered before it is saved"
            )
        if name != b:  # its partner is placed with it
            return True
        if part == "lora_B.bias":
            self._added[self._known(parameter)] = (name, self._scaling(module, factors[0]))
        else:
            parameter = self._new(parameter, key)
            self._low[parameter] = _Low(a, b, self._scaling(module, factors[0]), embedding="embedding" in part)
        return True

    def _new(self, parameter: str, key: str) -> str:
        """The parameter, known to be placed for the first time."""
        if parameter in self._low or parameter in self._replaced:
            raise CheckpointError(f"{self.label}: {parameter} is stored twice, the second time as {key}")
        return self._known(parameter)

    def _known(self, parameter: str) -> str:
        """The parameter, known to be the base's."""
        if parameter not in self.base.shapes:
            raise MismatchError(f"{self.label}: it adapts {parameter}, which the base does not have; name its own base")
        return parameter

    def _shape(self, name: str) -> Shape:
        return self._stored.shapes[self._keys[name]]

    def _scaling(self, module: str, shape: Shape) -> float:
        rank, alpha = shape[0], self._alphas.value(module, self.config.get("lora_alpha", 8))
        declared = self._ranks.value(module, self.config.get("r", 8))
        if declared != rank:
            raise CheckpointError(
                f"{self.label}: {module} has factors of rank {rank}, but {ADAPTER_CONFIG} says {declared}: "
                "they are not of one adapter"
            )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _check(self) -> None:
        """Compare with the base, before any weight is read."""
        for name, place in self._low.items():
            b, a = self._shape(place.b), self._shape(place.a)
            rows, columns = (a[1], b[0]) if place.embedding else (b[0], math.prod(a[1:]))
            expected = self.base.shapes[name]
            ranks = (a[0], b[1])
            if (rows, columns) != (expected[0], math.prod(expected[1:])) or ranks[0] != ranks[1]:
                raise MismatchError(
                    f"{self.label}: {name} has factors {list(b)} and {list(a)}, but the base's weight is "
                    f"{list(expected)}: the adapter was trained on another model"
                )
        for name, key in {**self._replaced, **{n: k for n, (k, _) in self._added.items()}}.items():
            if self._shape(key) != self.base.shapes[name]:
                raise MismatchError(
                    f"{self.label}: {name} has shape {list(self._shape(key))} instead of "
                    f"{list(self.base.shapes[name])}: the adapter was trained on another model"
                )


def read_adapter(
    folder: Path,
    base: TensorSource,
    canonical: Callable[[str], str | None],
    label: str | None = None,
    *,
    quiet: bool = False,
    kept: Callable[[str], bool] | None = None,
) -> Adapter:
    """An adapter from a local folder.

    Args:
        quiet: do not warn of tensors that are left out.
        kept: which of these, by their names in the trained model, somebody else reads; None for none.

    Raises:
        CheckpointError, MismatchError: as `Adapter`, `adapter_weights`, `read_json` and `Checkpoint` do.
    """
    label = label or folder.name
    config = read_json(folder / ADAPTER_CONFIG, label)
    file = folder / adapter_weights([path.name for path in folder.iterdir()], label)
    adapter = Adapter(label, config, Checkpoint(label, [file]), base, canonical)
    lost = [key for key in adapter.foreign if not (kept and kept(adapter.plain(key)))]
    if lost and not quiet:
        logger.warning(
            "%s: %d of its tensors are no part of the vision tower and are left out (%s)", label, len(lost), lost[0]
        )
    return adapter
