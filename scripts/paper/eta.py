"""Curvature heterogeneity beside EpiMer's margin over TSV-M, by rank: the paper's Figure 2.

    python scripts/paper/eta.py --hub ViT-B/32
    python scripts/paper/eta.py --zoo DIR [--tasks mnist flags ...] [--rank 4 16 32] [--alphas 0.5 1] [--limit 300]

eta is that of `hf-epimer diagnose`, every metric divided by its trace, summed over layers; the margin is the difference
of the averages in percentage points, each method at its best alpha, as in the paper found on the test images. Merges
that alpha.py has measured are not measured again. The paper draws eta and prints no value of it. Drawn as figure-2.png.
"""

from __future__ import annotations

from alpha import alpha_parser, averages
from benchmark import Comparison, Numbers, benchmark_of, published
from pictures import heterogeneity_and_margin, write

from hf_epimer import diagnose


def main() -> None:
    options = alpha_parser(__doc__ or "").parse_args()
    benchmark = benchmark_of(options)
    ranks = sorted(options.rank)
    recipe = benchmark.recipe("epimer", {}, str(benchmark.out / "merged"))
    diagnosis = diagnose(recipe, ranks, str(benchmark.out / "diagnosis"), estimate=True)
    # all of them: it is estimated where it is missing
    known = [total.curvature for total in diagnosis.totals if total.curvature]
    eta, share = [curvature.eta_trace for curvature in known], [curvature.share_trace for curvature in known]
    part = benchmark.has_paper_tasks and len(benchmark.names) < 8
    printed = published()["figures"]["2"]
    margins = {} if part else printed["values"][benchmark.backbone]
    best = {
        method: [max(averages(benchmark, method, rank, options.alphas)) for rank in ranks]
        for method in ("tsv-m", "epimer")
    }
    columns = [f"rank {rank}" for rank in ranks]
    table = Comparison("Figure 2", "heterogeneity and margin", printed["source"], columns, benchmark, digits=4)
    table.add("eta, metrics of trace 1", eta)
    table.add("its share of the spread", share)
    ours = [100 * (epimer - flat) for epimer, flat in zip(best["epimer"], best["tsv-m"])]
    theirs = [margins.get(str(rank)) for rank in ranks]
    table.add("EpiMer - TSV-M (points)", ours, theirs)
    table.finish(ranks=ranks, alphas=options.alphas, best=best, verdict=list(diagnosis.verdict))
    drawn: dict[str, Numbers] = {table.ours: ours}
    if any(value is not None for value in theirs):
        drawn[f"{table.paper}, {benchmark.backbone}, its eight tasks"] = theirs
    write(table.file.with_suffix(".png"), lambda: heterogeneity_and_margin(ranks, eta, share, drawn))


if __name__ == "__main__":
    main()
