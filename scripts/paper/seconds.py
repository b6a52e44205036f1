"""Seconds of a merge: the paper's Table 10.

    python scripts/paper/seconds.py --hub ViT-B/32
    python scripts/paper/seconds.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--runs 4]

Ours is reading, merging and writing, in this process, with Fisher information that is there already (the first merge
estimates what is missing and is not counted), median of --runs. The paper's is another program on another machine, with
compilation: the second column, each against TSV-M of its own row, is what can be compared. bench_merge.py times whole
processes.
"""

from __future__ import annotations

import platform
from statistics import median

import torch
from benchmark import Comparison, benchmark_of, parser, published

from hf_epimer import METHODS, merge

ROWS = {"mean": "mean", "ties": "TIES", "fisher": "Fisher averaging", "tsv-m": "TSV-M", "epimer": "EpiMer"}


def main() -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--runs", type=int, default=4)
    options = flags.parse_args()
    benchmark = benchmark_of(options)
    printed = published()["tables"]["10"]
    runs = {}
    for method in ROWS:
        changed = {"rank": options.rank} if "rank" in METHODS[method].options else {}
        recipe = benchmark.recipe(method, changed, str(benchmark.out / "merged"))
        runs[method] = [merge(recipe).seconds["merging"] for _ in range(options.runs + 1)][1:]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    title = f"seconds of a merge of {len(benchmark.names)}, rank {options.rank}, {machine}"
    table = Comparison(
        "Table 10", title, printed["source"], ["seconds", "against TSV-M"], benchmark,
        comparable=False, paper="paper, RTX 3090 Ti", note=f"It is {printed['what']}.",
    )  # fmt: skip
    theirs = printed["values"][benchmark.backbone]
    ours = {method: median(values) for method, values in runs.items()}
    for method, label in ROWS.items():
        table.add(
            label,
            [ours[method], ours[method] / ours["tsv-m"]],
            [theirs[method], theirs[method] / theirs["tsv-m"]],
        )
    table.finish(rank=options.rank, runs=runs, machine=machine)


if __name__ == "__main__":
    main()
