"""A recipe as words: its command line makes the same merge again."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.command import Run, fails
from hf_epimer import METHODS, MergeRecipe, ModelRef
from hf_epimer.cli import merge as command
from hf_epimer.pipeline.recipe import recipe_from_json

MODELS = (ModelRef("org/vit-dtd", "a" * 40, "dtd"), ModelRef("org/vit-svhn", "b" * 40, "svhn"))
BASE = ModelRef("org/base", "c" * 40)


def typed(line: str) -> MergeRecipe:
    """What the command makes of these words."""
    words = shlex.split(line)
    assert words[:2] == ["hf-epimer", "merge"]
    parser = argparse.ArgumentParser()
    command.MERGE.add_arguments(parser)
    namespace = parser.parse_intermixed_args(words[2:])
    namespace.words = words[1:]
    return command._recipe(namespace)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_its_defaults(method: str) -> None:
    chosen = METHODS[method]
    recipe = MergeRecipe(MODELS, BASE, method, chosen.config(), calibrate=chosen.calibrates)
    again = typed(recipe.command_line())
    assert replace(again, calibrate=recipe.calibrate) == recipe
    assert again.calibrate is None  # which does what the method does by itself


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"rank": 7, "alpha": 0.5, "metric": "kronecker", "normalize": "trace"}},
        {"weights": (1.0, 2.5)},
        {"fisher": (ModelRef("org/fisher", "d" * 40, "dtd"), ModelRef("org/other", None, "svhn"))},
        {"samples": 17, "calibrate": True, "tasks": ("/a b/task.yaml", "/other.json")},
        {"method": "kronecker-core", "calibrate": False, "samples": 9},
        {"method": "tsv-m", "tune_alpha": True, "samples": 33},
        {"samples": 17, "mixed_precision": "bf16"},
        {"method": "tsv-m", "refine": True, "refine_steps": 40, "samples": 12},
        {"device": "cuda:1", "dtype": "bfloat16", "seed": 3, "exact": True},
        {"method": "tsv-m", "out_rank": 4},
        {"method": "mean", "dense": True},
    ],
)
def test_whatever_decides_a_merge_is_in_its_command(change: dict[str, Any]) -> None:
    chosen = METHODS[change.get("method", "epimer")]
    given = {**change, "method": chosen.name, "options": chosen.config(**change.get("options", {}))}
    recipe = MergeRecipe(MODELS, BASE, **given)
    assert typed(recipe.command_line()) == recipe


def test_a_local_checkpoint_with_a_space(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    recipe = MergeRecipe((ModelRef(str(folder), None, "dtd"),), BASE, "mean", METHODS["mean"].config())
    assert typed(recipe.command_line()) == recipe


def old_recipe(folder: Path, method: str, options: dict[str, Any]) -> Path:
    file = folder / "merge_config.json"
    content = {"method": method, "options": options, "base": "org/base", "models": ["org/a", "org/b"]}
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"models": "org/a"}, "models is a str, not a list"),
        ({"models": [1]}, "models is no list of strings"),
        ({"tasks": [1]}, "tasks is no list of strings"),
        ({"base": None}, "base is a NoneType, not a str"),
        ({"options": []}, "options is a list, not a dict"),
        ({"method": ["mean"]}, "method is a list, not a str"),
        ({"weights": 5}, "weights is a int, not a list"),
        ({"weights": ["a", "b"]}, "--weights must be finite numbers"),
        ({"weights": [[1], [2]]}, "--weights must be finite numbers"),
        ({"evaluate": "no"}, "--evaluate is a switch, true or false, not 'no'"),
        ({"calibrate": 1}, "--calibrate is a switch"),
    ],
)
def test_values_that_no_recipe_has_are_wrong_usage(change: dict[str, Any], why: str, tmp_path: Path, run: Run) -> None:
    file = old_recipe(tmp_path, "mean", {})
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    fails(run("merge", "--config", file, "--out", tmp_path / "out"), why, code=2)
    file.write_text(json.dumps({"method": "mean"}))
    fails(run("merge", "--config", file, "--out", tmp_path / "out"), "it has no 'options'", code=2)


def test_a_recipe_from_before_a_method_was_renamed_means_what_it_meant(tmp_path: Path) -> None:
    options = {"rank": 32, "alpha": 1.0, "metric": "kronecker", "scaffold": "tsv-m", "rho": 1.0}
    found = recipe_from_json(old_recipe(tmp_path, "epimer-core", options))
    assert found["method"] == "kronecker-core" and vars(found["options"]) == options


def test_a_recipe_from_before_a_method_had_an_option_means_what_it_meant(tmp_path: Path) -> None:
    for method, options in (("fisher", {"damping": 1e-6}), ("gradient-matching", {"alpha": 1.0})):
        assert recipe_from_json(old_recipe(tmp_path, method, options))["options"].normalize == "none"
