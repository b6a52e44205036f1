"""What a classification task is, where its description comes from, and which task a checkpoint belongs to.

A task names a data set (a Hub id or a local folder), its splits and columns, the class names in the order of the
labels, and the prompt templates ("a photo of a {}.") from which the zero-shot head is made. Twenty benchmarks come
with the package; any other task is a small YAML or JSON file with the fields of `Task` as keys.

A checkpoint's task is guessed from, in this order: its label, the data sets of its model card, the name of its repo.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from hf_epimer.errors import TaskError
from hf_epimer.hub.refs import same_repo
from hf_epimer.outside import Unreadable, exists, expanded, parse_json, parse_yaml, read_text

TASK_FILE_SUFFIXES = (".yaml", ".yml", ".json")

_NAME = re.compile(r"\w(?:[\w. -]{0,62}[\w.-])?")
"""Of a task: it is shown, is a label and becomes part of file names."""


@dataclass(frozen=True)
class Task:
    """One classification task. Without `class_names`, the names stored with the data set's labels are used."""

    name: str
    dataset: str
    config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] = ()
    head: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise TaskError(
                f"{self.name!r} cannot be a task's name: it has letters, digits, spaces, - _ and . in it, begins with "
                "a letter or digit and is at most 64 characters long"
            )

    @property
    def file_name(self) -> str:
        """The name, or where not every file system has its letters a digest of it."""
        if re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            return self.name
        return hashlib.sha256(self.name.encode()).hexdigest()[:16]


_LISTS = {"class_names", "templates"}
_OPTIONAL = {"config", "class_names", "head"}


SUITES = (8, 14, 20)
"""How many tasks the sets of benchmarks have: each is the beginning of the next (Wang et al., ICML 2024)."""


def benchmark_tasks(suite: int = SUITES[-1]) -> dict[str, Task]:
    """The benchmarks of the CLIP merging literature, by name: the set of 8, 14 or all 20 tasks."""
    file = resources.files("hf_epimer.tasks") / "benchmarks.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    chosen = list(described.items())[:suite]
    return {name: _task({"name": name, **values}, "benchmarks.json") for name, values in chosen}


def find_task(name_or_file: str | Path) -> Task:
    """The benchmark of this name, or the task that this file describes."""
    known = benchmark_tasks()
    name = str(name_or_file)
    if name in known:
        return known[name]
    path = expanded(name_or_file)
    if (exists(path) and not path.is_dir()) or path.suffix in TASK_FILE_SUFFIXES:
        return load_task_file(path)
    similar = get_close_matches(name.lower(), known, n=1)
    meant = f"did you mean {similar[0]}? " if similar else ""
    raise TaskError(f"no task is called {name!r}: {meant}known are {', '.join(known)}; or give a task file")


def load_task_file(path: str | Path) -> Task:
    """Read and check a task file. Local paths in it start at the file's own folder."""
    path = expanded(path)
    task = _task(_read_mapping(path), str(path))
    return Task(**{**vars(task), "dataset": _beside(path, task.dataset), "head": _beside(path, task.head)})


def infer_task(
    label: str | None = None,
    datasets: Iterable[str] = (),
    repo_name: str = "",
    tasks: Mapping[str, Task] | None = None,
) -> Task | None:
    """The task a checkpoint was tuned for, or None. A label that names no task is never overruled by a guess.

    A card that lists the data sets of several tasks says nothing about which one; the repo's name then decides.
    In the name, a task counts only as a run of whole words, and the longest run wins.
    """
    known = benchmark_tasks() if tasks is None else tasks
    if label is not None:
        return next((task for task in known.values() if _words(task.name) == _words(label)), None)
    of_card = [task for task in known.values() if any(same_repo(task.dataset, listed) for listed in datasets)]
    if len(of_card) == 1:
        return of_card[0]
    name = _words(repo_name.rsplit("/", 1)[-1])
    named = [task for task in known.values() if _contains(name, _words(task.name))]
    return max(named, key=lambda task: (len(_words(task.name)), len(task.name)), default=None)


def plain_name(class_name: str) -> str:
    """A class's name without what differs from one data set's copy to the next: case, underscores and hyphens."""
    return class_name.lower().replace("_", " ").replace("-", " ").strip()


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[-_/.\s]", name.lower()) if word]


def _contains(words: list[str], run: list[str]) -> bool:
    return any(words[start : start + len(run)] == run for start in range(len(words) - len(run) + 1))


def _beside(file: Path, reference: str | None) -> str | None:
    """A path relative to the file's folder if something lies there; otherwise (a Hub id) the reference as it is."""
    if reference is None:
        return None
    local = file.parent / expanded(reference)
    return str(local.resolve()) if exists(local) else reference


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
        values = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read as a task file: {error.strerror or error}") from error
    except Unreadable as error:
        raise TaskError(f"{path}: cannot be read as a task file: {error}") from error
    if not isinstance(values, dict):
        raise TaskError(f"{path}: a task file is a mapping with the keys {', '.join(_keys())}")
    return values


def _keys() -> list[str]:
    return [field.name for field in fields(Task)]


def _task(values: Mapping[str, Any], source: str) -> Task:
    """Build a task from the values of a file, or say which key of which file is wrong."""
    for key in values:
        if key not in _keys():
            raise TaskError(f"{source}: unknown key {key!r}; a task has {', '.join(_keys())}")
    required = ["name", "dataset"] if values.get("head") else ["name", "dataset", "templates"]
    for key in required:
        if values.get(key) in (None, "", []):
            raise TaskError(f"{source}: the key {key!r} is missing or empty")
    checked = {key: _checked(key, value, source) for key, value in values.items()}
    for template in checked.get("templates", ()):
        if "{}" not in template:
            raise TaskError(f"{source}: templates: {template!r} has no {{}} for the class name")
    names = checked.get("class_names")
    if names is not None and len(set(names)) != len(names):
        raise TaskError(f"{source}: class_names: a name occurs twice")
    try:
        return Task(**checked)
    except TaskError as error:
        raise TaskError(f"{source}: name: {error}") from error


def _checked(key: str, value: Any, source: str) -> Any:
    """The value with its type checked; YAML reads an unquoted 0 or yes as no string, which is worth an error."""
    if value is None and key in _OPTIONAL:
        return None
    if key not in _LISTS:
        if not isinstance(value, str):
            raise TaskError(f"{source}: {key}: expected a string, found {value!r}")
        return value
    if not isinstance(value, list) or not value:
        raise TaskError(f"{source}: {key}: expected a list of strings, found {value!r}")
    for entry in value:
        if not isinstance(entry, str):
            raise TaskError(f"{source}: {key}: {entry!r} is no string; put it in quotes")
    return tuple(value)
