"""The merged folder: the files that stand beside the weights and tell where they come from, and its way to the Hub.

merge_config.json   the recipe with pinned references: `hf-epimer merge --config` repeats it
merge_report.json   what happened in every layer
results.json        accuracies, where they were measured
accuracy.png        the same as a picture, where matplotlib is installed
.eval_results/      those that the Hub shall list on the benchmarks' leaderboards
README.md           the model card
"""

from __future__ import annotations

import logging
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_epimer import plotting
from hf_epimer.checkpoints.manifest import publishable
from hf_epimer.checkpoints.reader import read_json
from hf_epimer.checkpoints.writer import write_json
from hf_epimer.hub.push import push_folder
from hf_epimer.hub.refs import check_new_repo_id
from hf_epimer.hub.rights import check_not_an_input, check_push_access
from hf_epimer.lora.peft_files import ADAPTER_CONFIG
from hf_epimer.methods.statistic import STATISTICS_FILES
from hf_epimer.models.source import HEADS
from hf_epimer.pipeline.card import merge_card
from hf_epimer.pipeline.eval_results import write_eval_results
from hf_epimer.pipeline.picture import accuracy_bars
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.recipe import recipe_to_json
from hf_epimer.pipeline.report import MergeReport

if TYPE_CHECKING:
    from hf_epimer.evaluation.results import Results

logger = logging.getLogger(__name__)

CONFIG, REPORT, RESULTS, CARD = "merge_config.json", "merge_report.json", "results.json", "README.md"
PICTURE = "accuracy.png"


def write_records(folder: Path, plan: Plan, report: MergeReport, results: Results | None) -> None:
    """Write the files above into a folder that has the weights."""
    write_json(folder / CONFIG, recipe_to_json(plan.recipe) | _conversions(plan) | {"versions": _versions()})
    write_json(folder / REPORT, report.to_json())
    if results:
        write_json(folder / RESULTS, results.to_json())
    if results and plan.recipe.eval_results:
        write_eval_results(folder, plan.recipe.eval_results, plan.tasks, results)
    picture = _draw(folder, plan, results) if results else None
    heads = sorted(file.stem for file in (folder / HEADS).glob("*.safetensors"))
    (folder / CARD).write_text(merge_card(plan, report, results, picture, heads), encoding="utf-8")


def _draw(folder: Path, plan: Plan, results: Results) -> str | None:
    """Draw the accuracies for the card; the picture's name, or None, with a word about it, without matplotlib."""
    if not plotting.available():
        logger.warning("the card has no picture of the accuracies: %s", plotting.MISSING)
        return None
    plotting.save({PICTURE: accuracy_bars(results, plan.recipe.limit)}, folder)
    return PICTURE


def push_merged(folder: Path, repo_id: str, *, private: bool = False, create_pr: bool = False) -> str:
    """Push a folder that `merge` has written; also the second try after a failed push.

    Returns:
        The address of the commit or pull request.

    Raises:
        UsageError: `repo_id` is no name for a repo, or one of the models that were merged.
        OutputError: it is no merged folder, or not a whole one.
        AccessError, PushError: as in `merge`.
    """
    check_new_repo_id(repo_id)
    publishable(folder)
    config = read_json(folder / CONFIG, str(folder))
    named = [str(text) for text in (config.get("base"), *config["models"])]
    inputs = [text.rpartition("=")[2].partition("@")[0] for text in named]
    check_not_an_input(repo_id, inputs)
    check_not_an_input(check_push_access(repo_id, create_pr=create_pr, private=private), inputs)
    return push(folder, repo_id, private=private, create_pr=create_pr)


def push(folder: Path, repo_id: str, *, private: bool, create_pr: bool) -> str:
    """Push a complete merged folder to where pushing is known to be allowed; the address of the commit or request.

    Raises:
        OutputError: it is no merged folder, or not a whole one.
        PushError: with the command that tries again.
    """
    config = read_json(folder / CONFIG, str(folder))
    files = publishable(folder)
    kind = "adapters" if ADAPTER_CONFIG in files else "checkpoints"
    title = f"Merge {len(config['models'])} {kind} with {config['method']} (hf-epimer)"
    outdated = [file.name for file in STATISTICS_FILES]  # they are of the weights beside which they lie
    return push_folder(folder, files, repo_id, private=private, create_pr=create_pr, title=title, outdated=outdated)


def _conversions(plan: Plan) -> dict[str, Any]:
    """For the record: which commits are those of a bot's pull request, and what was asked for instead."""
    conversions = {
        f"{source.title}@{source.ref.revision}": asdict(source.conversion)
        for source in (plan.base, *(model.source for model in plan.models))
        if source.conversion
    }
    return {"conversions": conversions} if conversions else {}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("hf-epimer", "torch", "safetensors", "huggingface_hub", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
