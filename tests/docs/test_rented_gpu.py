"""docs/gpu.md: the script for a job and the notebook, both on the demo zoo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_epimer
from hf_epimer import ZOO_TASKS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "jobs" / "calibrate.py"
NOTEBOOK = ROOT / "docs" / "notebooks" / "merge.ipynb"


def run_on_the_zoo(home: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder of its own, offline, with the package of this checkout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)


def test_uv_finds_what_the_script_needs() -> None:
    lines = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT.read_text(encoding="utf-8"), flags=re.M)
    needs = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in lines[0].splitlines(True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needs["requires-python"] == project["requires-python"]
    assert needs["dependencies"] == [f"hf-epimer[plots]>={hf_epimer.__version__.rpartition('.')[0]}"]
    assert "plots" in project["optional-dependencies"]


@pytest.mark.slow
def test_the_script_calibrates_measures_and_takes_the_words_of_merge(space_home: Path, tmp_path: Path) -> None:
    zoo = space_home / "hf-epimer" / "demo-zoo-1"
    models = [f"{name}={zoo / name}" for name in ZOO_TASKS[:2]]
    tasks = [str(zoo / "tasks" / f"{name}.yaml") for name in ZOO_TASKS[:2]]
    more = ["--base", str(zoo / "base"), "--task", *tasks, "--samples", "16", "--limit", "8", "--out", "rented"]
    done = run_on_the_zoo(space_home, tmp_path, str(SCRIPT), *models, *more)
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "rented" / "merge_config.json").read_text())
    assert (recipe["method"], recipe["calibrate"], recipe["samples"]) == ("epimer-core", True, 16)
    rows = json.loads((tmp_path / "rented" / "results.json").read_text())["tasks"]
    assert all({"base", "accuracy", "fine_tuned"} <= set(row) for row in rows.values())


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(space_home: Path, tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell.startswith("%")] == ["%pip install -q 'hf-epimer[plots]'"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    (tmp_path / "cells.py").write_text("\n".join(cell for cell in cells if not cell.startswith("%")))
    done = run_on_the_zoo(space_home, tmp_path, "cells.py")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:4]] == list(ZOO_TASKS)
    assert done.stdout.splitlines()[4].endswith(" parameters")
