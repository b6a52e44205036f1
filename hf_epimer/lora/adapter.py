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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import PICKLED, WEIGHTS, WEIGHTS_INDEX, Checkpoint, TensorSource, read_json
from hf_epimer.errors import CheckpointError, MismatchError
from hf_epimer.merging.finite import check_weights
from hf_epimer.numerics.lowrank import LowRank, factorize, low_rank
from hf_epimer.types import Shape

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."

_DORA = (
    "DoRA rescales the columns of W_0 + B A, so that what it adds to W_0 has no low rank; merge it into its base where "
    "you trust it (merge_and_unload, save_pretrained) and give that checkpoint"
)

_REFUSED = {
    "use_dora": _DORA,
    "use_qalora": "QALoRA pools the inputs of a quantised model",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA changes the base weights, too",
    "monteclora_config": "MonteCLoRA adds random samples to its factors",
    "arrow_config": "Arrow routes between several adapters",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "layer_replication": "it repeats layers of its base",
    "target_parameters": "it changes bare parameters instead of modules",
    "trainable_token_indices": "it trains single tokens",
}
"""Settings of adapter_config.json with which an adapter is no base + B A, and why."""

_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract the first B A from the base: the adapter alone does not say what was learned."""


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
        self._roots = {name.split(".")[0] for name in base.shapes}
        self._low: dict[str, _Low] = {}
        self._replaced: dict[str, str] = {}
        self._added: dict[str, tuple[str, float]] = {}
        self.foreign = [key for key in stored.shapes if not self._place(key, canonical)]
        """Stored tensors that belong to other parts of the model."""
        touched = {*self._low, *self._replaced, *self._added}
        self.changed = [name for name in base.shapes if name in touched] + sorted(touched - {*base.shapes})
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

    def rank(self, name: str) -> int:
        """r of one matrix: of its factors, full where it is replaced as a whole, 0 where it is left alone."""
        if name in self._low:
            return self._stored.shapes[self._low[name].a][0]
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
        found = factorize(difference.view(rows, columns))
        return LowRank(found.u.double(), found.s.double(), found.v.double())

    def _read(self, key: str, dtype: torch.dtype) -> Tensor:
        values = self._stored.tensor(key).to(dtype)
        check_weights(values, self.label, key)
        return values

    # --- from stored names to parameters ---

    def _place(self, key: str, canonical: Callable[[str], str | None]) -> bool:
        """Note what a stored tensor is for; False for one that belongs to another part of the model."""
        name = key.removeprefix(ROOT)
        match = _FACTOR.fullmatch(name)
        if match is None and ".lora_" in name:
            reason = _DORA if "magnitude" in name else "PEFT's plain LoRA has lora_A and lora_B only"
            raise CheckpointError(f"{self.label}: {key} belongs to a kind of LoRA that cannot be merged: {reason}")
        module, part = (match["module"], match["part"]) if match else ("", "")
        if match:
            name = f"{module}.{'bias' if part == 'lora_B.bias' else 'weight'}"
        parameter = canonical(name.replace(".base_layer.", "."))
        if parameter is None or parameter.split(".")[0] not in self._roots:
            return False
        if not match:
            self._replaced[parameter] = key
            return True
        a, b = (key.removesuffix(part) + part.replace(f"_{found}", f"_{wanted}") for found, wanted in ("BA", "AB"))
        if part == "lora_B.bias":
            a = key.removesuffix("lora_B.bias") + "lora_A.weight"
            b = key
        for needed in (a, b):
            if needed not in self._stored.shapes:
                raise CheckpointError(f"{self.label}: {key} is there, but {needed} is missing: it is incomplete")
        factors = [self._stored.shapes[needed] for needed in (a, b) if not needed.endswith(".bias")]
        if any(len(shape) < 2 or 0 in shape for shape in factors):
            raise CheckpointError(
                f"{self.label}: {key} is empty or no matrix; a sharded adapter must be gathered before it is saved"
            )
        scaling = self._scaling(module, factors[0])
        if part == "lora_B.bias":
            self._added[parameter] = (key, scaling)
        else:
            self._low[parameter] = _Low(a, b, scaling, embedding="embedding" in part)
        return True

    def _scaling(self, module: str, shape: Shape) -> float:
        rank, alpha = shape[0], _by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        declared = _by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        if declared != rank:
            raise CheckpointError(
                f"{self.label}: {module} has factors of rank {rank}, but {ADAPTER_CONFIG} says {declared}: "
                "they are not of one adapter"
            )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _check(self) -> None:
        """Compare with the base, before any weight is read."""
        for name in self.changed:
            if name not in self.base.shapes:
                raise MismatchError(f"{self.label}: it adapts {name}, which the base does not have; name its own base")
        for name, place in self._low.items():
            b, a = self._stored.shapes[place.b], self._stored.shapes[place.a]
            rows, columns = (a[1], b[0]) if place.embedding else (b[0], math.prod(a[1:]))
            expected = self.base.shapes[name]
            ranks = (a[0], b[1])
            if (rows, columns) != (expected[0], math.prod(expected[1:])) or ranks[0] != ranks[1]:
                raise MismatchError(
                    f"{self.label}: {name} has factors {list(b)} and {list(a)}, but the base's weight is "
                    f"{list(expected)}: the adapter was trained on another model"
                )
        for name, key in {**self._replaced, **{n: k for n, (k, _) in self._added.items()}}.items():
            if self._stored.shapes[key] != self.base.shapes[name]:
                raise MismatchError(
                    f"{self.label}: {name} has shape {list(self._stored.shapes[key])} instead of "
                    f"{list(self.base.shapes[name])}: the adapter was trained on another model"
                )


_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB])")


def is_adapter(names: Collection[str]) -> bool:
    """Whether a folder or repo with these files is an adapter rather than a checkpoint."""
    return ADAPTER_CONFIG in names and WEIGHTS not in names and WEIGHTS_INDEX not in names


def adapter_weights(names: Iterable[str], label: str) -> str:
    """The name of the file with an adapter's weights.

    Raises:
        CheckpointError: there are none, or only pickled ones.
    """
    names = set(names)
    if ADAPTER_WEIGHTS in names:
        return ADAPTER_WEIGHTS
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        raise CheckpointError(
            f"{label}: only pickled weights ({', '.join(pickled)}), which can run code and are never opened. Convert "
            "them where you trust them: PeftModel.from_pretrained(...).save_pretrained(folder)"
        )
    raise CheckpointError(f"{label}: no {ADAPTER_WEIGHTS} among its files")


def read_adapter(
    folder: Path,
    base: TensorSource,
    canonical: Callable[[str], str | None],
    label: str | None = None,
    *,
    quiet: bool = False,
) -> Adapter:
    """An adapter from a local folder.

    Args:
        quiet: do not warn of tensors that are left out.

    Raises:
        CheckpointError, MismatchError: as `Adapter`, `adapter_weights`, `read_json` and `Checkpoint` do.
    """
    label = label or folder.name
    config = read_json(folder / ADAPTER_CONFIG, label)
    file = folder / adapter_weights([path.name for path in folder.iterdir()], label)
    adapter = Adapter(label, config, Checkpoint(label, [file]), base, canonical)
    if adapter.foreign and not quiet:
        logger.warning(
            "%s: %d of its tensors are no part of the vision tower and are left out (%s)",
            label,
            len(adapter.foreign),
            adapter.foreign[0],
        )
    return adapter


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Refuse what is not base + B A.

    Raises:
        CheckpointError: saying why, and what can be done.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{label}: it is a {kind} adapter; only LoRA adapters can be merged")
    for setting, reason in _REFUSED.items():
        if config.get(setting):
            raise CheckpointError(f"{label}: {setting} is set in {ADAPTER_CONFIG}: {reason}")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_MOVE_THE_BASE):
        raise CheckpointError(
            f"{label}: it started from {start}, which moves the base weights; save it as a plain LoRA first "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for field in ("r", "lora_alpha"):
        value = config.get(field, 8)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{label}: {field} in {ADAPTER_CONFIG} is {value!r}, not a number")


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What PEFT's rank_pattern or alpha_pattern says of a module: the first key that matches the end of its name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
