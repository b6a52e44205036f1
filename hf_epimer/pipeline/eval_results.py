"""Accuracies where the Hub lists them: `.eval_results/*.yaml`, on the model's page and the benchmark's leaderboard.

Only for data sets that are named: which ones are benchmarks, and what they call their tasks, is their owners' to say
(https://huggingface.co/docs/hub/eval-results).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import yaml

from hf_epimer import __version__
from hf_epimer.errors import UsageError
from hf_epimer.tasks.dataset import data_revision
from hf_epimer.tasks.task import Task

if TYPE_CHECKING:
    from hf_epimer.evaluation.results import Results

FILE = ".eval_results/hf-epimer.yaml"


def benchmarks(named: Sequence[str], tasks: Sequence[Task]) -> list[tuple[Task, str]]:
    """The tasks that are measured on the data sets named, and what the benchmarks call them.

    Args:
        named: `DATASET[:TASK_ID]`; the id is `default` where it is not given.

    Raises:
        UsageError: one is not the data set of exactly one task, or the Hub's client does not know the format.
    """
    if named and not hasattr(huggingface_hub, "EvalResultEntry"):
        raise UsageError("--eval-results needs a newer huggingface_hub: pip install --upgrade huggingface_hub")
    public = [task for task in tasks if not Path(task.dataset).is_absolute()]
    found = []
    for text in named:
        dataset, _, task_id = text.partition(":")
        measured = [task for task in public if task.dataset.casefold() == dataset.casefold()]
        if len(measured) != 1:
            listed = ", ".join(sorted({task.dataset for task in public})) or "none that is on the Hub"
            raise UsageError(
                f"--eval-results {text}: {len(measured)} of the tasks are measured on {dataset}; data sets: {listed}"
            )
        found.append((measured[0], task_id or "default"))
    return found


def write_eval_results(folder: Path, named: Sequence[str], tasks: Sequence[Task], results: Results) -> None:
    """Write the file, accuracies in percent."""
    head = "zero-shot" if results.zero_shot else "the task's own head"
    how = f"top-1, {head}, hf-epimer {__version__}"
    entries = [
        huggingface_hub.EvalResultEntry(
            dataset_id=task.dataset,
            task_id=task_id,
            value=round(100 * results.tasks[task.name].accuracy, 2),
            dataset_revision=data_revision(task),
            notes=f"split {results.measured_on[task.name].split}, {how}",
        )
        for task, task_id in benchmarks(named, tasks)
    ]
    content = yaml.safe_dump(huggingface_hub.eval_result_entries_to_yaml(entries), sort_keys=False)
    (folder / FILE).parent.mkdir()
    (folder / FILE).write_text(content, encoding="utf-8")
