"""Losses on the plane of the fine-tuned models, with base and merges marked: the paper's Figure 4.

    python scripts/paper/loss_landscape.py --hub ViT-B/16 --tasks dtd eurosat gtsrb sun397
    python scripts/paper/loss_landscape.py --zoo DIR [--tasks mnist flags ...] [--rank 16] [--steps 11] [--limit 128]

The picture and every number are in OUT/landscape; the table has what a picture cannot show, how far from the plane the
models are and what they lose themselves. The paper draws four tasks of ViT-B/16 and prints no number; its plane is that
of all eight models. --limit is the number of test images a task whose loss is averaged, 256 by default.
"""

from __future__ import annotations

from benchmark import Comparison, benchmark_of, parser, published
from pictures import say_missing

from hf_epimer import METHODS, ModelRef, landscape, merge


def main() -> None:
    flags = parser(__doc__ or "")
    flags.add_argument("--steps", type=int, default=15, help="of the grid, in each direction")
    flags.add_argument("--merges", nargs="+", choices=list(METHODS), default=["mean", "tsv-m", "epimer"])
    options = flags.parse_args()
    benchmark = benchmark_of(options)
    merged = []
    for method in options.merges:
        changed = {"rank": options.rank} if "rank" in METHODS[method].options else {}
        folder = merge(benchmark.recipe(method, changed, str(benchmark.out / f"merged-{method}"))).out
        merged.append(ModelRef.parse(f"{method}={folder}"))
    recipe, samples = benchmark.recipe("mean", {}, "landscape"), options.limit or 256
    measured = landscape(recipe, merged, str(benchmark.out / "landscape"), steps=options.steps, samples=samples)
    columns = [*measured.losses, "mean", "from the plane"]
    source = published()["figures"]["4"]["source"]
    title = f"loss (nats) of every model itself, rank {options.rank}"
    table = Comparison("Figure 4", title, source, columns, benchmark)
    for name, losses in measured.models.items():
        values = [losses[task] for task in measured.losses]
        table.add(name, [*values, sum(values) / len(values), measured.plane.outside[name]])
    rows = zip(*measured.losses.values())
    lowest = min(sum(cell) / len(cell) for row in rows for cell in zip(*row))
    table.note = (
        f"The plane has {measured.plane.explained:.0%} of the models' spread; lowest mean loss on it {lowest:.3f}."
    )
    pictures = [f"landscape/{name}" for name in measured.pictures]
    table.finish(rank=options.rank, explained=measured.plane.explained, lowest=lowest, pictures=pictures)
    if not pictures:
        say_missing()


if __name__ == "__main__":
    main()
