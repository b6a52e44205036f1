"""`hf extensions install OWNER/hf-epimer`, with huggingface_hub's own installer; a local archive is at the address.

Nothing comes from the network: pip gets empty wheels in the place of torch and the other libraries, which the command
then finds where this test has them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hatchling")
extensions = pytest.importorskip("huggingface_hub.cli.extensions")
if not hasattr(extensions, "_install_python_extension"):
    pytest.skip("for releases of huggingface_hub with Python extensions", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PACKED = ("hf_epimer", "spaces_app", "pyproject.toml", "README.md", "LICENSE")


def archive_of_the_repo(folder: Path) -> Path:
    """As GitHub serves one: everything below one folder."""
    top = folder / "hf-epimer-HEAD"
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            top.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, top / name)
    return Path(shutil.make_archive(str(folder / "HEAD"), "zip", folder, top.name))


def write_empty_wheel(folder: Path, requirement: str) -> None:
    name, version = requirement.split(">=")
    plain = name.replace("-", "_")
    record = f"{plain}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{plain}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{record}/RECORD", "")


@pytest.mark.slow
def test_the_installer_makes_hf_epimer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archive_of_the_repo(tmp_path)
    (tmp_path / "wheels").mkdir()
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        write_empty_wheel(tmp_path / "wheels", requirement)
    environment = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say that there is none: hatchling is where this test has it
        "PIP_CONSTRAINT": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONPATH": next(path for path in sys.path if path.endswith("site-packages")),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    addresses = []
    run = subprocess.run

    def from_the_archive(words: list[str], **options: Any) -> Any:
        addresses.extend(word for word in words if word.startswith("https:"))
        return run([str(archive) if word.startswith("https:") else word for word in words], **options)

    def unreachable(*arguments: Any, **named: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path / "extensions")
    monkeypatch.setattr(extensions, "_github_request", unreachable)
    monkeypatch.setattr(extensions.subprocess, "run", from_the_archive)
    monkeypatch.setattr(extensions.shutil, "which", lambda name: None)  # without uv: everybody has pip
    manifest = extensions._install_extension(owner="you", repo_name="hf-epimer", short_name="epimer")
    assert addresses == ["https://github.com/you/hf-epimer/archive/HEAD.zip"]
    assert (manifest.type, Path(manifest.executable_path).name) == ("python", "hf-epimer")
    listed = run([manifest.executable_path, "methods"], capture_output=True, text=True)
    assert listed.returncode == 0 and "epimer-core" in listed.stdout, listed.stderr
