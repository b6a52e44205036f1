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
import variants
from bench import USUAL, Bench, Hits, Look, Tensors, average, difference, worst
from rich.console import Console

from hf_epimer.commands.terminal import silence_libraries

LOG = Path(__file__).with_name("core.jsonl")
ALPHAS = (0.3, 0.5, 0.75, 1.0, 1.25, 1.5)

Make = Callable[[Bench], Tensors]
Row = tuple[str, Make, tuple[float, ...]]
"""Name, how the merge is made, and the alphas at which it is measured."""


def plain(name: str, method: str, alphas: tuple[float, ...], **options: Any) -> Row:
    """A merge as it is."""
    return name, lambda bench: bench.merge(method, options), alphas


def core(change: str, look: Look = USUAL, **options: Any) -> Row:
    """`epimer-core` with one thing changed."""
    return f"core, {change}", lambda bench: bench.merge("epimer-core", CORE | options, look), CORE_ALPHAS


def variant(name: str, make: Make) -> Row:
    """Something that the package does not have."""
    return f"core, {name}", make, CORE_ALPHAS


def after(name: str, method: str, options: dict[str, Any]) -> Row:
    """A merge, calibrated."""
    return name, lambda bench: bench.calibrated(bench.merge(method, options)), (1.0,)


def changed(change: str, look: Look = USUAL, **calibration: Any) -> Row:
    """Calibrated `epimer-core` with one thing changed."""
    return f"calibrated core, {change}", lambda b: b.calibrated(b.merge(*START, look), look, **calibration), (1.0,)


TSV: dict[str, Any] = {"rank": 16}
CORE: dict[str, Any] = {"rank": 16}
START = ("epimer-core", CORE)
CORE_ALPHAS = (0.5, 0.75, 1.0)


def relinearised(bench: Bench) -> Tensors:
    """`epimer-core` with curvature taken at the merge it makes the first time."""
    return bench.merge("epimer-core", CORE, Look(at=bench.merge("epimer-core", CORE)))


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
    "calibrated": [after("calibrated core", "epimer-core", CORE)],
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
        variant("spectrum ^ 0.5", lambda b: variants.flattened(b, b.merge("epimer-core", CORE), 0.5)),
        variant("flat spectrum", lambda b: variants.flattened(b, b.merge("epimer-core", CORE), 0.0)),
        variant("calibrated spectrum", lambda b: variants.calibrated_spectrum(b, b.merge("epimer-core", CORE))),
        variant("vectors by curvature", lambda b: variants.vectors_by_curvature(b, b.merge("epimer-core", CORE))),
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
            found, (apart, loss) = bench.measure(scaled), bench.losses(scaled)
            right = {task: "".join("01"[int(hit)] for hit in own) for task, own in found.items()}
            line = {"zoo": zoo.name, "tasks": tasks, "row": name, "alpha": alpha, "apart": apart, "loss": loss}
            lines.append(line | {"right": right})
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
