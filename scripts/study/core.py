"""The study behind `epimer-core` and `--calibrate`: one change at a time, several sets of tasks, on validation images.

    python scripts/study/core.py --zoo DIR --set mnist flags --set mnist eurosat emoji flags --rows baselines core
    python scripts/study/core.py --report                          # tables of all that was measured

Every measurement is a line of core.jsonl beside this script, and is not repeated. The report compares rows on the same
pictures: average difference to TSV-M at its own best alpha, with the standard error of that difference.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Hits, Tensors, average, difference, worst
from rich.console import Console

from hf_epimer.commands.terminal import silence_libraries

LOG = Path(__file__).with_name("core.jsonl")
ALPHAS = (0.3, 0.5, 0.75, 1.0, 1.25, 1.5)
FEW = (0.5, 0.75, 1.0, 1.25)

Make = Callable[[Bench], Tensors]
Row = tuple[str, Make, tuple[float, ...]]
"""Name, how the merge is made, and the alphas at which it is measured."""


def plain(name: str, method: str, alphas: tuple[float, ...] = FEW, **options: Any) -> Row:
    """A merge as it is."""
    return name, lambda bench: bench.merge(method, options), alphas


def after(name: str, method: str, options: dict[str, Any], **calibration: Any) -> Row:
    """A merge, calibrated."""
    return name, lambda bench: bench.calibrated(bench.merge(method, options), **calibration), (1.0,)


TSV: dict[str, Any] = {"rank": 16}

ROWS: dict[str, list[Row]] = {
    "baselines": [
        plain("mean", "mean", (1.0,)),
        plain("tsv-m", "tsv-m", ALPHAS, **TSV),
        plain("tsv-m, rank max", "tsv-m", ALPHAS),
        plain("iso-c", "iso-c", ALPHAS),
        plain("iso-cts", "iso-cts", ALPHAS),
        plain("epimer", "epimer", ALPHAS, rank=16),
        plain("regmean", "regmean", (1.0,)),
        plain("regmean, ridge 0.1", "regmean", (1.0,), damping=0.1),
        plain("wudi", "wudi", FEW),
        plain("wudi, damping 0.1", "wudi", FEW, damping=0.1),
        plain("wudi, damping 1", "wudi", FEW, damping=1.0),
    ],
    "core": [
        *(plain(f"core, rho {rho:g}", "epimer-core", rank=16, rho=rho) for rho in (0.03, 0.3, 1.0, 3.0)),
        plain("core, rank 8", "epimer-core", rank=8),
        plain("core, rank 48", "epimer-core", rank=48),
        plain("core, scaffold iso-c", "epimer-core", rank=16, scaffold="iso-c"),
        plain("core, S = I", "epimer-core", rank=16, metric="inputs"),
        plain("core, no data", "epimer-core", rank=16, metric="task-vectors"),
    ],
    "calibrated": [
        after("calibrated tsv-m", "tsv-m", TSV),
        after("calibrated core", "epimer-core", {"rank": 16}),
        after("calibrated mean", "mean", {}),
    ],
    "choices": [
        after("calibrated tsv-m, rho 0.03", "tsv-m", TSV, rho=0.03),
        after("calibrated tsv-m, rho 0.3", "tsv-m", TSV, rho=0.3),
        after("calibrated tsv-m, S = I", "tsv-m", TSV, share=0.0),
        after("calibrated tsv-m, share 0.5", "tsv-m", TSV, share=0.5),
        after("calibrated tsv-m, share 0.95", "tsv-m", TSV, share=0.95),
        after("calibrated tsv-m, sampled labels", "tsv-m", TSV, labels="sampled"),
    ],
    "samples": [
        *(after(f"calibrated tsv-m, {n} images", "tsv-m", TSV, samples=n) for n in (16, 64, 1024)),
        *(after(f"calibrated tsv-m, seed {s}", "tsv-m", TSV, seed=s) for s in (1, 2)),
    ],
}
"""Groups of rows. `calibrated tsv-m` has 256 images, rho 0.1, share 0.8, true labels, seed 0."""


def run(zoo: Path, tasks: list[str], groups: list[str], limit: int) -> None:
    """Measure what is not in the log yet."""
    console = Console(stderr=True)
    done = {(e["zoo"], tuple(e["tasks"]), e["row"]) for e in entries()}
    bench = None
    for name, make, alphas in (row for group in groups for row in ROWS[group]):
        if (zoo.name, tuple(tasks), name) in done:
            continue
        bench = bench or Bench(zoo, tasks, limit)
        merged = make(bench)
        lines = []
        for alpha in alphas:
            found = bench.measure(bench.scaled(merged, alpha))
            right = {task: "".join("01"[int(hit)] for hit in own) for task, own in found.items()}
            lines.append({"zoo": zoo.name, "tasks": tasks, "row": name, "alpha": alpha, "right": right})
            console.print(f"{' '.join(tasks)}: {name}, alpha {alpha:g}: {average(found):.3f} ({worst(found):.3f})")
        with LOG.open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)


def entries() -> Iterator[dict[str, Any]]:
    """Every measurement so far."""
    if LOG.is_file():
        yield from map(json.loads, LOG.read_text(encoding="utf-8").splitlines())


def report() -> None:
    """One Markdown table: rows x sets, each row at its own best alpha."""
    best: dict[str, dict[str, tuple[Hits, float]]] = {}
    for entry in entries():
        where = f"{entry['zoo']}: {' '.join(entry['tasks'])}"
        found = {task: torch.tensor([hit == "1" for hit in own]) for task, own in entry["right"].items()}
        held = best.setdefault(entry["row"], {}).get(where)
        if held is None or average(found) > average(held[0]):
            best[entry["row"]][where] = found, entry["alpha"]
    sets = list(dict.fromkeys(where for row in best.values() for where in row))
    lines = [f"| | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for row, found in best.items():
        cells = []
        for where in sets:
            if where not in found:
                cells.append("")
                continue
            own, alpha = found[where]
            apart, error = difference(own, best["tsv-m"][where][0]) if where in best["tsv-m"] else (0.0, 0.0)
            cells.append(f"{average(own):.3f} ({worst(own):.3f}) at {alpha:g}, {apart:+.3f} ± {error:.3f}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    Console(soft_wrap=True, highlight=False).print("\n".join(lines), markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--set", nargs="+", action="append", default=[], metavar="TASK", dest="sets")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["baselines", "calibrated"])
    parser.add_argument("--limit", type=int, default=200, help="validation images a task")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    silence_libraries()
    for tasks in options.sets:
        run(options.zoo, tasks, options.rows, options.limit)
    if options.report:
        report()


if __name__ == "__main__":
    main()
