"""Accuracy of the worst task: the paper's Table 4. Merges that accuracy.py has measured are not measured again.

python scripts/paper/worst_task.py --hub ViT-B/32
python scripts/paper/worst_task.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--limit 300]
"""

from __future__ import annotations

from accuracy import LABELS, accuracies, theirs
from benchmark import Comparison, benchmark_of, parser, published

ROWS = ("mean", "ties", "fisher", "tsv-m", "epimer")


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    benchmark = benchmark_of(options)
    source = published()["tables"]["4"]["source"]
    note = "" if benchmark.has_paper_tasks else "Its worst task is of its own eight tasks."
    title = f"top-1 accuracy of the worst task, rank {options.rank}"
    table = Comparison("Table 4", title, source, ["worst"], benchmark, note=note)
    for row in ROWS:
        table.add(LABELS[row], [min(accuracies(benchmark, row, options.rank))], theirs(benchmark, row)[-1:])
    table.finish(rank=options.rank)


if __name__ == "__main__":
    main()
