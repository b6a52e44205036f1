"""The names under which PEFT and those who build on it store an adapter's tensors, and what each of them is.

Plain names are <module>.lora_A.weight, .lora_B.weight and .lora_B.bias, and lora_embedding_A and _B of embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_epimer.errors import CheckpointError
from hf_epimer.lora.peft_files import DORA

ROOT = "base_model.model."
"""What PEFT puts before the name of every module."""

FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB])")
"""A factor: the module that it adapts, and which part of the update it is."""

_NAMED = re.compile(
    r"(?P<before>.+\.lora_(?:embedding_)?[AB])(?:\.(?P<name>(?!weight$|bias$)[\w-]+))?(?P<after>\.weight|\.bias)?"
)
"""A factor with an adapter's name in it, or none."""

_OTHER_PROGRAMS = re.compile(r"lora[._](?:linear_layer\.)?(?:down|up)\b|\.alpha$")


def plain_keys(stored: Iterable[str], label: str) -> dict[str, str]:
    """Names in PEFT's plain layout -> the keys of an adapter, as they are stored in one of several ways.

    Plain is `<module>.lora_A.weight`. Files come with `base_model.model.` before it, once or more often, with the
    adapter's name in it (`lora_A.default.weight`), and with `modules_to_save.default.` before the name of a parameter
    that is stored whole; what that replaces (`original_module`) is left out.

    Raises:
        CheckpointError: there are several adapters in it, or two keys mean the same.
    """
    names = {key: re.sub(rf"^(?:{re.escape(ROOT)})+", "", key) for key in stored if ".original_module." not in key}
    factors = {key: match for key, name in names.items() if (match := _NAMED.fullmatch(name))}
    adapters = {match["name"]: key for key, match in factors.items()}
    if len(adapters) > 1:
        listed = ", ".join(f"{name or 'one without a name'} ({key})" for name, key in adapters.items())
        raise CheckpointError(f"{label}: its file holds several adapters, {listed}: save one of them alone")
    saved = rf"\.modules_to_save\.(?:{next(iter(adapters), None) or 'default'}\.)?"
    keys: dict[str, str] = {}
    for key, name in names.items():
        match = factors.get(key)
        plain = f"{match['before']}{match['after'] or ''}" if match else re.sub(saved, ".", name)
        if plain in keys:
            raise CheckpointError(f"{label}: {keys[plain]} and {key} are the same parameter")
        keys[plain] = key
    return keys


def why_not(name: str) -> str:
    """Why a key that speaks of LoRA is none that can be read."""
    if "magnitude" in name:
        return DORA
    if _OTHER_PROGRAMS.search(name):
        return "it is laid out by kohya's scripts or diffusers; convert it to PEFT's layout (lora_A, lora_B)"
    return "PEFT's plain LoRA has lora_A and lora_B only"
