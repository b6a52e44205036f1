"""hf_epimer: merge fine-tuned CLIP vision models from the Hugging Face Hub without training.

    from hf_epimer import EpiMerConfig, MergeRecipe, ModelRef, merge, merge_state_dicts

Names are imported on first use (PEP 562), so that `hf-epimer --help` pays for neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_epimer.config import MergeRecipe, ModelRef
    from hf_epimer.demo import ZOO_TASKS, zoo_folder
    from hf_epimer.demo.zoo import make_zoo
    from hf_epimer.diagnosis import Diagnosis, diagnose
    from hf_epimer.errors import EpimerError
    from hf_epimer.evaluation import Results, accuracy, evaluate
    from hf_epimer.grid import Grid
    from hf_epimer.in_memory import merge_state_dicts
    from hf_epimer.loss_landscape import Landscape, landscape
    from hf_epimer.methods import METHODS
    from hf_epimer.methods.epimer import EpiMerConfig
    from hf_epimer.pipeline import MergeReport, merge, push_merged
    from hf_epimer.planning import Plan, make_plan
    from hf_epimer.predicting import predict
    from hf_epimer.pushing import push_folder
    from hf_epimer.statistics.files import save_statistics
    from hf_epimer.statistics.sweep import estimate_fisher
    from hf_epimer.statistics.training import FisherCallback, fisher_from_adam
    from hf_epimer.sweep_report import SweepReport
    from hf_epimer.sweeping import sweep
    from hf_epimer.tasks import Task

__version__ = "0.1.0"

_HOMES = {
    "Diagnosis": "diagnosis",
    "EpiMerConfig": "methods.epimer",
    "FisherCallback": "statistics.training",
    "EpimerError": "errors",
    "Grid": "grid",
    "Landscape": "loss_landscape",
    "METHODS": "methods",
    "MergeRecipe": "config",
    "MergeReport": "pipeline",
    "ModelRef": "config",
    "Plan": "planning",
    "SweepReport": "sweep_report",
    "Task": "tasks",
    "ZOO_TASKS": "demo",
    "Results": "evaluation",
    "accuracy": "evaluation",
    "diagnose": "diagnosis",
    "estimate_fisher": "statistics.sweep",
    "evaluate": "evaluation",
    "fisher_from_adam": "statistics.training",
    "landscape": "loss_landscape",
    "make_plan": "planning",
    "make_zoo": "demo.zoo",
    "merge": "pipeline",
    "merge_state_dicts": "in_memory",
    "predict": "predicting",
    "push_folder": "pushing",
    "push_merged": "pipeline",
    "save_statistics": "statistics.files",
    "sweep": "sweeping",
    "zoo_folder": "demo",
}

__all__ = [
    "METHODS",
    "ZOO_TASKS",
    "Diagnosis",
    "EpiMerConfig",
    "EpimerError",
    "FisherCallback",
    "Grid",
    "Landscape",
    "MergeRecipe",
    "MergeReport",
    "ModelRef",
    "Plan",
    "Results",
    "SweepReport",
    "Task",
    "accuracy",
    "diagnose",
    "estimate_fisher",
    "evaluate",
    "fisher_from_adam",
    "landscape",
    "make_plan",
    "make_zoo",
    "merge",
    "merge_state_dicts",
    "predict",
    "push_folder",
    "push_merged",
    "save_statistics",
    "sweep",
    "zoo_folder",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"hf_epimer.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_epimer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
