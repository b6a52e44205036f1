"""Flags that several commands share, and from the words of a command to the recipe of the merge that it looks into."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_epimer.errors import UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.methods import METHODS
from hf_epimer.methods.base import Method
from hf_epimer.methods.options import Option
from hf_epimer.outside import expanded
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.tasks.task import SUITES, benchmark_tasks, infer_task

if TYPE_CHECKING:
    from argparse import _ActionsContainer


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that prints something."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def path(word: str) -> Path:
    """The type of a flag that names a file or folder: `~` is the home folder behind an equals sign, too."""
    try:
        return expanded(word)
    except UsageError as error:  # as other errors of this kind, argparse would say it in its own words
        raise argparse.ArgumentTypeError(str(error)) from error


def add_suite_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """The flag of every command that takes one of the sets of benchmarks by its size."""
    parser.add_argument("--suite", type=int, choices=SUITES, help=what)


OF_A_SUITE = "a set of benchmarks: a reference with {} stands for one checkpoint of each of its tasks"


def models_of(namespace: argparse.Namespace, command: str) -> tuple[ModelRef, ...]:
    """The checkpoints that are named, one by one or by what all those of a suite have in common.

    `org/vit-b32-{}` is org/vit-b32-TASK for every task of --suite, labelled TASK, but for tasks whose label another
    reference has.

    Raises:
        UsageError: there are none; `{}` without --suite, or --suite without it.
    """
    if not namespace.models:
        raise UsageError(f"give the checkpoints, before flags that take several values: hf-epimer {command} REF REF")
    has_pattern = any("{}" in word for word in namespace.models)
    if has_pattern and not namespace.suite:
        raise UsageError("{} in a reference stands for the tasks of a suite: add --suite 8, 14 or 20")
    if namespace.suite and not has_pattern:
        raise UsageError("--suite is for references with {} in the place of a task's name: org/vit-b32-{}")
    single = {word: ModelRef.parse(word) for word in namespace.models if "{}" not in word}
    labels = {task.name for ref in single.values() if ref.label and (task := infer_task(ref.label))}
    names = [name for name in benchmark_tasks(namespace.suite) if name not in labels] if has_pattern else []
    found: list[ModelRef] = []
    for word in namespace.models:
        of_tasks = [(name, ModelRef.parse(word.replace("{}", name))) for name in names] if "{}" in word else []
        found += [ref if ref.label else replace(ref, label=name) for name, ref in of_tasks]
        found += [single[word]] if word in single else []
    return tuple(found)


def add_method_arguments(group: _ActionsContainer, without: Collection[str] = ()) -> None:
    """A flag for every option of any method; absent from the namespace where it is not given."""
    for name, (option, methods) in sorted(_method_options().items()):
        if name not in without:
            text = f"{option.help} [{', '.join(methods)}]"
            group.add_argument(option.flag, dest=name, type=option.kind, default=argparse.SUPPRESS, help=text)


def given_options(namespace: argparse.Namespace, without: Collection[str] = ()) -> dict[str, Any]:
    """The method options among the words."""
    given = vars(namespace)
    return {name: given[name] for name in _method_options() if name in given and name not in without}


def check_options(method: Method, given: Collection[str]) -> None:
    """Refuse options that this method does not have.

    Raises:
        UsageError: naming the methods that have it.
    """
    known = method.options
    for name in given:
        if name not in known:
            option, methods = _method_options()[name]
            raise UsageError(f"{method.name} has no option {option.flag}; {', '.join(methods)} have it")


def recipe_of(namespace: argparse.Namespace, command: str, **more: Any) -> MergeRecipe:
    """Checkpoints, base, weights, statistics and tasks of `diagnose` and `sweep`, with `more` fields beside them."""
    return MergeRecipe(
        models=models_of(namespace, command),
        base=ModelRef.parse(namespace.base) if namespace.base else None,
        weights=tuple(namespace.weights) if namespace.weights else None,
        fisher=tuple(map(ModelRef.parse, namespace.fisher)),
        overwrite=namespace.overwrite,
        tasks=tuple(namespace.task),
        **more,
    )


def _method_options() -> dict[str, tuple[Option, list[str]]]:
    """Option name -> the option as the first method has it, and all methods that have it."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for method in METHODS.values():
        for name, option in method.options.items():
            found.setdefault(name, (option, []))[1].append(method.name)
    return found
