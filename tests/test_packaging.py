"""What PyPI would get: built from a source archive, as `make dist` does; and that all places name the same version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_epimer

ROOT = Path(__file__).parents[1]
PACKAGES = ("hf_epimer", "spaces_app")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, and the wheel that is built from it alone."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(words, check=True, capture_output=True, text=True)
    return folder


@pytest.mark.slow
def test_the_wheel_has_the_package_and_the_page_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = f"hf_epimer-{hf_epimer.__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{record}/METADATA").decode())
        entry_points = archive.read(f"{record}/entry_points.txt").decode()
    written = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    about = {f"{record}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == written | about
    assert {"hf_epimer/py.typed", "hf_epimer/pipeline/card_template.md", "hf_epimer/tasks/benchmarks.json"} < names
    assert "hf-epimer = hf_epimer.cli.main:console" in entry_points
    assert metadata["Name"] == "hf-epimer" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == project()["requires-python"]


@pytest.mark.slow
def test_the_wheel_merges_by_itself(dist: Path, tiny_zoo: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import hf_epimer, sys; from hf_epimer.cli.main import main; print(hf_epimer.__file__); sys.exit(main())"
    words = ["merge", "zoo/a", "zoo/b", "--base", "zoo/base", "--method", "mean", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "# out" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_source_archive_can_be_tested_and_pypi_would_take_both(dist: Path) -> None:
    pytest.importorskip("twine")
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"Makefile", "constraints.txt", "constraints-lowest.txt", "tests/conftest.py", "docs/cli.md"} < names
    assert not [name for name in names if name.startswith((".venv", "dist/")) or "__pycache__" in name]
    words = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_place_names_the_same_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_epimer.__version__
    assert citation["license"] == project()["license"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert headings[0] == hf_epimer.__version__


def test_the_paper_that_is_cited_is_that_of_the_method() -> None:
    paper = hf_epimer.METHODS["epimer"].paper
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert cited["title"] == paper.title and cited["year"] == paper.year
    names = [f"{author['given-names']} {author['family-names']}" for author in cited["authors"]]
    assert all(name in paper.names for name in names) and names[0] == paper.names.split(",")[0]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_call_make(file: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    text = file.read_text(encoding="utf-8")
    called = re.findall(r"run: make ([a-z-]+)", text)
    assert called and set(called) <= set(targets)
    for job in yaml.safe_load(text)["jobs"].values():
        assert job["runs-on"] and job["steps"]


def test_workflows_test_every_python_and_the_lowest_versions() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    pythons = jobs["all"]["strategy"]["matrix"]["python"]
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(project()["classifiers"]))
    assert pythons == claimed and project()["requires-python"] == f">={pythons[0]}"
    assert "make test-lowest" in [step.get("run") for step in jobs["lowest"]["steps"]]
