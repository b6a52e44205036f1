"""`hf-epimer tasks`: the tasks that need no task file."""

from __future__ import annotations

import argparse
import json

from hf_epimer.cli.arguments import add_output_arguments
from hf_epimer.cli.terminal import Command
from hf_epimer.tasks.task import SUITES, benchmark_tasks


def _run(namespace: argparse.Namespace) -> None:
    tasks = benchmark_tasks()
    if namespace.json:
        print(json.dumps({name: vars(task) for name, task in tasks.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="built-in tasks", title_justify="left")
    for column in ("task", "data set", "config", "classes", "templates", "suite"):
        table.add_column(column, overflow="fold")
    for number, (name, task) in enumerate(tasks.items(), start=1):
        counts = len(task.class_names or ()), len(task.templates), min(size for size in SUITES if number <= size)
        table.add_row(f"[bold]{name}", task.dataset, task.config or "", *map(str, counts))
    Console().print(table)


TASKS = Command("list the built-in tasks", add_output_arguments, _run)
