"""Accuracy of EpiMer against how much data its Fisher information saw, and how that was stored: the paper's Figure 3.

    python scripts/paper/samples.py --hub ViT-B/32
    python scripts/paper/samples.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--seeds 0 1 2] [--limit 300]

One row per share of the training split, averaged over seeds of which samples are taken; then --samples samples, and the
same in bfloat16 and rank-1 files. The paper takes whole batches of 64 from one shuffle; here the share is exact. Drawn
as figure-3.png.
"""

from __future__ import annotations

from accuracy import theirs
from benchmark import Comparison, benchmark_of, parser, published
from pictures import accuracy_by_share, write

from hf_epimer.curvature.files import Compression
from hf_epimer.tasks.dataset import Sampling


def main() -> None:
    flags = parser(__doc__ or "")
    printed = published()["figures"]["3"]
    flags.add_argument("--fractions", nargs="+", type=float, default=printed["fractions"], metavar="F")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = flags.parse_args()
    benchmark = benchmark_of(options)
    ways: dict[str, tuple[int | None, float | None, Compression | None]] = {
        f"{fraction:.1%} of the data": (None, fraction, None) for fraction in options.fractions
    }
    ways[f"{options.samples} samples"] = (options.samples, None, None)
    ways[f"{options.samples} samples, bf16"] = (options.samples, None, "bf16")
    ways[f"{options.samples} samples, rank1"] = (options.samples, None, "rank1")
    columns = ["average", "worst", "lowest average", "highest average"]
    title = f"top-1 accuracy of EpiMer, rank {options.rank}, alpha {printed['alpha']:g}"
    table = Comparison("Figure 3", title, printed["source"], columns, benchmark)
    everything = {}
    averages = {}
    for way, (samples, fraction, compress) in ways.items():
        seeds = options.seeds[:1] if fraction == 1 else options.seeds
        rows = [
            benchmark.accuracies(
                "epimer",
                Sampling(samples, fraction, seed=seed),
                compress=compress,
                rank=options.rank,
                alpha=printed["alpha"],
            )
            for seed in seeds
        ]
        means = averages[way] = [sum(row) / len(row) for row in rows]
        ours = [sum(means) / len(rows), sum(map(min, rows)) / len(rows), min(means), max(means)]
        table.add(way, ours, [*theirs(benchmark, "epimer")[-2:], None, None] if fraction == 1 else ())
        everything[way] = dict(zip(map(str, seeds), rows))
    table.finish(rank=options.rank, accuracies=everything)
    by_share = {fraction: averages[way] for way, (_, fraction, _) in ways.items() if fraction}
    stored: dict[str, list[float]] = {
        compress or "float32": averages[way] for way, (samples, _, compress) in ways.items() if samples
    }
    average = theirs(benchmark, "epimer")[-2]
    paper = {}
    if benchmark.has_paper_tasks and average is not None:
        paper[f"{table.paper}, rank {printed['rank']}"] = average
    write(
        table.file.with_suffix(".png"), lambda: accuracy_by_share(by_share, stored, options.samples, table.ours, paper)
    )


if __name__ == "__main__":
    main()
