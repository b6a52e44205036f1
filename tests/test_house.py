"""Who may import whom, in the package and in the tests, read off the source: imports inside of functions count."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (  # each may import from those before it; rooms of one floor do not know each other
    ("errors", "types"),
    ("outside",),
    ("plotting",),
    ("numerics",),
    ("methods", "checkpoints", "hub"),
    ("merging", "tasks"),
    ("lora",),
    ("models",),
    ("curvature", "evaluation"),
    ("pipeline",),
    ("analysis", "demo"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ARCHITECTURES_BY_NAME = ("methods/base.py", "hf_epimer.models.modules")  # EpiMerConfig(...).merge(model, models)
LIGHT = ("methods", "merging", "lora")  # these rooms do without
HEAVY = ("transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "hf_epimer.hub")


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it: `a.b.name` where `from a.b import name` may mean a module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide their room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def in_the_package() -> list[tuple[str, str]]:
    """(file, what it imports), but for the public names and the entry point at the top."""
    package = ROOT / "hf_epimer"
    files = [file for file in package.rglob("*.py") if file not in (package / "__init__.py", package / "__main__.py")]
    return [(file.relative_to(package).as_posix(), name) for file in files for name in imports(file)]


def test_imports_go_one_way() -> None:
    arrows = [(f, name) for f, name in in_the_package() if name.startswith("hf_epimer.") and "__version__" not in name]
    assert len(arrows) > 300
    upwards = []
    for file, name in arrows:
        room, target = file.split("/")[0].removesuffix(".py"), name.split(".")[1]
        assert target in FLOOR, f"{file}: {name} is no room; public names are for users"
        if room != target and FLOOR[target] >= FLOOR[room]:
            upwards.append((file, name.rpartition(".")[0]))
    assert upwards == [ARCHITECTURES_BY_NAME]


def test_the_mathematics_needs_torch_alone() -> None:
    torch_alone = sys.stdlib_module_names | {"torch", "hf_epimer"}
    for file, name in in_the_package():
        room = file.split("/")[0]
        assert room != "numerics" or name.split(".")[0] in torch_alone, f"{file} imports {name}"
        assert room not in LIGHT or not f"{name}.".startswith(tuple(f"{heavy}." for heavy in HEAVY)), (file, name)


def test_no_test_imports_a_test() -> None:
    found = [(file.name, name) for file in (ROOT / "tests").rglob("*.py") for name in imports(file)]
    assert ("conftest.py", "helpers.checkpoints.tiny_state") in found
    tests = ("test_", "conftest")
    assert not [pair for pair in found if any(part.startswith(tests) for part in pair[1].split("."))]


def test_conftest_holds_fixtures_only() -> None:
    for file in (ROOT / "tests").rglob("conftest.py"):
        defined = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(node, "decorator_list")]
        assert defined and all("fixture" in " ".join(map(ast.unparse, node.decorator_list)) for node in defined), file
