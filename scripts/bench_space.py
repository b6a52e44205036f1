"""How fast the page opens and how much memory it takes when nobody does anything: `python scripts/bench_space.py`.

The demo zoo must be there (`hf-epimer demo`). Seconds are from the start of the process to the first answer with the
whole page, beside those for which a processor worked on it: on a machine with other work the second number counts.
Memory is of the page and of the server that its work is forked from, after that has imported everything. A page of
memory that both have is counted once in the proportional figure (PSS) and twice in the resident one (RSS).
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

from hf_epimer import zoo_folder


def main() -> None:
    """Start it a few times and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--settle", type=float, default=20, help="seconds until memory is read")
    arguments = parser.parse_args()
    if not (zoo_folder() / "zoo.json").is_file():
        sys.exit("the demo zoo is not there: run hf-epimer demo first")
    seconds = [measure(arguments.settle) for _ in range(arguments.runs)]
    print(f"median of {arguments.runs}: {median(seconds):.1f} s")


def measure(settle: float) -> float:
    """One start; prints it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port)}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_epimer", "demo", "--web"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).close()
                break
            except OSError:
                time.sleep(0.05)
        seconds = time.monotonic() - started
        worked = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        time.sleep(settle)
        everyone = family(process.pid)
        rss, pss = (sum(memory(member, field) for member in everyone) / 2**20 for field in ("Rss:", "Pss:"))
        print(f"open after {seconds:.1f} s, {worked / os.sysconf('SC_CLK_TCK'):.1f} s of it at work; ", end="")
        print(f"{len(everyone)} processes, {rss:.0f} MiB resident, {pss:.0f} MiB proportional", flush=True)
        return seconds
    finally:
        process.terminate()
        process.wait()


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile
            continue
    members = [root]
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def memory(process: int, field: str) -> int:
    """Bytes of a process."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
