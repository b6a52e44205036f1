"""Relative error of merged layers against the dense float64 solution, on the checkpoints that bench_merge.py makes.

python scripts/check_accuracy.py [--folder DIR] [--model vit-b-32] [--tasks 8]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from hf_epimer import EpiMerConfig, merge_state_dicts
from hf_epimer.methods.epimer_core import EpiMerCoreConfig
from hf_epimer.methods.tsv import TSVMConfig

METHODS = {
    "tsv-m": TSVMConfig(rank=32),
    "epimer": EpiMerConfig(preset="paper"),
    "epimer-core": EpiMerCoreConfig(metric="task-vectors"),
}

LAYERS = ("3.self_attn.q_proj", "5.mlp.fc1", "5.mlp.fc2")


def read(file: Path, name: str) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-epimer-bench")
    parser.add_argument("--model", default="vit-b-32")
    parser.add_argument("--tasks", type=int, default=8)
    options = parser.parse_args()
    folder = options.folder / f"{options.model}-{options.tasks}"
    models = [folder / f"t{task}" for task in range(options.tasks)]
    for layer in LAYERS:
        name = f"vision_model.encoder.layers.{layer}.weight"
        base = read(folder / "base" / "model.safetensors", name)
        tuned = [read(model / "model.safetensors", name) for model in models]
        fisher = [read(model / "fisher.safetensors", name) for model in models]
        doubled = {name: base[name].double()}  # so that the reference is stored in float64 too
        for method, config in METHODS.items():
            merged = merge_state_dicts(base, tuned, method, config, fisher)[name].double()
            exact = merge_state_dicts(doubled, tuned, method, config, fisher, exact=True)[name]
            error = float((merged - exact).norm() / (exact - doubled[name]).norm())
            Console(highlight=False).print(f"{layer:<22} {method:<12} {error:.1e}")


if __name__ == "__main__":
    main()
