"""What the scripts of this folder share: which checkpoints, how a merge is measured, ours printed beside the paper's.

Checkpoints come in families that must not be mixed. The paper's are Ilharco et al.'s; those of `--hub` are
FusionBench's, fine-tuned anew from the same OpenAI bases; those of `--zoo DIR` are whatever lies there. Ours and the
paper's numbers stand in rows of their own, each with its family, and a difference is taken only within one family:
`--zoo DIR --family Ilharco --backbone ViT-B/32` says that DIR holds the paper's own checkpoints, converted.

Every measurement is kept under --out, by all that decides it, so that an interrupted run goes on where it stopped and
tables that share a merge measure it once. Delete the folder to measure anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_epimer import METHODS, MergeRecipe, ModelRef, Task, merge
from hf_epimer.curvature.files import Compression
from hf_epimer.curvature.measure import StatisticsRecipe, measure
from hf_epimer.curvature.request import Gradients
from hf_epimer.evaluation.accuracy import evaluate_folder
from hf_epimer.models.source import resolve_model
from hf_epimer.tasks.dataset import Sampling
from hf_epimer.tasks.task import SUITES, benchmark_tasks, find_task

HUB = {
    "ViT-B/32": "clip-vit-base-patch32",
    "ViT-B/16": "clip-vit-base-patch16",
    "ViT-L/14": "clip-vit-large-patch14",
}
"""The paper's backbones: openai/NAME is the base, tanganke/NAME_TASK are FusionBench's checkpoints."""

CHECKPOINTS = {"stanford_cars": "stanford-cars"}
"""FusionBench's names of tasks, where they are others."""

TASKS = ("stanford_cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
"""The paper's tasks in the paper's order."""

PAPER = "Ilharco"
"""The paper's family of checkpoints."""

Numbers = Sequence[float | None]


@cache
def published() -> dict[str, Any]:
    """Every number the paper prints, by table and figure, with its source."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


LITERAL: dict[str, dict[str, Any]] = {
    "epimer": {"preset": "paper"},
    "fisher": {"normalize": "none"},
    "gradient-matching": {"normalize": "none"},
}
"""What the papers do where our defaults are others."""


@dataclass(frozen=True)
class Benchmark:
    """One set of checkpoints and how merges of it are measured.

    Attributes:
        family: of the checkpoints.
        backbone: of the paper's three, whose numbers stand beside ours.
        base, models: references, the models labelled with their tasks.
        task_files: names of built-in tasks, or files.
        samples: for the Fisher information, a task.
        limit: test images a task; None for all.
        out: folder for results.
    """

    family: str
    backbone: str
    base: ModelRef
    models: tuple[ModelRef, ...]
    task_files: tuple[str, ...]
    samples: int
    limit: int | None
    seed: int
    out: Path

    @cached_property
    def tasks(self) -> list[Task]:
        """What is measured."""
        return [find_task(name) for name in self.task_files]

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [task.name for task in self.tasks]

    @property
    def comparable(self) -> bool:
        """Whether ours and the paper's are accuracies of the same checkpoints."""
        return self.family == PAPER

    @property
    def has_paper_tasks(self) -> bool:
        """Whether tasks with the paper's names are the paper's tasks."""
        return self.family in (PAPER, "FusionBench")

    def recipe(self, method: str, options: dict[str, Any], out: str, fisher: Sequence[ModelRef] = ()) -> MergeRecipe:
        """The merge of all models."""
        return MergeRecipe(
            models=self.models,
            base=self.base,
            method=method,
            options=METHODS[method].config(**LITERAL.get(method, {}) | options),
            fisher=tuple(fisher),
            samples=self.samples,
            tasks=tuple(file for file in self.task_files if Path(file).is_file()),
            seed=self.seed,
            out=out,
            overwrite=True,
        )

    def accuracies(
        self,
        method: str,
        sampling: Sampling | None = None,
        gradients: Gradients | None = None,
        compress: Compression | None = None,
        **options: Any,
    ) -> list[float]:
        """Test accuracy of a merge on every task.

        Args:
            method: a name from METHODS.
            sampling: what its Fisher information is measured on; None for `samples` samples, as a merge does it itself.
            gradients: which of their gradients; None for those that a merge takes.
            compress: how that is stored.
            options: of the method.
        """
        gradients = gradients or Gradients()
        identity = {
            "method": method,
            "options": options,
            "sampling": asdict(sampling) | asdict(gradients) if sampling else self.samples,
            "compress": compress,
            "models": list(map(str, self.models)),
        }

        def compute() -> list[float]:
            files = self._fisher_files(sampling, gradients, compress) if sampling else ()
            return self._measure(merge(self.recipe(method, options, str(self.out / "merged"), files)).out)

        return self.kept(identity, compute)

    def zero_shot(self) -> list[float]:
        """Test accuracy of the base."""
        return self.kept({"method": "zero-shot"}, lambda: self._measure(self.base_folder))

    def fine_tuned(self) -> list[float]:
        """Test accuracy of every model on its own task."""

        def compute() -> list[float]:
            folders = [resolve_model(model).folder() for model in self.models]
            return [self._measure(folder, [task])[0] for folder, task in zip(folders, self.tasks)]

        return self.kept({"method": "fine-tuned", "models": list(map(str, self.models))}, compute)

    @cached_property
    def base_folder(self) -> Path:
        """Where the base lies, fetched if need be."""
        return resolve_model(self.base).folder_with_tokenizer()

    def kept(self, identity: dict[str, Any], compute: Callable[[], list[float]]) -> list[float]:
        """The values measured under this identity, from --out or now."""
        common = {"base": str(self.base), "tasks": self.task_files, "limit": self.limit, "seed": self.seed}
        key = json.dumps(common | identity, sort_keys=True)
        file = self.out / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not file.is_file():
            values = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"values": values, "of": json.loads(key)}, indent=1), encoding="utf-8")
            shown = f"{identity['method']} {identity.get('options', '')}"
            Console(stderr=True, highlight=False).print(f"{shown}: {sum(values) / len(values):.4g}")
        return json.loads(file.read_text(encoding="utf-8"))["values"]

    def _measure(self, folder: Path, tasks: Sequence[Task] | None = None) -> list[float]:
        tasks = tasks or self.tasks
        results = evaluate_folder(folder, self.base_folder, tasks, name="", limit=self.limit)
        return [results.tasks[task.name].accuracy for task in tasks]

    def _fisher_files(self, sampling: Sampling, gradients: Gradients, compress: Compression | None) -> list[ModelRef]:
        files = []
        for model, task in zip(self.models, self.task_files):
            file = self.out / "fisher" / f"{model.label}.safetensors"
            measure(StatisticsRecipe(model, task, self.base, sampling, gradients, compress=compress, out=file))
            files.append(ModelRef.parse(f"{model.label}={file}"))
        return files


def parser(text: str, *, ranks: Sequence[int] = (32,)) -> argparse.ArgumentParser:
    """The flags of every script.

    Args:
        text: the script's docstring.
        ranks: the default of --rank, which takes several values where there are several.
    """
    arguments = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    place = arguments.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--zoo", type=Path, metavar="DIR", help="a folder with base/, tasks/NAME and task_files/NAME.yaml"
    )
    place.add_argument("--hub", choices=list(HUB), help="FusionBench's checkpoints of this backbone, from the Hub")
    arguments.add_argument(
        "--family", default="zoo", help="what the checkpoints of --zoo are; Ilharco: the paper's own"
    )
    arguments.add_argument(
        "--backbone", choices=list(HUB), default="ViT-B/32", help="the paper's numbers beside a --zoo"
    )
    tasks = arguments.add_mutually_exclusive_group()
    tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="default: all of a zoo, the paper's eight of the Hub")
    tasks.add_argument("--suite", type=int, choices=SUITES, help="the set of 8, 14 or 20 benchmarks")
    if len(ranks) > 1:
        arguments.add_argument("--rank", nargs="+", type=int, default=list(ranks), metavar="K")
    else:
        arguments.add_argument("--rank", type=int, default=ranks[0], metavar="K")
    arguments.add_argument("--samples", type=int, default=256, help="a task, for the Fisher information")
    arguments.add_argument("--limit", type=int, help="test images a task; default all")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=Path("paper-results"))
    return arguments


def benchmark_of(options: argparse.Namespace) -> Benchmark:
    """The checkpoints that the flags name."""
    chosen = list(benchmark_tasks(options.suite)) if options.suite else options.tasks
    if options.hub:
        name = HUB[options.hub]
        names = chosen or list(TASKS)
        base = f"openai/{name}"
        models = [f"{task}=tanganke/{name}_{CHECKPOINTS.get(task, task)}" for task in names]
        files = names
    else:
        names = chosen or sorted(file.stem for file in (options.zoo / "task_files").glob("*.yaml"))
        base = str(options.zoo / "base")
        models = [f"{task}={options.zoo / 'tasks' / task}" for task in names]
        files = [str((options.zoo / "task_files" / f"{task}.yaml").absolute()) for task in names]
    return Benchmark(
        family="FusionBench" if options.hub else options.family,
        backbone=options.hub or options.backbone,
        base=ModelRef.parse(base),
        models=tuple(map(ModelRef.parse, models)),
        task_files=tuple(files),
        samples=options.samples,
        limit=options.limit,
        seed=options.seed,
        out=options.out,
    )


@dataclass
class Comparison:
    """A table of ours and the paper's, each in a row of its own.

    Attributes:
        name: of the file, and of the paper's table or figure.
        title: what is measured.
        source: where the paper's numbers stand.
        columns: of numbers.
        digits: after the point.
        comparable: whether differences are taken.
        paper: what the paper's rows are of.
        note: printed below.
    """

    name: str
    title: str
    source: str
    columns: Sequence[str]
    benchmark: Benchmark
    digits: int = 3
    comparable: bool | None = None
    paper: str = f"paper ({PAPER})"
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        """Where its JSON goes; a picture has the same name."""
        return self.benchmark.out / f"{self.name.lower().replace(' ', '-')}.json"

    @property
    def ours(self) -> str:
        """What our rows are of."""
        return f"ours ({self.benchmark.family})"

    def add(self, label: str, ours: Numbers, theirs: Numbers = ()) -> None:
        """One row of ours, and the paper's below it where the paper has one."""
        printed = list(theirs) if any(value is not None for value in theirs) else None
        comparable = self.benchmark.comparable if self.comparable is None else self.comparable
        difference = None
        if comparable and printed:
            difference = [None if a is None or b is None else a - b for a, b in zip(ours, printed, strict=True)]
        self.rows.append({"row": label, "ours": list(ours), "paper": printed, "difference": difference})

    def finish(self, **more: Any) -> None:
        """Print the table and write its JSON."""
        table = Table(title=f"{self.name}: {self.title}", title_justify="left", highlight=False)
        table.add_column("", no_wrap=True)
        table.add_column("whose (checkpoints)", no_wrap=True)
        for column in self.columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(row["row"], self.ours, *(self._shown(value) for value in row["ours"]))
            if row["paper"]:
                table.add_row("", self.paper, *(self._shown(value) for value in row["paper"]), style="dim")
            if row["difference"]:
                table.add_row("", "difference", *(self._shown(value, "+") for value in row["difference"]))
        console = Console(highlight=False, soft_wrap=True)
        console.print(table)
        if any(row["paper"] for row in self.rows) and not any(row["difference"] for row in self.rows):
            console.print(f"No difference is taken: {self._unlike()}.")
        console.print(f"The paper's: {self.source}. {self.note}".rstrip())
        content = {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "checkpoints": {"ours": self.benchmark.family, "paper": PAPER},
            "backbone": self.benchmark.backbone,
            "base": str(self.benchmark.base),
            "models": list(map(str, self.benchmark.models)),
            "samples": self.benchmark.samples,
            "limit": self.benchmark.limit,
            "seed": self.benchmark.seed,
            "columns": list(self.columns),
            "rows": self.rows,
            "note": self.note,
            **more,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"written {self.file}", markup=False)

    def _unlike(self) -> str:
        """Why ours and the paper's are not of a kind."""
        if self.comparable is False:
            return "another program on another machine"
        family = self.benchmark.family
        if not self.benchmark.has_paper_tasks:
            return f"{family} is another benchmark, with other models and other data"
        return f"ours are {family}'s checkpoints, the paper's are {PAPER}'s, fine-tuned apart on the same data"

    def _shown(self, value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.{self.digits}f}"
