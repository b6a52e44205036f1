"""A merged adapter as a folder that PeftModel.from_pretrained loads: adapter_config.json, adapter_model.safetensors.

Every layer has the rank that it needs (`rank_pattern`), its alpha is its rank (scaling 1), and its factors are
balanced: B = U S^1/2, A = S^1/2 V^T. Modules are named in full, so that PEFT adapts these and no others. Parameters
that are no low-rank updates are stored as trained biases (`bias="all"`) or whole modules (`modules_to_save`).

Modules are named as in the model that the adapter is loaded into, which PEFT does not translate: for a CLIPVisionModel
without the `vision_model.` prefix from transformers 5.6 on, with it before.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import TensorSource
from hf_epimer.checkpoints.writer import write_tensors
from hf_epimer.errors import OutputError
from hf_epimer.lora.core_space import MergedUpdate
from hf_epimer.lora.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_epimer.lora.peft_keys import ROOT
from hf_epimer.merging.finite import stored_as
from hf_epimer.numerics.lowrank import LowRank

_EMBEDDING = "position_embedding"


def write_adapter(
    folder: Path,
    updates: Iterable[MergedUpdate],
    base: TensorSource,
    *,
    module_name: Callable[[str], str],
    model_class: tuple[str, str],
    base_name: str | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Write both files into `folder`, which exists.

    Args:
        updates: from `merge_adapters`.
        base: theta_0, for parameters that are stored whole.
        module_name: canonical name of a layer -> its name in the model that the adapter is loaded into.
        model_class: of that model, and the module of transformers that it is in.
        base_name: for `base_model_name_or_path`, a Hub id or a folder.
        base_revision: its commit.
        dtype: of the stored tensors.

    Returns:
        The content of adapter_config.json.

    Raises:
        OutputError: an update that PEFT cannot express, or none at all.
        NumericalError: an update that does not fit into `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole: dict[str, Tensor] = {}
    for merged in updates:
        module = module_name(merged.name.rsplit(".", 1)[0])
        if isinstance(merged.update, LowRank) and merged.name.endswith(".weight"):
            if merged.update.rank:
                factors = _factors(module, merged, merged.update, embedding=module.endswith(_EMBEDDING))
                tensors |= _stored_as(factors, dtype)  # at once: float64 factors of all layers would add up
                ranks[module] = merged.update.rank
        else:
            values = merged.update.dense().view(merged.shape) if isinstance(merged.update, LowRank) else merged.update
            if bool(values.any()):
                whole[merged.name] = base.tensor(merged.name).to(values.dtype) + values
    if not ranks:
        raise OutputError("the merged adapter is zero in every layer: there is nothing to write")
    kept, saved, has_biases = _whole_parameters(whole, ranks, base, module_name)
    stored = {ROOT + key: value for key, value in sorted({**tensors, **_stored_as(kept, dtype)}.items())}
    config = _config(ranks, saved, has_biases, model_class, base_name, base_revision)
    shapes = {key: tuple(value.shape) for key, value in stored.items()}
    (written,) = write_tensors(folder, shapes, dtype, stored.items(), max_shard_bytes=sys.maxsize)
    (folder / written).rename(folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def _stored_as(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: stored_as(value, dtype, key).contiguous() for key, value in tensors.items()}


def _factors(module: str, merged: MergedUpdate, update: LowRank, embedding: bool) -> dict[str, Tensor]:
    b, a = update.balanced()
    if embedding and len(merged.shape) == 2:  # num x m, and D = (B A)^T
        return {f"{module}.lora_embedding_A": b.mT, f"{module}.lora_embedding_B": a.mT}
    b_shape = b.shape if len(merged.shape) == 2 else (*b.shape, *[1] * (len(merged.shape) - 2))
    return {
        f"{module}.lora_A.weight": a.reshape(len(a), *merged.shape[1:]),
        f"{module}.lora_B.weight": b.reshape(b_shape),
    }


def _whole_parameters(
    whole: dict[str, Tensor], ranks: dict[str, int], base: TensorSource, module_name: Callable[[str], str]
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Tensors, modules to save, and whether biases were trained, for parameters that are replaced."""
    tensors: dict[str, Tensor] = {}
    saved: set[str] = set()
    for name, value in whole.items():
        module, _, parameter = name.rpartition(".")
        path = module_name(module)
        if parameter == "bias" and (path in ranks or f"{module}.weight" not in whole):
            tensors[f"{path}.base_layer.bias" if path in ranks else f"{path}.bias"] = value
        elif parameter in ("weight", "bias"):
            saved.add(path)
            for part in ("weight", "bias"):  # PEFT stores and loads a module as a whole
                if f"{module}.{part}" in base.shapes:
                    tensors[f"{path}.{part}"] = whole.get(f"{module}.{part}", base.tensor(f"{module}.{part}"))
        else:
            raise OutputError(
                f"{name}: PEFT cannot store this parameter in an adapter; write a full model with --dense"
            )
    has_biases = any(key.endswith(".bias") and key.rsplit(".", 1)[0] not in saved for key in tensors)
    return tensors, sorted(saved), has_biases


def _config(
    ranks: dict[str, int],
    saved: list[str],
    has_biases: bool,
    model_class: tuple[str, str],
    base_name: str | None,
    base_revision: str | None,
) -> dict[str, Any]:
    common = Counter(ranks.values()).most_common(1)[0][0]
    unlike = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": model_class[0], "parent_library": model_class[1]},
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": unlike,
        "alpha_pattern": unlike,
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "bias": "all" if has_biases else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
