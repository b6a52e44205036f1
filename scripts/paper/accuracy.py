"""Accuracy of every method: the paper's Table 6, with the averages of Table 2 and the worst tasks of Table 4.

    python scripts/paper/accuracy.py --hub ViT-B/32
    python scripts/paper/accuracy.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--limit 300]

TSV-M and EpiMer at the rank and alpha of the paper's table. The paper's Fisher averaging squares the mean gradient
where EpiMer averages squares, in one place of its text, and takes the same values as EpiMer in another: both are here.
What the paper calls linear probing stands beside our zero-shot heads, the only thing that a base without training has.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark import Benchmark, Comparison, Numbers, benchmark_of, parser, published

from hf_epimer.curvature.request import Gradients
from hf_epimer.tasks.dataset import Sampling

LABELS = {
    "zero-shot": "base, zero-shot",
    "fine-tuned": "fine-tuned models",
    "mean": "mean (AM, TA at 1/T)",
    "ties": "TIES",
    "tsv-m": "TSV-M",
    "fisher": "Fisher averaging",
    "fisher, squared mean": "Fisher, squared mean",
    "epimer": "EpiMer",
}

THEIRS = {"zero-shot": "linear-probing", "fisher, squared mean": "fisher"}
"""Row -> its name in the paper's tables, where that is another."""


def accuracies(benchmark: Benchmark, row: str, rank: int) -> list[float]:
    """Test accuracy on every task."""
    alphas = published()["tables"]["6"]["alpha"][benchmark.backbone]
    if row == "zero-shot":
        return benchmark.zero_shot()
    if row == "fine-tuned":
        return benchmark.fine_tuned()
    if row == "ties":
        return benchmark.accuracies("ties", election="count")
    if row == "fisher, squared mean":
        sampling = Sampling(benchmark.samples, seed=benchmark.seed)
        return benchmark.accuracies("fisher", sampling, Gradients(kind="squared-mean"))
    if row in alphas:
        return benchmark.accuracies(row, rank=rank, alpha=alphas[row])
    return benchmark.accuracies(row)


def theirs(benchmark: Benchmark, row: str) -> Numbers:
    """The paper's accuracy on our tasks, average and worst; where ours are others, only those of its own eight."""
    values = published()["tables"]["6"]["values"][benchmark.backbone][THEIRS.get(row, row)]
    eight = {task: value for task, value in values.items() if task != "average"}
    if not benchmark.has_paper_tasks:
        return [None] * len(benchmark.names) + [values["average"], min(eight.values())]
    reported = [eight.get(name) for name in benchmark.names]
    known = [value for value in reported if value is not None]
    if len(known) < len(reported):
        return [*reported, None, None]
    average = values["average"] if set(benchmark.names) == set(eight) else sum(known) / len(known)
    return [*reported, average, min(known)]


def with_totals(values: Sequence[float]) -> list[float]:
    """The accuracies, their average and the worst."""
    return [*values, sum(values) / len(values), min(values)]


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    benchmark = benchmark_of(options)
    source = "Tables 2, 4 and 6"
    title = f"top-1 accuracy, rank {options.rank}"
    note = "" if benchmark.has_paper_tasks else "Its average and worst task are of its own eight tasks."
    columns = [*benchmark.names, "average", "worst"]
    table = Comparison("Table 6", title, source, columns, benchmark, note=note)
    alphas = published()["tables"]["6"]["alpha"][benchmark.backbone]
    for row, label in LABELS.items():
        label += f", alpha {alphas[row]:g}" if row in alphas else ""
        table.add(label, with_totals(accuracies(benchmark, row, options.rank)), theirs(benchmark, row))
    table.finish(rank=options.rank)


if __name__ == "__main__":
    main()
