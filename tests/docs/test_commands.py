"""Every command in README.md and docs/ is run, page by page and in its order; every Python block's imports are made."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.docs_hub import fill
from helpers.hub_server import StandInHub
from hf_epimer import merge_state_dicts
from hf_epimer.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TAKEN_AT_THEIR_WORD = ("add-an-architecture", "gpu", "training")
"""Pages whose commands a test of their own runs."""

ELSEWHERE = ("git ", "cd ", "make ", "pip ", "hf-epimer demo", "hf jobs ", "hf extensions ", "hf epimer ", "uv run ")
"""Commands that the test command itself runs (make, pip), or a test of its own (demo, job, extension)."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


ONE_AFTER_THE_OTHER = """
import json, shlex, subprocess, sys
from hf_epimer.cli.main import main
for command in json.load(sys.stdin):
    print(f"$ {command}", file=sys.stderr, flush=True)
    words = shlex.split(command, comments=True)
    code = main(words[1:]) if words[0] == "hf-epimer" else subprocess.run(command, shell=True).returncode
    if code:
        sys.exit(f"failed: {command}")
"""
"""One interpreter for a page: a new one for every command would spend most of its time on imports."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if commands(page) and page.stem not in TAKEN_AT_THEIR_WORD],
    ids=lambda page: page.stem,
)
def test_every_command_works(page: Path, empty_hub: StandInHub, tmp_path: Path) -> None:
    fill(empty_hub, tmp_path / "made")
    chosen = [command for command in commands(page) if not command.startswith(ELSEWHERE)]
    environment = os.environ | {
        "HF_ENDPOINT": empty_hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-c", ONE_AFTER_THE_OTHER]
    done = subprocess.run(
        words, input=json.dumps(chosen), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or not chosen


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_every_import_works(page: Path) -> None:
    for block in blocks(page, "python"):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


def test_every_link_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_method_of_the_page_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/add-a-method.md to the letter: the example in the table, merged as every method is."""
    names: dict[str, Any] = {"__name__": "median"}
    monkeypatch.setitem(sys.modules, "median", ModuleType("median"))
    exec(blocks(ROOT / "docs" / "add-a-method.md", "python")[0], names)
    monkeypatch.setitem(METHODS, "median", names["MEDIAN"])
    base = {"w": torch.zeros(2, 2)}
    tuned = [{"w": torch.full((2, 2), value)} for value in (1.0, 2.0, 9.0)]
    merged = merge_state_dicts(base, tuned, "median", names["MedianConfig"](alpha=0.5))
    assert torch.equal(merged["w"], torch.ones(2, 2))
