"""`hf-epimer fisher`: curvature of a checkpoint as a file, written or pushed."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from hf_epimer.cli.arguments import add_output_arguments, path
from hf_epimer.cli.terminal import Command, progress_bar
from hf_epimer.hub.refs import ModelRef
from hf_epimer.methods.statistic import FISHER_FILE, PUBLISHED_FILES, STATISTICS_FILES, StatisticsFile


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="REF", help="the checkpoint: a folder or org/name[@revision]")
    parser.add_argument("--task", required=True, metavar="NAME|FILE", help="a built-in task, or a task file")
    parser.add_argument("--base", metavar="REF", help="the base; default: from the card, or by the shape")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--samples", type=int, metavar="N", help="how many samples; default 256")
    amount.add_argument("--fraction", type=float, metavar="F", help="this share of the split instead, in (0, 1]")
    parser.add_argument("--split", metavar="S", help="of the data set; default: the task's training split")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="B", help="per process, at most: changes speed only"
    )
    parser.add_argument("--labels", choices=["true", "sampled"], default="true", help="sampled: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples and of sampled labels")
    parser.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        help="fetch only the samples that are used; default: of data sets over 2 GB",
    )
    parser.add_argument("--squared-mean", action="store_true", help="square the mean gradient (a weak baseline)")
    only = parser.add_mutually_exclusive_group()
    for file in STATISTICS_FILES:
        text = f"{file.title} alone ({file.name})"
        only.add_argument(f"--{file.key}", action="store_const", const=file, dest="only", help=text)
    parser.add_argument("--compress", choices=["bf16", "rank1"], help="store the diagonal small; default fp32")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], help="of the passes, not the sums")
    parser.add_argument("--no-probe", action="store_true", help="do not look for dropout and augmentation first")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=path, metavar="FILE", help="file to write, or a folder to write into")
    where.add_argument("--push", action="store_true", help="add the files to the checkpoint's repo in one commit")
    add_output_arguments(parser)


def _run(namespace: argparse.Namespace) -> None:
    model = ModelRef.parse(namespace.model)
    base = ModelRef.parse(namespace.base) if namespace.base else None
    from hf_epimer.curvature.measure import StatisticsRecipe, measure
    from hf_epimer.curvature.request import Gradients
    from hf_epimer.tasks.dataset import Sampling

    samples = namespace.samples if namespace.samples is not None or namespace.fraction is not None else 256
    # `accelerate launch --mixed_precision` says it in the environment
    precision: Any = namespace.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    sampling = Sampling(
        samples,
        namespace.fraction,
        namespace.split,
        namespace.seed,
        namespace.streaming,
    )
    gradients = Gradients(namespace.labels, "squared-mean" if namespace.squared_mean else "per-sample", precision)
    recipe = StatisticsRecipe(
        model,
        namespace.task,
        base,
        sampling,
        gradients,
        _files(namespace),
        namespace.compress,
        namespace.batch_size,
        not namespace.no_probe,
        namespace.out,
        namespace.push,
    )
    with progress_bar(namespace.quiet or namespace.json) as progress:
        report = measure(recipe, progress)
    if not report.paths and report.url is None:  # one of the other processes of `accelerate launch`
        return
    if namespace.json:
        place = {"out": str(report.paths[0]) if report.paths else None, "url": report.url}
        files = [file.name for file in recipe.files]
        print(json.dumps({**place, "files": files, "seconds": report.seconds, **report.metadata}))
        return
    what = " and ".join(file.title for file in recipe.files)
    print(f"{what} of {model} from {report.metadata['samples']} samples in {report.seconds:.1f} s")
    for written in report.paths:
        print(f"file    {written}")
    if report.url:
        print(f"pushed  {report.url}")


def _files(namespace: argparse.Namespace) -> tuple[StatisticsFile, ...]:
    """What is measured: what others need to merge the checkpoint, as far as there is room for more than one file."""
    if namespace.only:
        return (namespace.only,)
    single = namespace.squared_mean or (namespace.out and not namespace.out.is_dir())
    return (FISHER_FILE,) if single else PUBLISHED_FILES


FISHER = Command("measure a checkpoint's curvature on its task", _add_arguments, _run)
