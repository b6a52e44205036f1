"""What a command imports: of the libraries, only those that its work needs, and none for words, help and lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
from hf_epimer.cli.main import main
try:
    code = main(sys.argv[2:])
except SystemExit as stop:  # after --help
    code = stop.code
Path(sys.argv[1]).write_text(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""

PRINTING = "import rich.console, rich.markup, rich.table"


def imported(tmp_path: Path, *words: object, **environment: str) -> tuple[int, set[str], str]:
    """A command in a process of its own: its exit code, the top-level modules at its end, what it complains of."""
    file = tmp_path / "modules.json"
    command = [sys.executable, "-c", PROGRAM, str(file), *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment})
    code, modules = json.loads(file.read_text())
    return code, set(modules), done.stderr


@cache
def imported_by(statement: str) -> frozenset[str]:
    """The top-level modules of a process that does this, Python's own among them, and ours."""
    program = f"{statement}\nimport sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return frozenset({name.partition(".")[0] for name in found.split()} | sys.stdlib_module_names | {"hf_epimer"})


@pytest.mark.parametrize(
    "words",
    [
        "nothing",
        "merge",
        "merge org/a org/b --rank 0",
        "merge org/a org/b --metric euclidean",
        "merge org/a org/b --method mean --rank 4",
        "merge org/a org/b --method nothing",
        "merge org/a org/b --samples 0",
        "merge org/a org/b --push-to merged",
        "merge a/b/c",
        "merge --config nothing.json",
        "fisher org/a",
        "evaluate org/a --task dtd --update-card",
        "diagnose",
        "sweep org/a org/b --method nothing",
        "push merged",
    ],
)
def test_wrong_words_are_found_before_anything_is_imported(words: str, tmp_path: Path) -> None:
    code, modules, complaint = imported(tmp_path, *words.split())
    assert code in (1, 2)
    assert complaint.startswith("error: ")
    assert not modules - imported_by("pass")


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "methods",
        "methods --json",
        "tasks",
        *(f"{command} --help" for command in ("merge", "fisher", "evaluate", "diagnose", "sweep", "push", "demo")),
    ],
)
def test_help_and_lists_need_nothing(words: str, tmp_path: Path) -> None:
    code, modules, complaint = imported(tmp_path, *words.split())
    assert (code, complaint) == (0, "")
    assert not modules - imported_by(PRINTING)
