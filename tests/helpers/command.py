"""The command as tests call it (the fixture `run`) and what they ask of its result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]  # (exit code, stdout, stderr) of the words


def fails(result: tuple[int, str, str], pattern: str, code: int = 1) -> None:
    found, output, complaint = result
    errors = [line for line in complaint.splitlines() if not line.startswith("warning: ")]
    assert found == code, (found, complaint)
    assert output == ""
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert re.search(pattern, errors[0]), errors[0]


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def strict(file: Path) -> dict[str, Any]:
    """The content of a JSON file without NaN and Infinity, which are no JSON."""
    content: dict[str, Any] = json.loads(
        file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    return content
