"""What a command imports: of the libraries, only those that its work needs, and none for words, help and lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from helpers.hub_server import WRITER, StandInHub

PROGRAM = """
import json, sys
from pathlib import Path
from hf_epimer.cli.main import main
try:
    code = main(sys.argv[2:])
except SystemExit as stop:  # after --help
    code = stop.code
Path(sys.argv[1]).write_text(json.dumps([code, sorted(sys.modules)]))
"""

PRINTING = "import rich.console, rich.markup, rich.table"
MERGING = f"{PRINTING}, torch, safetensors.torch, yaml, jinja2; from huggingface_hub.utils import build_hf_headers"
PUSHING = f"{MERGING}; from huggingface_hub import HfApi"


def imported(tmp_path: Path, *words: object, **environment: str) -> tuple[int, set[str], str]:
    """A command in a process of its own: its exit code, the modules at its end, what it complains of."""
    file = tmp_path / "modules.json"
    command = [sys.executable, "-c", PROGRAM, str(file), *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **environment})
    code, modules = json.loads(file.read_text())
    return code, set(modules), done.stderr


def libraries(modules: set[str], beside: str) -> set[str]:
    """The libraries among modules, without Python's own, ours, and those that a process loads which does `beside`."""
    return {name.partition(".")[0] for name in modules} - {"hf_epimer"} - sys.stdlib_module_names - _loaded_by(beside)


@cache
def _loaded_by(statement: str) -> frozenset[str]:
    program = f"{statement}\nimport sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return frozenset(name.partition(".")[0] for name in found.split())


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["merge", "dry-run"])
def test_a_merge_without_data_needs_little_but_torch(more: tuple[str, ...], tiny_zoo: Path, tmp_path: Path) -> None:
    models = (tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", "merged")
    code, modules, complaint = imported(tmp_path, "merge", *models, "--method", "mean", *more)
    assert (code, complaint) == (0, "")
    assert {"torch", "safetensors"} <= modules
    assert "huggingface_hub.hf_api" not in modules  # nor the client
    assert libraries(modules, MERGING) == set()
    assert (tmp_path / "merged" / "README.md").is_file() is not bool(more)


@pytest.mark.slow
def test_a_push_needs_the_hubs_client_and_no_more_than_a_merge(
    empty_hub: StandInHub, tiny_zoo: Path, tmp_path: Path
) -> None:
    models = (tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", "merged")
    assert imported(tmp_path, "merge", *models, "--method", "mean")[0] == 0
    environment = {"HF_ENDPOINT": empty_hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "home")}
    code, modules, complaint = imported(tmp_path, "push", "merged", "org/merged", **environment)
    assert (code, complaint) == (0, "")
    assert libraries(modules, PUSHING) == set()


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
    assert libraries(modules, "pass") == set()


@pytest.mark.slow
def test_what_only_a_plan_can_refuse_needs_no_more_than_a_plan(tiny_zoo: Path, tmp_path: Path) -> None:
    models = (tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base")
    code, modules, complaint = imported(tmp_path, "merge", *models, "--method", "mean", "--out-rank", 4)
    assert code == 2
    assert "--out-rank" in complaint
    assert libraries(modules, MERGING) == set()


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
    assert libraries(modules, PRINTING) == set()
