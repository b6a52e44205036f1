"""PEFT adapters: reading, merging and writing them.

adapter      a LoRA adapter as a checkpoint (base + B A) and as thin SVDs of its task vectors
peft_files   its files, and what its config says: whether it is one that can be merged
peft_keys    under which names its tensors are stored
patterns     ranks and alphas of single modules
core_space   adapters to a merged adapter, layer by layer, in the core that they span
dense        a merged adapter as full weights
peft_writer  adapter_config.json + adapter_model.safetensors that PeftModel.from_pretrained loads
"""

from __future__ import annotations

from hf_epimer.lora.adapter import Adapter, read_adapter
from hf_epimer.lora.core_space import MergedUpdate, merge_adapters, works_in_core
from hf_epimer.lora.dense import fold_updates
from hf_epimer.lora.peft_files import is_adapter
from hf_epimer.lora.peft_writer import write_adapter

__all__ = [
    "Adapter",
    "MergedUpdate",
    "fold_updates",
    "is_adapter",
    "merge_adapters",
    "read_adapter",
    "works_in_core",
    "write_adapter",
]
