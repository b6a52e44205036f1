"""Seconds and memory of a merge of models that no family knows: a made-up language model in shards, in bf16.

    python scripts/bench_sharded.py                          mean and TIES of two models of 4 GB
    python scripts/bench_sharded.py --gigabytes 0.4 --methods mean ties tsv-m
    python scripts/bench_sharded.py --mergekit PYTHON --methods mean "mergekit mean" ties "mergekit ties"

Names are those of a Llama with tied embeddings, so that mergekit reads the same files. All weights are random; a model
is its base and noise. Every program runs in a process of its own, one after the other, and its memory is looked at
every 20 ms: anonymous (what no file backs) and resident. mergekit trims TIES tensor by tensor, ours with --trim layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_merge import timed
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_epimer.checkpoints.writer import Shards

VOCABULARY, WIDTH, INNER = 65_536, 2_048, 8_192
SHARD_BYTES = 10**9

OURS = {
    "mean": ["--method", "mean"],
    "ties": ["--method", "ties"],
    "ties, trimmed by layer": ["--method", "ties", "--trim", "layer"],
    "tsv-m, rank 32": ["--method", "tsv-m", "--rank", "32"],
    "iso-c": ["--method", "iso-c"],
}

RUN_MERGEKIT = """
from mergekit.scripts.run_yaml import main
main(standalone_mode=False)
print("{}")
"""

MERGEKIT: dict[str, dict[str, Any]] = {
    "mergekit mean": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "mergekit ties": {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.2}},
}


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a Llama whose head is its embedding."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= {f"{block}self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{block}mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{block}{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (WIDTH,)}


def make_models(folder: Path, gigabytes: float, tasks: int) -> None:
    """base/ and t0/ .. in shards, with a config."""
    layer_bytes = 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER)
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * WIDTH) / layer_bytes))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "dtype": "bfloat16",
        "torch_dtype": "bfloat16", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    noise = torch.randn(2**24 + 2**16, generator=torch.Generator().manual_seed(0))
    for number, name in enumerate(["base", *(f"t{task}" for task in range(tasks))]):
        target = folder / name
        if (target / "config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        with Shards(target, {n: (torch.bfloat16, s) for n, s in shapes_of(layers).items()}, SHARD_BYTES) as shards:
            shards.create()
            for place, (parameter, shape) in enumerate(shapes_of(layers).items()):
                values = 0.02 * _stretch(noise, shape, 17 * place)
                if number:
                    values += 1e-3 * _stretch(noise, shape, 17 * place + 1009 * number)
                shards.write(parameter, values)
            shards.write_index()
        (target / "config.json").write_text(json.dumps(config))


def _stretch(noise: Tensor, shape: tuple[int, ...], start: int) -> Tensor:
    """As many numbers as the shape has, from a place of the noise on and round again."""
    end = start + torch.Size(shape).numel()
    return (
        noise.repeat(-(-end // len(noise)))[start:end].view(shape) if end > len(noise) else noise[start:end].view(shape)
    )


def run_ours(folder: Path, names: list[str], arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        models = [str(folder / name) for name in names]
        words = ["merge", *models, "--base", str(folder / "base"), *arguments, "--out", f"{out}/merged", "--json"]
        return timed([sys.executable, "-m", "hf_epimer", *words])


def run_mergekit(python: str, folder: Path, names: list[str], method: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        base = {"base_model": str(folder / "base")} if method["merge_method"] == "ties" else {}
        recipe = {**method, **base, "models": [{"model": str(folder / name)} for name in names], "dtype": "bfloat16"}
        file = Path(out, "recipe.yaml")
        file.write_text(json.dumps(recipe))  # JSON is YAML
        return timed([python, "-c", RUN_MERGEKIT, str(file), f"{out}/merged", "--no-copy-tokenizer"])


def _seconds_computed() -> float:
    """Of all processes that have been waited for, on all cores: what a busy machine does not change."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of one model; default 4")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-epimer-bench-sharded")
    parser.add_argument("--methods", nargs="*", default=["mean", "ties"], choices=[*OURS, *MERGEKIT])
    parser.add_argument("--mergekit", metavar="PYTHON", default="python", help="for its methods: its interpreter")
    parser.add_argument("--keep", action="store_true", help="do not delete the models")
    options = parser.parse_args()
    folder = options.folder / f"{options.gigabytes:g}-{options.tasks}"
    make_models(folder, options.gigabytes, options.tasks)
    names = [f"t{task}" for task in range(options.tasks)]
    rows: dict[str, dict[str, Any]] = {}
    for name in options.methods:
        before = _seconds_computed()
        if name in OURS:
            rows[name] = run_ours(folder, names, OURS[name])
        else:
            rows[name] = run_mergekit(options.mergekit, folder, names, MERGEKIT[name])
        rows[name]["computed"] = _seconds_computed() - before
        Console(stderr=True).print(f"{name}: {rows[name]['process']:.1f} s")
    size = sum(file.stat().st_size for file in (folder / "base").iterdir()) / 1e9
    largest = 2 * VOCABULARY * WIDTH / 2**30
    title = f"{options.tasks} models of {size:.1f} GB, largest tensor {largest:.2f} GiB, {os.cpu_count()} cores"
    table = Table(title=title, title_justify="left")
    for column in ("method", "seconds", "CPU seconds", "anonymous GiB", "resident GiB", "x largest tensor"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, run in rows.items():
        anonymous = run["anonymous"]
        seconds = (f"{run['process']:.1f}", f"{run['computed']:.1f}")
        table.add_row(name, *seconds, f"{anonymous:.2f}", f"{run['resident']:.2f}", f"{anonymous / largest:.1f}")
    Console().print(table)
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
