"""The files of an adapter as PEFT saves it, and what its adapter_config.json says before a weight is read.

An adapter is merged if it is base + scaling B A and nothing else; the settings with which it is more are refused here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hf_epimer.checkpoints.reader import PICKLED, WEIGHTS, WEIGHTS_INDEX
from hf_epimer.errors import CheckpointError
from hf_epimer.lora.patterns import Patterns

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

DORA = (
    "DoRA rescales the columns of W_0 + B A, so that what it adds to W_0 has no low rank; merge it into its base where "
    "you trust it (merge_and_unload, save_pretrained) and give that checkpoint"
)
"""Why DoRA is none of what can be merged."""

_REFUSED = {
    "use_dora": DORA,
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
    for field in ("rank_pattern", "alpha_pattern"):
        Patterns(field, config.get(field), f"{label}: {ADAPTER_CONFIG}")  # what is wrong with them is said now
    for field in ("r", "lora_alpha"):
        value = config.get(field, 8)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{label}: {field} in {ADAPTER_CONFIG} is {value!r}, not a number")
