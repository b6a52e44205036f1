"""Commands that measure curvature on `clip_zoo`, and how far two statistics files are apart."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file


def fisher_words(zoo: Path, name: str = "a") -> tuple[object, ...]:
    return ("fisher", zoo / name, "--base", zoo / "base", "--task", zoo / f"{name}.json")


EPIMER = ("--method", "epimer", "--rank", 4)


def merge_words(zoo: Path) -> tuple[object, ...]:
    models = (f"{name}={zoo / name}" for name in "ab")
    return ("merge", *models, "--base", zoo / "base", "--task", zoo / "a.json", zoo / "b.json", *EPIMER)


def close(one: Path, two: Path, tolerance: float) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not name.endswith("k_proj.bias"):  # nothing but rounding
            assert float((value - second[name]).norm() / value.norm()) < tolerance, name
