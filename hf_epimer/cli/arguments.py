"""Flags that several commands share, and from the words of a command to the recipe of the merge that it looks into."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_epimer.errors import UsageError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.methods import METHODS
from hf_epimer.methods.base import Method
from hf_epimer.methods.options import Option
from hf_epimer.outside import expanded
from hf_epimer.pipeline.recipe import MergeRecipe

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
    if not namespace.models:
        raise UsageError(f"give the checkpoints, before flags that take several values: hf-epimer {command} REF REF")
    return MergeRecipe(
        models=tuple(map(ModelRef.parse, namespace.models)),
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
