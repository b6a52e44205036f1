"""Seconds and memory of a pass for curvature, batch by batch, next to ordinary training steps of the same batches.

    python scripts/bench_fisher.py [--batch-size 32] [--runs 5] [--device cpu] [--contenders ...] [--fusionbench PYTHON]

ViT-B/32 with random weights behind a head of 100 classes. Contenders, each in a process of its own:

    step          forward and backward pass of a training step, without the optimiser
    diagonal      the Fisher diagonal, per-sample squares
    projected     the projected Fisher on bases of rank 32 for 8 tasks (p = 256, where a layer allows it)
    kronecker     Kronecker factors
    gram          gradient-weighted Gram matrices, which a merge by closed form takes
    diagonal + gram
                  both in one pass: what is published
    vmap(grad)    the Fisher diagonal by torch.func, all samples' gradients of the whole model (the paper's way)
    fusionbench   one batch of FusionBench 0.2.33's Fisher: the square of the gradient of the batch's sum, another
                  quantity; `--fusionbench` names the Python of an environment that has it

Memory is the peak of what no file backs, of the whole process, on the CPU's side. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CLASSES = 100
BATCHES = 4
RANK, TASKS = 32, 8
CONTENDERS = (
    "step", "diagonal", "projected", "kronecker", "gram", "diagonal + gram", "vmap(grad)",
)  # fmt: skip


def peak_anonymous() -> int:
    """Bytes that no file backs, now; sampled after every pass, when buffers are still held by the allocator."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def peak_resident() -> int:
    """Peak resident bytes of this process."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def vision_model() -> Any:
    """ViT-B/32 with random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(patch_size=32, projection_dim=512)).eval()


def our_pass(name: str, pixels: Any, labels: Any) -> Callable[[], Any]:
    """`BATCHES` batches of ours, or of what it is compared with, on the device of the pixels."""
    import torch
    from accelerate import Accelerator
    from torch.nn.functional import cross_entropy

    from hf_epimer.curvature.accumulators import (
        FisherDiagonal,
        GradientGram,
        KroneckerFactors,
        ProjectedFisher,
        Together,
    )
    from hf_epimer.curvature.data_pass import Subject, accumulate
    from hf_epimer.models.classifier import Classifier, ZeroShotHead
    from hf_epimer.models.clip import CLIP
    from hf_epimer.models.linear import with_fast_products
    from hf_epimer.numerics.subspace import TaggedBasis, capped_rank
    from hf_epimer.tasks.images import Batch

    projection, head = torch.randn(512, 768), torch.randn(CLASSES, 512)
    # ours run on towers as `load_tower` makes them, what they are compared with on those of transformers
    tower = vision_model() if name in ("step", "vmap(grad)") else with_fast_products(vision_model())
    model = Classifier(tower, CLIP, ZeroShotHead(projection, head, torch.tensor(4.6)), None).eval()
    accelerator = Accelerator(cpu=pixels.device.type == "cpu")
    model.to(pixels.device)
    on_device = labels.to(pixels.device)
    subject = Subject(model, model.tower_names())
    batch = Batch(pixels, labels, range(len(labels)))

    def step() -> None:
        for _ in range(BATCHES):
            model.zero_grad(set_to_none=True)
            cross_entropy(model(pixels), on_device).backward()

    def vmapped() -> None:
        for _ in range(BATCHES):
            vmapped_batch()

    def vmapped_batch() -> None:
        parameters = {name: model.get_parameter(name).detach() for name in subject.names}

        def loss(values: Any, image: Any, label: Any) -> Any:
            logits = torch.func.functional_call(model, values, (image.unsqueeze(0),))
            return cross_entropy(logits, label.unsqueeze(0))

        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        for start in range(0, len(labels), 4):  # as many samples as fit: 4 copies of the model
            gradients = per_sample(parameters, pixels[start : start + 4], on_device[start : start + 4])
            for name, gradient in gradients.items():
                total[name] += gradient.square().sum(0)

    def bases() -> dict[str, TaggedBasis]:
        bases = {}
        for parameter, shape in CLIP.shapes(CLIP.fields).items():
            if len(shape) == 2:
                p = TASKS * capped_rank(RANK, (shape[0], shape[1]), TASKS)
                u, v = (torch.linalg.qr(torch.randn(side, p))[0] for side in shape)
                bases[parameter] = TaggedBasis(u, v, torch.ones(p), torch.zeros(p), RANK)
        return bases

    if name == "step":
        return step
    if name == "vmap(grad)":
        return vmapped
    if name == "projected":
        tagged = bases()
        return lambda: accumulate(
            subject, [batch] * BATCHES, ProjectedFisher(tagged, pixels.device), accelerator=accelerator
        )
    makers: dict[str, Any] = {"diagonal": FisherDiagonal, "kronecker": KroneckerFactors, "gram": GradientGram}
    wanted = [makers[part] for part in name.split(" + ")]
    return lambda: accumulate(
        subject, [batch] * BATCHES, Together([make(subject.shapes) for make in wanted]), accelerator=accelerator
    )


def fusionbench_pass(pixels: Any) -> Callable[[], Any]:
    """The steps of its CLIPFisherMergingAlgorithm.get_fisher_weights for one batch, with its function for squares."""
    import torch
    from fusion_bench.method.fisher_merging.fisher_merging import get_param_squared_gradients

    model = vision_model()
    projection, head = torch.randn(512, 768), torch.randn(CLASSES, 512)
    names = [name for name, _ in model.named_parameters()]

    def one() -> Any:
        return [batch() for _ in range(BATCHES)][-1]

    def batch() -> Any:
        embedding = model(pixels)[1] @ projection.T
        logits = 100 * embedding / embedding.norm(dim=-1, keepdim=True) @ head.T
        expectations = logits.softmax(-1).detach().sqrt() * logits.log_softmax(-1)
        model.zero_grad()
        expectations.sum().backward()
        return get_param_squared_gradients(model=model, param_names_to_merge=names)

    return one


def run_one(name: str, batch_size: int, runs: int, device: str) -> None:
    """Time one contender and print JSON."""
    import torch

    pixels, labels = torch.randn(batch_size, 3, 224, 224, device=device), torch.arange(batch_size) % CLASSES
    one = fusionbench_pass(pixels) if name == "fusionbench" else our_pass(name, pixels, labels)
    one()
    seconds, anonymous = [], 0
    for _ in range(runs):
        started = time.perf_counter()
        kept = one()
        if device != "cpu":
            torch.accelerator.synchronize()
        seconds.append((time.perf_counter() - started) / BATCHES)
        anonymous = max(anonymous, peak_anonymous())
        del kept
    print(json.dumps({"seconds": seconds, "anonymous": anonymous, "resident": peak_resident()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of all but FusionBench's")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, help="and the first")
    parser.add_argument("--fusionbench", metavar="PYTHON")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run_one(options.only, options.batch_size, options.runs, options.device)
        return
    from rich.console import Console
    from rich.table import Table

    contenders = dict.fromkeys([CONTENDERS[0], *options.contenders], sys.executable)
    if options.fusionbench:
        contenders["fusionbench"] = options.fusionbench
    rows = {}
    for name, python in contenders.items():
        words = [python, __file__, "--only", name]
        words += ["--batch-size", str(options.batch_size), "--runs", str(options.runs), "--device", options.device]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    table = Table(
        title=f"ViT-B/32, a batch of {options.batch_size} of {BATCHES}, median of {options.runs}", title_justify="left"
    )
    for column in ("", "seconds", "fastest", "against a step", "peak resident", "anonymous after"):
        table.add_column(column, justify="right" if column else "left")
    step = statistics.median(rows["step"]["seconds"])
    for name, row in rows.items():
        middle = statistics.median(row["seconds"])
        gib = (f"{row[kind] / 2**30:.2f} GiB" for kind in ("resident", "anonymous"))
        table.add_row(name, f"{middle:.2f}", f"{min(row['seconds']):.2f}", f"{middle / step:.2f}", *gib)
    Console().print(table)


if __name__ == "__main__":
    main()
