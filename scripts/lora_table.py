"""Train LoRA adapters on a zoo's tasks, merge them in every way, and measure each merge on each task.

    python scripts/lora_table.py --zoo DIR [--tasks mnist flags ...] [--ranks 4 16] [--steps 150] [--out DIR]
    python scripts/lora_table.py --cost [--ranks 16]      seconds and memory, eight adapters of ViT-L/14 shape

DIR has base/ and task_files/NAME.yaml. Adapters (all attention and MLP layers, seeded) are trained on the training
split without its last --validation rows and kept in --out. The scale alpha of every method is chosen on those rows;
the tests are used once. Kronecker curvature is measured on --samples training rows with true labels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_epimer.checkpoints.reader import StateDict, TensorSource
from hf_epimer.lora import Adapter, MergedUpdate, merge_adapters, read_adapter, write_adapter
from hf_epimer.lora.peft_keys import ROOT
from hf_epimer.merging.report import LayerReport
from hf_epimer.methods import METHODS, Layer
from hf_epimer.methods.frechet_lora import FrechetLoraConfig
from hf_epimer.methods.statistic import KRONECKER
from hf_epimer.methods.ties import TIESConfig, merge_ties
from hf_epimer.models.clip import CLIP
from hf_epimer.models.source import resolve_model
from hf_epimer.numerics.lowrank import LowRank

if TYPE_CHECKING:
    from hf_epimer.models.classifier import Head

ALPHAS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
BATCH = 32
MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

Update = dict[str, Tensor]


@dataclass
class Bench:
    """One task in memory: pixels and labels of three splits, and the frozen head."""

    name: str
    head: Head
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Zoo:
    """The base model, its tasks, and a classifier whose tower takes any weights."""

    def __init__(self, folder: Path, names: Sequence[str], validation: int, limit: int) -> None:
        from hf_epimer.hub.refs import ModelRef
        from hf_epimer.models.head import classifier_for
        from hf_epimer.models.loading import load_processor, load_tower, preprocess
        from hf_epimer.models.weights import parameters_of
        from hf_epimer.tasks.decode import decode
        from hf_epimer.tasks.images import read_samples
        from hf_epimer.tasks.task import load_task_file

        self.folder = folder / "base"
        base = resolve_model(ModelRef(str(self.folder.absolute())))
        self.processor = load_processor(self.folder)
        self.tower = load_tower(self.folder)
        self.parameters = parameters_of(self.tower, CLIP)
        self.weights = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.base = StateDict("base", self.weights)
        self.benches = []
        for name in names or sorted(file.stem for file in (folder / "task_files").glob("*.yaml")):
            task = load_task_file(folder / "task_files" / f"{name}.yaml")
            samples = read_samples(task, task.train_split)
            train, test = samples.rows, read_samples(task, task.test_split).rows
            head = classifier_for(self.tower, base, base, task, samples.class_names).head

            def loaded(data: Any, rows: range, task: Any = task) -> tuple[Tensor, Tensor]:
                part = data.select(rows)
                images = [decode(value) for value in part[task.image_column]]
                return preprocess(self.processor, images), torch.tensor(part[task.label_column])

            train, last = train.shuffle(seed=0), max(len(train) - validation, 1)
            splits = (train, range(last)), (train, range(last, len(train))), (test, range(min(limit, len(test))))
            self.benches.append(Bench(name, head, *(loaded(data, rows) for data, rows in splits)))

    def classifier(self, bench: Bench, tower: Any = None) -> Any:
        from hf_epimer.models.classifier import Classifier

        return Classifier(tower or self.tower, CLIP, bench.head, self.processor).eval()

    @torch.inference_mode()
    def accuracy(self, bench: Bench, split: str, update: Update) -> float:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])
            if name in update:
                parameter.add_(update[name])
        images, labels = getattr(bench, split)
        model = self.classifier(bench)
        guesses = torch.cat([model.top1(part) for part in images.split(250)])
        return float((guesses == labels).float().mean())

    def accuracies(self, split: str, update: Update) -> list[float]:
        return [self.accuracy(bench, split, update) for bench in self.benches]


def train(zoo: Zoo, bench: Bench, rank: int, folder: Path, steps: int, rate: float) -> None:
    """One adapter, in PEFT's own format."""
    import peft

    from hf_epimer.models.loading import load_tower

    torch.manual_seed(sum(map(ord, bench.name)))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES)
    tower = peft.get_peft_model(load_tower(zoo.folder), config)
    model = zoo.classifier(bench, tower).train()
    learned = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    images, labels = bench.train
    for _ in range(steps):
        rows = torch.randint(len(labels), (BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images[rows])
        loss = cross_entropy(logits.float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tower.save_pretrained(str(folder))


def curvature(zoo: Zoo, bench: Bench, adapter: Adapter, samples: int) -> StateDict:
    """A = E[x x^T] and S = E[g g^T] of every Linear layer, at the adapted weights."""
    with torch.no_grad():
        for name, parameter in zoo.parameters.items():
            parameter.copy_(adapter.tensor(name))
    grams: dict[str, Tensor] = {}
    hooks = []
    for path, module in zoo.tower.named_modules():
        name = f"{CLIP.canonical(path)}.weight"
        if not isinstance(module, torch.nn.Linear) or name not in adapter.changed:
            continue

        def add(key: str, values: Tensor) -> None:
            rows = values.detach().flatten(0, -2)
            grams[key] = grams.get(key, torch.zeros(())) + rows.mT @ rows / samples

        keys = [name + part.suffix for part in KRONECKER.parts]
        hooks.append(module.register_forward_hook(lambda m, x, y, key=keys[0]: add(key, x[0])))
        hooks.append(module.register_full_backward_hook(lambda m, gx, gy, key=keys[1]: add(key, gy[0])))  # type: ignore[misc]
    images, labels = bench.train
    model = zoo.classifier(bench)
    for part in torch.arange(samples).split(64):
        cross_entropy(model(images[part]), labels[part], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    zoo.tower.zero_grad()
    return StateDict(f"curvature of {bench.name}", grams)


# --- the merges -----------------------------------------------------------------------------------------------------


def naive(adapters: Sequence[Adapter]) -> Update:
    """What one must not do: the average of B times the average of A."""
    updates = {}
    for name in adapters[0].changed:
        pairs = [adapter.factors(name) for adapter in adapters]
        b, a = (torch.stack(list(side)).mean(0) for side in zip(*pairs, strict=True))
        updates[name] = b @ a
    return updates


def knots(adapters: Sequence[Adapter], density: float = 0.2) -> Update:
    """KnOTS-TIES: [D_1 .. D_T] = U S [V_1 .. V_T]^T, TIES on S V_t^T, and U in front again."""
    updates = {}
    for name in adapters[0].changed:
        points = [adapter.low_rank(name) for adapter in adapters]
        q, r = torch.linalg.qr(torch.cat([x.u * x.s for x in points], dim=1))
        u = q @ torch.linalg.svd(r, full_matrices=False)[0]
        aligned = torch.stack([(u.mT @ x.u * x.s) @ x.v.mT for x in points])
        weights = torch.full((len(points),), 1 / len(points), dtype=aligned.dtype)
        labels = tuple(adapter.label for adapter in adapters)
        layer = Layer(name, torch.zeros_like(aligned[0]), aligned, weights, is_matrix=True, labels=labels)
        updates[name] = u @ merge_ties(layer, TIESConfig(density=density, trim="layer"), None).task_vector
    return updates


def whole(method: str, adapters: Sequence[Adapter]) -> Update:
    """A method on the dense task vectors."""
    from hf_epimer.merging.inputs import Ingredients, normalized_weights
    from hf_epimer.merging.stream import merge_layers

    base = adapters[0].base
    ingredients = Ingredients(base, adapters, normalized_weights(None, len(adapters)))
    merged = merge_layers(ingredients, METHODS[method], METHODS[method].config())
    return {layer.name: layer.tensor - base.tensor(layer.name) for layer in merged}


def core(
    method: str,
    adapters: Sequence[Adapter],
    config: Any = None,
    statistics: Sequence[TensorSource] | None = None,
    out_rank: int | None = None,
) -> Update:
    """A method through the union core."""
    config = config or METHODS[method].config()
    merged = merge_adapters(adapters, METHODS[method], config, statistics=statistics, out_rank=out_rank)
    return {u.name: u.update.dense() if isinstance(u.update, LowRank) else u.update for u in merged}


def merges(adapters: Sequence[Adapter], rank: int, measured: Sequence[TensorSource]) -> dict[str, Callable[[], Update]]:
    """Row of the table -> merge at alpha = 1."""

    def mean(kind: str) -> Callable[[], Update]:
        return lambda: core("frechet-lora", adapters, FrechetLoraConfig(lora_mean=kind))  # type: ignore[arg-type]

    curved = FrechetLoraConfig(metric="kronecker", normalize="trace", damping=0.1)
    return {
        "B and A averaged": lambda: naive(adapters),
        "chordal": mean("chordal"),
        f"chordal, out-rank {rank}": lambda: core("frechet-lora", adapters, out_rank=rank),
        "procrustes": mean("procrustes"),
        "polar": mean("polar"),
        "log-polar": mean("log-polar"),
        "riemannian": mean("riemannian"),
        "chordal, Kronecker": lambda: core("frechet-lora", adapters, curved, measured),
        "TIES": lambda: whole("ties", adapters),
        "TIES in the core": lambda: core("ties", adapters),
        "KnOTS-TIES": lambda: knots(adapters),
        "TSV-M": lambda: core("tsv-m", adapters),
        "Iso-C": lambda: core("iso-c", adapters),
    }


def table_of(zoo: Zoo, rank: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Accuracy per task of every merge of the rank's adapters."""
    console = Console(stderr=True)
    adapters = []
    for bench in zoo.benches:
        folder = options.out / f"{bench.name}-r{rank}-{options.steps}"
        if not (folder / "adapter_model.safetensors").exists():
            began = time.monotonic()
            train(zoo, bench, rank, folder, options.steps, options.rate)
            console.print(f"{bench.name}, rank {rank}: trained in {time.monotonic() - began:.0f} s")
        adapters.append(read_adapter(folder, zoo.base, CLIP.canonical, bench.name))
    measured = [curvature(zoo, b, a, options.samples) for b, a in zip(zoo.benches, adapters, strict=True)]
    specialists = [
        zoo.accuracy(bench, "test", core("mean", [adapter]))
        for bench, adapter in zip(zoo.benches, adapters, strict=True)
    ]
    rows: dict[str, dict[str, Any]] = {
        "base, zero-shot": {"accuracy": zoo.accuracies("test", {})},
        "each its own": {"accuracy": specialists},
    }
    for row, merge in merges(adapters, rank, measured).items():
        update, spent = costed(merge)
        scores = {}
        for alpha in ALPHAS:
            scores[alpha] = sum(zoo.accuracies("validation", {n: alpha * u for n, u in update.items()}))
        alpha = max(scores, key=lambda a: scores[a])
        accuracies = zoo.accuracies("test", {n: alpha * u for n, u in update.items()})
        rows[row] = {"accuracy": accuracies, "alpha": alpha, **spent}
        shown = f"merged in {spent['cpu']:.1f} s of processor time and {spent['memory']:.0f} MiB"
        console.print(f"{row}: {sum(accuracies) / len(accuracies):.3f} at alpha {alpha:g}, {shown}")
    return rows


def costed(merge: Callable[[], Update]) -> tuple[Update, dict[str, float]]:
    """A merge, its seconds, and the MiB that the process grew by at its peak, the dense result among them."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier merges freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began, used = memory("VmRSS"), time.monotonic(), time.process_time()
    update = merge()
    seconds, cpu = time.monotonic() - began, time.process_time() - used
    return update, {"seconds": seconds, "cpu": cpu, "memory": 1024 * (memory("VmHWM") - before)}


def show(names: Sequence[str], rank: int, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{len(names)} adapters of rank {rank}", title_justify="left")
    for column in ("merge", *names, "average", "worst", "alpha", "CPU seconds", "MiB"):
        table.add_column(column, justify="left" if column == "merge" else "right")
    for row, row_values in rows.items():
        values = row_values["accuracy"]
        tail = [""] * 3
        if "alpha" in row_values:
            tail = [f"{row_values['alpha']:g}", f"{row_values['cpu']:.1f}", f"{row_values['memory']:.0f}"]
        mean, worst = sum(values) / len(values), min(values)
        table.add_row(row, *(f"{v:.3f}" for v in values), f"{mean:.3f}", f"{worst:.3f}", *tail)
    Console(width=160).print(table)


# --- the cost -------------------------------------------------------------------------------------------------------

VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
}


def shapes_only() -> StateDict:
    """A base of ViT-L/14 shape that takes no memory: merging adapters does not read it."""
    return StateDict("base", {name: torch.zeros(1).expand(s) for name, s in CLIP.shapes(VIT_L).items()})


def write_random(folder: Path, rank: int, seed: int, spread: float) -> None:
    """Factors that are `spread` of their own and the rest common: 1 is as far apart as independent training gets."""
    folder.mkdir(parents=True)
    common, separate = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes_only().shapes.items():
        if len(shape) == 2 and ".layers." in name:
            module = ROOT + CLIP.module_name(name).removesuffix(".weight")
            for part, size in (("lora_A", (rank, shape[1])), ("lora_B", (shape[0], rank))):
                values = (
                    torch.randn(size, generator=common) * (1 - spread) + torch.randn(size, generator=separate) * spread
                )
                tensors[f"{module}.{part}.weight"] = values * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": MODULES}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def memory(field: str) -> float:
    """A figure of this process in GiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1]) / 2**20


def measure(folder: Path, row: str) -> None:
    """One merge from files to a file, in a process of its own; prints JSON."""
    before = memory("VmRSS")
    began, used = time.monotonic(), time.process_time()
    base = shapes_only()
    adapters = [read_adapter(path, base, CLIP.canonical) for path in sorted(folder.iterdir())]
    method, _, kind = row.partition(" ")
    config = FrechetLoraConfig(lora_mean=kind) if kind else METHODS[method].config()  # type: ignore[arg-type]
    reports: list[LayerReport] = []

    def noted(updates: Iterable[MergedUpdate]) -> Iterator[MergedUpdate]:
        for update in updates:
            reports.append(update.report)
            yield update

    with tempfile.TemporaryDirectory() as out:
        updates = noted(merge_adapters(adapters, METHODS[method], config))
        model_class = (CLIP.output_class, CLIP.library)
        write_adapter(Path(out), updates, base, module_name=CLIP.module_name, model_class=model_class)
    costs = {
        "seconds": time.monotonic() - began,
        "cpu": time.process_time() - used,
        "peak": memory("VmHWM"),
        "before": before,
        "unique": sum(report.solve is None or report.solve.unique is not False for report in reports),
        "layers": len(reports),
        "steps": sum(report.solve.steps or 0 for report in reports if report.solve) / len(reports),
        "residual": max((report.solve.residual or 0.0 for report in reports if report.solve), default=0.0),
    }
    print(json.dumps(costs))


def cost(rank: int) -> None:
    table = Table(title=f"eight adapters of rank {rank}, ViT-L/14 shape, {torch.get_num_threads()} thread(s)")
    for column in (
        "merge",
        "apart",
        "seconds",
        "CPU seconds",
        "peak GiB",
        "of which torch",
        "steps a layer",
        "unique in",
    ):
        table.add_column(column, justify="left" if column == "merge" else "right")
    rows = [f"frechet-lora {kind}" for kind in ("chordal", "procrustes", "polar", "riemannian")]
    for spread in (0.05, 1.0):
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(8):
                write_random(Path(folder) / f"a{seed}", rank, seed + 1, spread)
            for row in [*rows, "tsv-m", "iso-c", "ties"]:
                command = [sys.executable, __file__, "--measure", folder, row]
                costs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                cells = (
                    f"{costs['seconds']:.1f}",
                    f"{costs['cpu']:.1f}",
                    f"{costs['peak']:.2f}",
                    f"{costs['before']:.2f}",
                )
                unique = f"{costs['unique']}/{costs['layers']}" if row.startswith("frechet") else ""
                table.add_row(row, f"{spread:g}", *cells, f"{costs['steps']:.0f}", unique)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--limit", type=int, default=500, help="test images per task")
    parser.add_argument("--out", type=Path, default=Path("lora-zoo"))
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "ROW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
        return
    if options.cost:
        cost(options.ranks[-1])
        return
    if options.zoo is None:
        parser.error("give a zoo with --zoo DIR, or --cost")
    import datasets

    datasets.disable_progress_bars()
    for logger in ("datasets", "hf_epimer"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    zoo = Zoo(options.zoo, options.tasks, options.validation, options.limit)
    names = [bench.name for bench in zoo.benches]
    options.out.mkdir(parents=True, exist_ok=True)
    for rank in options.ranks:
        rows = table_of(zoo, rank, options)
        show(names, rank, rows)
        content = {"tasks": names, "rank": rank, "steps": options.steps, "rows": rows}
        (options.out / f"table-{len(names)}-r{rank}.json").write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
