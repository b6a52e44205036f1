"""The command line: words in, results on stdout, progress and complaints on stderr.

Only the parser of the chosen command is built, so that `hf-epimer --help` imports nothing heavy. Method options become
flags from the fields of the methods' config dataclasses. Every error is one line starting `error:`; HF_EPIMER_DEBUG=1
shows the traceback too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from hf_epimer import __version__
from hf_epimer.errors import EpimerError, UsageError

if TYPE_CHECKING:
    from hf_epimer.config import MergeRecipe
    from hf_epimer.diagnosis import Diagnosis
    from hf_epimer.methods.base import Method
    from hf_epimer.pipeline import Progress
    from hf_epimer.planning import Plan


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # torch's threads spin while they wait; beside another busy program that makes small decompositions 30x slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Complaints()], force=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a path or an accent must not fail a merge that is done
    try:
        with _interruptible():
            _dispatch(words)
    except EpimerError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(error, 1, "interrupted; nothing half-written was left behind")
    except BrokenPipeError:
        return 1
    except Exception as error:
        hint = "" if isinstance(error, ArithmeticError) else " (HF_EPIMER_DEBUG=1 shows where)"
        return _fail(error, 1, f"{_one_line(error) or type(error).__name__}{hint}")
    return 0


def console() -> NoReturn:
    """The `hf-epimer` program: after a failure it does not wait for downloads still under way in threads."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack like Ctrl-C does; outside the main thread signals are not ours."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _dispatch(words: list[str]) -> None:
    chosen = next((word for word in words if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        raise UsageError(f"there is no command {chosen!r}; there are {', '.join(COMMANDS)}")
    parser = _Parser(prog="hf-epimer", description="Merge fine-tuned CLIP vision models without training.")
    parser.add_argument("--version", action="version", version=f"hf-epimer {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.summary)
    if chosen is None:
        parser.parse_args(words)
        return
    command = COMMANDS[chosen]
    own = _Parser(prog=f"hf-epimer {chosen}", description=command.summary, allow_abbrev=False)
    command.add_arguments(own)
    # intermixed: references may stand before, between and after the flags
    namespace = own.parse_intermixed_args(words[: words.index(chosen)] + words[words.index(chosen) + 1 :])
    namespace.words = words
    command.run(namespace)


def _fail(error: BaseException, code: int, message: str | None = None) -> int:
    if os.environ.get("HF_EPIMER_DEBUG") == "1":
        raise error
    print(f"error: {message or _one_line(error)}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class _Complaints(logging.Handler):
    """Warnings as `warning: ...` lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("hf_epimer"):
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


# --- merge ----------------------------------------------------------------------------------------------------------


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults()
    absent = argparse.SUPPRESS
    parser.add_argument("models", nargs="*", metavar="[LABEL=]REF", help="checkpoints: folders or org/name[@revision]")
    parser.add_argument("--base", default=absent, metavar="REF", help="the common base; default: from the cards")
    parser.add_argument("--method", default=absent, help="see `hf-epimer methods`; default epimer")
    parser.add_argument("--weights", nargs="+", type=float, default=absent, metavar="W", help="one per checkpoint")
    parser.add_argument("--fisher", nargs="+", default=absent, metavar="[LABEL=]REF", help="Fisher information")
    parser.add_argument(
        "--samples", type=int, default=absent, help="samples per task for estimating curvature (not in this version)"
    )
    parser.add_argument("--evaluate", action="store_true", default=absent, help="measure the merge on its tasks")
    parser.add_argument("--task", nargs="+", action="extend", default=absent, metavar="FILE", help="task files")
    parser.add_argument("--out", default=absent, metavar="DIR", help="folder to write; default ./merged-METHOD")
    parser.add_argument("--overwrite", action="store_true", default=absent, help="replace a non-empty --out")
    parser.add_argument("--push-to", default=absent, metavar="ORG/NAME", help="push the merge to the Hub")
    parser.add_argument("--private", action="store_true", default=absent, help="create the pushed repo private")
    parser.add_argument("--create-pr", action="store_true", default=absent, help="open a pull request instead")
    parser.add_argument("--config", metavar="FILE", help="repeat a merge_config.json")
    parser.add_argument("--device", default=absent, help="where layers are solved: cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default=absent, help="of the written weights: float32, float16, bfloat16")
    parser.add_argument("--seed", type=int, default=absent, help="of everything random; default 0")
    parser.add_argument("--exact", action="store_true", default=absent, help="float64, full SVDs, dense solves")
    parser.add_argument("--dry-run", action="store_true", help="resolve, check, print the plan; write nothing")
    _add_output_arguments(parser)
    group = parser.add_argument_group("method options")
    for name, (text, kind, methods) in sorted(_method_options().items()):
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=kind, default=absent, help=f"{text} [{', '.join(methods)}]")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _method_options() -> dict[str, tuple[str, type, list[str]]]:
    """Option name -> (help, type, methods that have it)."""
    from hf_epimer.methods import METHODS

    options: dict[str, tuple[str, type, list[str]]] = {}
    for method in METHODS.values():
        for item in fields(method.config):
            annotation = str(item.type)
            kind = int if annotation.startswith("int") else float if annotation.startswith("float") else str
            _, _, methods = options.setdefault(item.name, (item.metadata["help"], kind, []))
            methods.append(method.name)
    return options


def _recipe(namespace: argparse.Namespace) -> MergeRecipe:
    """The recipe that the words ask for; a --config file fills in what they leave out."""
    from hf_epimer.config import MergeRecipe, ModelRef, recipe_from_json
    from hf_epimer.merging import find_method

    given = vars(namespace)
    arguments: dict[str, Any] = recipe_from_json(Path(namespace.config)) if namespace.config else {}
    if namespace.config and namespace.models:
        raise UsageError("--config names its checkpoints itself: give no others")
    if namespace.models:
        arguments["models"] = tuple(map(ModelRef.parse, namespace.models))
    if "models" not in arguments:
        raise UsageError(
            "give the checkpoints to merge, before flags that take several values: hf-epimer merge REF REF"
        )
    method = find_method(given.get("method", arguments.get("method", "epimer")))
    if arguments.get("method", method.name) != method.name:
        arguments.pop("options")
    arguments |= {"method": method.name, "options": _options(given, method, arguments.get("options"))}
    plain = ("samples", "evaluate", "out", "overwrite", "push_to", "private", "create_pr", "device", "dtype", "seed")
    arguments |= {name: given[name] for name in (*plain, "exact") if name in given}
    if "base" in given:
        arguments["base"] = ModelRef.parse(given["base"])
    if "weights" in given:
        arguments["weights"] = tuple(given["weights"])
    if "fisher" in given:
        arguments["fisher"] = tuple(map(ModelRef.parse, given["fisher"]))
    if "task" in given:
        arguments["tasks"] = tuple(given["task"])
    return MergeRecipe(**arguments, command=tuple(namespace.words))


def _options(given: dict[str, Any], method: Method, options: Any) -> Any:
    """The method's config from the flags.

    Raises:
        UsageError: a flag that this method does not have, naming the methods that have it.
    """
    own = {item.name for item in fields(method.config)}
    chosen = {}
    for name, (_, _, methods) in _method_options().items():
        if name not in given:
            continue
        if name not in own:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{method.name} has no option {flag}; {', '.join(methods)} have it")
        chosen[name] = given[name]
    return method.config(**({**vars(options), **chosen} if options is not None else chosen))


def _run_merge(namespace: argparse.Namespace) -> None:
    recipe = _recipe(namespace)
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from hf_epimer import pipeline, planning

    disable_progress_bars()
    if recipe.evaluate:
        import datasets

        datasets.disable_progress_bars()
    if namespace.dry_run:
        _print_plan(planning.make_plan(recipe), namespace.json)
        return
    with _progress(namespace.quiet or namespace.json) as progress:
        report = pipeline.merge(recipe, progress)
    if namespace.json:
        print(json.dumps({"out": str(report.out), "url": report.url, **_without_layers(report.to_json())}))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    totals = report.totals
    console.print(
        f"[bold green]merged[/] {len(recipe.models)} checkpoints with [bold]{report.method}[/] "
        f"in {report.seconds['total']:.1f} s: {totals['parameters']:,} parameters in {totals['layers']} tensors"
    )
    if totals["capped"]:
        console.print(f"rank capped at floor(min(m, n) / T) in {len(totals['capped'])} of them: {totals['capped'][0]}")
    if report.results:
        for task, row in report.results["tasks"].items():
            console.print(f"  {escape(task):<16} {row['accuracy']:.3f}")
        console.print(f"  {'average':<16} {report.results['average']:.3f}")
    console.print(f"folder  {escape(str(report.out))}")
    if report.url:
        console.print(f"pushed  {report.url}")


def _without_layers(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "layers"}


def _print_plan(plan: Plan, as_json: bool) -> None:
    summary = plan.summary()
    if as_json:
        print(json.dumps(summary))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in summary.items():
        if name == "bytes_to_read":
            value = f"{value / 1e9:.2f} GB"
        elif isinstance(value, dict):
            value = "\n".join(f"{key}: {entry}" for key, entry in value.items())
        elif isinstance(value, list):
            value = "\n".join(map(str, value))
        table.add_row(f"[bold]{name.replace('_', ' ')}", escape(str(value)) if value not in (None, "") else "none")
    Console(highlight=False, soft_wrap=True).print(table)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A live bar on stderr for stages that last; none when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total or None)
            bars.advance(stages[stage], done)

        yield show


# --- the other commands ---------------------------------------------------------------------------------------------


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a merged folder")
    parser.add_argument("repo", metavar="ORG/NAME", help="where to push it")
    parser.add_argument("--private", action="store_true", help="create the repo private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    _add_output_arguments(parser)


def _run_push(namespace: argparse.Namespace) -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from hf_epimer.pipeline import push_merged

    disable_progress_bars()
    url = push_merged(Path(namespace.folder), namespace.repo, private=namespace.private, create_pr=namespace.create_pr)
    print(json.dumps({"url": url}) if namespace.json else f"pushed  {url}")


def _diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    from hf_epimer.diagnosis import RANKS

    ranks = " ".join(map(str, RANKS))
    parser.add_argument("models", nargs="*", metavar="[LABEL=]REF", help="checkpoints: folders or org/name[@revision]")
    parser.add_argument("--base", metavar="REF", help="the common base; default: from the cards")
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS, metavar="K", help=f"ranks; default {ranks}")
    parser.add_argument("--fisher", nargs="+", default=(), metavar="[LABEL=]REF", help="Fisher information")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per checkpoint")
    parser.add_argument("--out", default="diagnosis", metavar="DIR", help="folder to write; default ./diagnosis")
    parser.add_argument("--overwrite", action="store_true", help="replace a non-empty --out")
    _add_output_arguments(parser)


def _run_diagnose(namespace: argparse.Namespace) -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from hf_epimer.config import MergeRecipe, ModelRef
    from hf_epimer.diagnosis import REPORT, diagnose
    from hf_epimer.errors import OutputError
    from hf_epimer.plots import MISSING

    if not namespace.models:
        raise UsageError("give the checkpoints, before flags that take several values: hf-epimer diagnose REF REF")
    recipe = MergeRecipe(
        models=tuple(map(ModelRef.parse, namespace.models)),
        base=ModelRef.parse(namespace.base) if namespace.base else None,
        weights=tuple(namespace.weights) if namespace.weights else None,
        fisher=tuple(map(ModelRef.parse, namespace.fisher)),
        overwrite=namespace.overwrite,
    )
    disable_progress_bars()
    with _progress(namespace.quiet or namespace.json) as progress:
        found = diagnose(recipe, namespace.rank, namespace.out, progress)
    if namespace.json:
        print(json.dumps({"out": str(found.out), "pictures": found.pictures, **_without_layers(found.to_json())}))
    else:
        _print_diagnosis(found)
    if not found.pictures:
        raise OutputError(f"{MISSING}; {found.out / REPORT} is complete without them")


def _print_diagnosis(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{len(found.labels)} tasks, all layers", title_justify="left", box=None)
    columns = ["rank", "least kept", "own alone"]
    if found.statistics:
        columns += ["eta share", "equal traces", "V_S", "R_S", "bound", "isotropy dev."]
    for column in columns:
        table.add_column(column, justify="right")
    for total in found.totals:
        row = [str(total.rank), f"{total.least_kept:.0%}", f"{total.least_singular:.0%}"]
        if own := total.curvature:
            row += [f"{own.share:.1%}", f"{own.share_trace:.1%}"]
            row += [f"{value:.1e}" for value in (own.variance, own.residual, own.bound)]
            row.append(f"{total.isotropy[0]:.2f}")
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for total in found.totals:
        if total.capped:
            console.print(f"rank {total.rank} capped at floor(min(m, n) / T) in {total.capped} layers")
    for sentence in (*found.verdict, *([found.note] if found.note else [])):
        console.print(f"- {escape(sentence)}")
    console.print(f"folder  {escape(str(found.out))}")


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
    from hf_epimer.tasks import benchmark_tasks

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
    _add_output_arguments(parser)


def _run_demo(namespace: argparse.Namespace) -> None:
    from hf_epimer.demo.run import run_demo

    run_demo(Path(namespace.out), quiet=namespace.quiet, as_json=namespace.json)


COMMANDS = {
    "merge": Command("merge fine-tuned checkpoints into one", _merge_arguments, _run_merge),
    "diagnose": Command("look at checkpoints before merging them", _diagnose_arguments, _run_diagnose),
    "push": Command("push a merged folder to the Hub", _push_arguments, _run_push),
    "methods": Command("list the merge methods", _add_output_arguments, _run_methods),
    "tasks": Command("list the built-in tasks", _add_output_arguments, _run_tasks),
    "demo": Command("make a small zoo and merge it, offline", _demo_arguments, _run_demo),
}
