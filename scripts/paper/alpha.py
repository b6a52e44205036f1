"""Average accuracy at every alpha and rank, TSV-M and EpiMer: the paper's Tables 3 and 7 to 9.

    python scripts/paper/alpha.py --hub ViT-B/32
    python scripts/paper/alpha.py --zoo DIR [--tasks mnist flags ...] [--rank 4 16] [--alphas 0.5 1] [--limit 300]

As in the paper, alpha is looked at on the test images: a best one is no estimate of what it does on others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmark import Benchmark, Comparison, Numbers, benchmark_of, parser, published

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
METHODS = {"tsv-m": "TSV-M", "epimer": "EpiMer"}
TABLES = {"ViT-B/32": "7", "ViT-B/16": "8", "ViT-L/14": "9"}


def averages(benchmark: Benchmark, method: str, rank: int, alphas: Sequence[float]) -> list[float]:
    """Average accuracy over the tasks at every alpha."""
    rows = [benchmark.accuracies(method, rank=rank, alpha=alpha) for alpha in alphas]
    return [sum(row) / len(row) for row in rows]


def theirs(benchmark: Benchmark, method: str, rank: int, alphas: Sequence[float]) -> Numbers:
    """The paper's averages over its eight tasks; none where ours are a part of them."""
    table = published()["tables"][TABLES[benchmark.backbone]]
    part = benchmark.has_paper_tasks and len(benchmark.names) < 8
    known = {} if part else dict(zip(table["alphas"], table["values"][method].get(str(rank), ())))
    return [known.get(alpha) for alpha in alphas]


def alpha_parser(text: str) -> argparse.ArgumentParser:
    """The flags of scripts that look at several ranks and alphas."""
    arguments = parser(text, ranks=(4, 16, 32))
    arguments.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS), metavar="A")
    return arguments


def main() -> None:
    options = alpha_parser(__doc__ or "").parse_args()
    benchmark = benchmark_of(options)
    number = TABLES[benchmark.backbone]
    source = f"{published()['tables'][number]['source']}; its rank 32 is Table 3"
    columns = [f"alpha {alpha:g}" for alpha in options.alphas]
    note = "" if benchmark.has_paper_tasks else "Its averages are over its own eight tasks."
    table = Comparison(f"Table {number}", "average top-1 accuracy", source, columns, benchmark, note=note)
    for rank in options.rank:
        for method, label in METHODS.items():
            ours = averages(benchmark, method, rank, options.alphas)
            table.add(f"{label}, rank {rank}", ours, theirs(benchmark, method, rank, options.alphas))
    table.finish(ranks=options.rank, alphas=options.alphas)


if __name__ == "__main__":
    main()
