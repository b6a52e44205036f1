"""The short commands: push, methods, tasks, demo."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_epimer.cli.terminal import Command, add_output_arguments

if TYPE_CHECKING:
    from hf_epimer.methods.base import Method


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a merged folder")
    parser.add_argument("repo", metavar="ORG/NAME", help="where to push it")
    parser.add_argument("--private", action="store_true", help="create the repo private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    add_output_arguments(parser)


def _run_push(namespace: argparse.Namespace) -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from hf_epimer.pipeline.merge import push_merged

    disable_progress_bars()
    url = push_merged(Path(namespace.folder), namespace.repo, private=namespace.private, create_pr=namespace.create_pr)
    print(json.dumps({"url": url}) if namespace.json else f"pushed  {url}")


def _run_methods(namespace: argparse.Namespace) -> None:
    from hf_epimer.methods import METHODS

    if namespace.json:
        print(json.dumps({name: _describe(method) for name, method in METHODS.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="merge methods", title_justify="left")
    for column in ("method", "what it does", "needs", "options (default)", "source"):
        table.add_column(column, overflow="fold")
    for name, method in METHODS.items():
        described = _describe(method)
        options = ", ".join(f"--{key.replace('_', '-')} ({value})" for key, value in described["options"].items())
        source = f"{method.paper.authors.split(',')[0]}, {method.paper.venue} {method.paper.year}"
        table.add_row(f"[bold]{name}", method.summary, method.needs or "", options, source)
    Console().print(table)


def _describe(method: Method) -> dict[str, Any]:
    return {
        "summary": method.summary,
        "formula": method.formula,
        "needs": method.needs,
        "options": {item.name: item.default for item in fields(method.config)},
        "paper": method.paper.title,
        "url": method.paper.url,
    }


def _run_tasks(namespace: argparse.Namespace) -> None:
    from hf_epimer.tasks.task import benchmark_tasks

    tasks = benchmark_tasks()
    if namespace.json:
        print(json.dumps({name: vars(task) for name, task in tasks.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="built-in tasks", title_justify="left")
    for column in ("task", "data set", "config", "classes", "templates"):
        table.add_column(column)
    for name, task in tasks.items():
        classes = len(task.class_names or ())
        table.add_row(f"[bold]{name}", task.dataset, task.config or "", str(classes), str(len(task.templates)))
    Console().print(table)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", default="demo-merges", help="where the merged models go")
    parser.add_argument("--web", action="store_true", help="open the page instead, where it can be tried out")
    add_output_arguments(parser)


def _run_demo(namespace: argparse.Namespace) -> None:
    if namespace.web:
        from hf_epimer.demo.web import serve

        serve()
        return
    from hf_epimer.demo.run import run_demo

    run_demo(Path(namespace.out), quiet=namespace.quiet, as_json=namespace.json)


PUSH = Command("push a merged folder to the Hub", _push_arguments, _run_push)
METHODS = Command("list the merge methods", add_output_arguments, _run_methods)
TASKS = Command("list the built-in tasks", add_output_arguments, _run_tasks)
DEMO = Command("make a small zoo and merge it, offline", _demo_arguments, _run_demo)
