"""The study behind `kronecker-core` and `--calibrate`: one change at a time, several sets, on validation images.

    python scripts/study/core.py --zoo DIR --set mnist flags --set mnist eurosat emoji flags --rows baselines core
    python scripts/study/core.py --report                          # tables of all that was measured

Every measurement is a line of core.jsonl beside this script, and is not repeated. The report compares rows on the same
pictures, each at its own best alpha: average difference to the first row of a table, with the standard error of that
difference; then the alphas that predictions choose (`--tune-alpha`) beside those that are best on these pictures.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import variants
from bench import USUAL, Bench, Hits, Look, Tensors, average, difference, worst
from rich.console import Console

LOG = Path(__file__).with_name("core.jsonl")
ALPHAS = (0.3, 0.5, 0.75, 1.0, 1.25, 1.5)

Make = Callable[[Bench], Tensors]
Row = tuple[str, Make, tuple[float, ...]]
"""Name, how the merge is made, and the alphas at which it is measured."""


def plain(name: str, method: str, alphas: tuple[float, ...], **options: Any) -> Row:
    """A merge as it is."""
    return name, lambda bench: bench.merge(method, options), alphas


def core(change: str, look: Look = USUAL, **options: Any) -> Row:
    """`kronecker-core` with one thing changed."""
    return f"core, {change}", lambda bench: bench.merge("kronecker-core", CORE | options, look), CORE_ALPHAS


def variant(name: str, make: Make) -> Row:
    """Something that the package does not have."""
    return f"core, {name}", make, CORE_ALPHAS


def after(name: str, method: str, options: dict[str, Any]) -> Row:
    """A merge, calibrated."""
    return name, lambda bench: bench.calibrated(bench.merge(method, options)), (1.0,)


def changed(change: str, look: Look = USUAL, **calibration: Any) -> Row:
    """Calibrated `kronecker-core` with one thing changed."""
    return f"calibrated core, {change}", lambda b: b.calibrated(b.merge(*START, look), look, **calibration), (1.0,)


TSV: dict[str, Any] = {"rank": 16}
CORE: dict[str, Any] = {"rank": 16}
START = ("kronecker-core", CORE)
CORE_ALPHAS = (0.5, 0.75, 1.0)


def relinearised(bench: Bench) -> Tensors:
    """`kronecker-core` with curvature taken at the merge it makes the first time."""
    return bench.merge("kronecker-core", CORE, Look(at=bench.merge("epimer-core", CORE)))


def calibrated_at_merge(bench: Bench) -> Tensors:
    """Calibration with curvature taken at the merge that it begins with."""
    start = bench.merge(*START)
    return bench.calibrated(start, Look(at=start))


ROWS: dict[str, list[Row]] = {
    "baselines": [
        plain("mean", "mean", (1.0,)),
        plain("tsv-m", "tsv-m", ALPHAS, **TSV),
        plain("tsv-m, rank max", "tsv-m", (0.75, 1.0)),
        plain("iso-c", "iso-c", (0.75, 1.0, 1.5, 2.0, 3.0)),
        plain("iso-cts", "iso-cts", (0.75, 1.0, 1.5, 2.0, 3.0)),
        plain("epimer", "epimer", (0.5, 0.75, 1.0, 1.25), rank=16),
        plain("regmean", "regmean", (1.0,)),
        plain("regmean, ridge 0.1", "regmean", (1.0,), damping=0.1),
        plain("wudi", "wudi", (0.3, 0.5)),
        plain("wudi, damping 0.1", "wudi", (0.3, 0.5, 0.75, 1.0), damping=0.1),
        plain("wudi, damping 1", "wudi", (0.5, 0.75, 1.0), damping=1.0),
        (*core("rho 1")[:2], (0.5, 0.75, 1.0, 1.25)),
    ],
    "calibrated": [after("calibrated core", "kronecker-core", CORE)],
    "starts": [after("calibrated tsv-m", "tsv-m", TSV), after("calibrated mean", "mean", {})],
    "core": [
        *(core(f"rho {rho:g}", rho=rho) for rho in (0.03, 0.1, 0.3, 3.0)),
        core("rank 8", rank=8),
        core("rank max", rank=96),
        core("scaffold iso-c", scaffold="iso-c"),
        core("S = I", metric="inputs"),
        core("no data", metric="task-vectors"),
        core("sampled labels", Look(labels="sampled")),
        core("sampled labels, temperature 2", Look(labels="sampled", temperature=2.0)),
        variant("re-linearised", relinearised),
        variant("plain bases", variants.plain_bases),
        variant("exact Fisher", variants.exact_core),
        variant("spectrum ^ 0.5", lambda b: variants.flattened(b, b.merge("kronecker-core", CORE), 0.5)),
        variant("flat spectrum", lambda b: variants.flattened(b, b.merge("kronecker-core", CORE), 0.0)),
        variant("calibrated spectrum", lambda b: variants.calibrated_spectrum(b, b.merge("kronecker-core", CORE))),
        variant("vectors by curvature", lambda b: variants.vectors_by_curvature(b, b.merge("kronecker-core", CORE))),
    ],
    "choices": [
        changed("1 view", views=1),
        changed("rho 0.03", rho=0.03),
        changed("rho 0.3", rho=0.3),
        changed("S = I", share=0.0),
        changed("share 0.5", share=0.5),
        changed("share 0.95", share=0.95),
        changed("sampled labels", Look(labels="sampled")),
        changed("sampled labels, temperature 2", Look(labels="sampled", temperature=2.0)),
        ("calibrated core, S at the merge", calibrated_at_merge, (1.0,)),
        ("calibrated core, last norm", lambda b: variants.last_norm(b, b.calibrated(b.merge(*START))), (1.0,)),
    ],
    "samples": [
        *(changed(f"{n} images", Look(n)) for n in (16, 64, 1024)),
        *(changed(f"other images {part}", Look(part=part)) for part in (1, 2)),
    ],
}
"""Groups of rows. `core, rho 1` has rank 16; `calibrated core` 256 images, 4 views, rho 0.1, share 0.8, true labels."""


def run(zoo: Path, tasks: list[str], groups: list[str], limit: int) -> None:
    """Measure what is not in the log yet."""
    console = Console(stderr=True)
    done = {(e["row"], e["alpha"]) for e in entries() if e["zoo"] == zoo.name and e["tasks"] == tasks}
    bench = None
    for name, make, alphas in (row for group in groups for row in ROWS[group]):
        missing = [alpha for alpha in alphas if (name, alpha) not in done]
        if not missing:
            continue
        bench = bench or Bench(zoo, tasks, limit)
        merged = make(bench)
        lines = []
        for alpha in missing:
            scaled = bench.scaled(merged, alpha)
            hits, (apart, loss) = bench.measure(scaled), bench.losses(scaled)
            right = {task: "".join("01"[int(hit)] for hit in of_task) for task, of_task in hits.items()}
            line = {"zoo": zoo.name, "tasks": tasks, "row": name, "alpha": alpha, "apart": apart, "loss": loss}
            lines.append(line | {"right": right})
            console.print(f"{' '.join(tasks)}: {name}, alpha {alpha:g}: {average(hits):.3f} ({worst(hits):.3f})")
        with LOG.open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)


def entries() -> Iterator[dict[str, Any]]:
    """Every measurement so far."""
    if LOG.is_file():
        yield from map(json.loads, LOG.read_text(encoding="utf-8").splitlines())


Measured = dict[str, dict[str, dict[float, tuple[Hits, float]]]]
"""Set -> row -> alpha -> which pictures are right, and how far predictions are from the fine-tuned models'."""


def measured() -> Measured:
    """The log, by set."""
    by_set: Measured = {}
    for entry in entries():
        hits = {task: torch.tensor([mark == "1" for mark in marks]) for task, marks in entry["right"].items()}
        rows = by_set.setdefault(f"{entry['zoo']}: {' '.join(entry['tasks'])}", {})
        rows.setdefault(entry["row"], {})[entry["alpha"]] = hits, entry["apart"]
    return by_set


def report() -> None:
    """Markdown: every group of rows at their own best alphas, against another row; then what predictions choose."""
    by_set = measured()
    console = Console(soft_wrap=True, highlight=False)
    against = {"baselines": "tsv-m", "calibrated": "tsv-m", "core": "core, rho 1"}
    for group, rows in ROWS.items():
        names = [against.get(group, "calibrated core"), *(name for name, *_ in rows)]
        if any(name in rows for rows in by_set.values() for name in names[1:]):
            console.print(_table(by_set, list(dict.fromkeys(names))), "", sep="\n", markup=False)
    console.print(_chosen_table(by_set), markup=False)


def _table(by_set: Measured, names: list[str]) -> str:
    """Rows x sets: average (worst), alpha, and the difference to the first row on the same pictures."""
    sets = [where for where, rows in by_set.items() if any(name in rows for name in names[1:])]
    lines = [f"| | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for name in (name for name in names if any(name in by_set[where] for where in sets)):
        cells = []
        for where in sets:
            rows = by_set[where]
            if name not in rows:
                cells.append("")
                continue
            alpha, best = _best(rows[name])
            cells.append(f"{average(best):.3f} ({worst(best):.3f})" + (f" at {alpha:g}" if len(rows[name]) > 1 else ""))
            if name != names[0] and names[0] in rows:
                apart, error = difference(best, _best(rows[names[0]])[1])
                cells[-1] += f", {apart:+.3f} ± {error:.3f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _chosen_table(by_set: Measured) -> str:
    """Methods x sets: alpha by predictions, and the difference to the alpha that is best on these very pictures."""
    names = dict.fromkeys(name for rows in by_set.values() for name, by_alpha in rows.items() if len(by_alpha) > 2)
    lines = [f"| | {' | '.join(by_set)} |", "|---" * (len(by_set) + 1) + "|"]
    for name in names:
        cells = []
        for rows in by_set.values():
            by_alpha = rows.get(name, {})
            if len(by_alpha) < 3:
                cells.append("")
                continue
            chosen = min(by_alpha, key=lambda alpha: by_alpha[alpha][1])
            alpha, best = _best(by_alpha)
            apart, error = difference(by_alpha[chosen][0], best)
            cells.append(f"{chosen:g}" if chosen == alpha else f"{chosen:g} for {alpha:g}, {apart:+.3f} ± {error:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(row: dict[float, tuple[Hits, float]]) -> tuple[float, Hits]:
    alpha = max(row, key=lambda alpha: average(row[alpha][0]))
    return alpha, row[alpha][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar="TASK", dest="sets")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["baselines", "calibrated"])
    parser.add_argument("--limit", type=int, default=200, help="validation images a task")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for tasks in options.sets:
        run(options.zoo, tasks, options.rows, options.limit)
    if options.report:
        report()


if __name__ == "__main__":
    main()
