"""hf_epimer: merge fine-tuned CLIP vision models from the Hugging Face Hub without training.

    from hf_epimer import EpiMerConfig, MergeRecipe, ModelRef, merge, merge_state_dicts

Names are imported on first use (PEP 562), so that `hf-epimer --help` pays for neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_epimer.analysis.diagnosis import diagnose
    from hf_epimer.analysis.diagnosis_report import Diagnosis
    from hf_epimer.analysis.landscape.landscape import Landscape, landscape
    from hf_epimer.analysis.sweep.grid import Grid
    from hf_epimer.analysis.sweep.report import SweepReport
    from hf_epimer.analysis.sweep.sweep import sweep
    from hf_epimer.curvature.data_pass import estimate_fisher
    from hf_epimer.curvature.files import save_statistics
    from hf_epimer.curvature.trainer import FisherCallback, fisher_from_adam
    from hf_epimer.demo import ZOO_TASKS, zoo_folder
    from hf_epimer.demo.zoo import make_zoo
    from hf_epimer.errors import EpimerError
    from hf_epimer.evaluation.accuracy import accuracy, evaluate
    from hf_epimer.evaluation.predict import predict
    from hf_epimer.evaluation.results import Results
    from hf_epimer.hub.push import push_folder
    from hf_epimer.hub.refs import ModelRef
    from hf_epimer.merging.state_dicts import merge_state_dicts
    from hf_epimer.methods import METHODS
    from hf_epimer.methods.epimer import EpiMerConfig
    from hf_epimer.methods.options import Option
    from hf_epimer.pipeline.folder import push_merged
    from hf_epimer.pipeline.merge import merge
    from hf_epimer.pipeline.plan import Plan
    from hf_epimer.pipeline.planner import make_plan
    from hf_epimer.pipeline.recipe import MergeRecipe
    from hf_epimer.pipeline.report import MergeReport
    from hf_epimer.tasks.task import Task

__version__ = "0.1.0"

_HOMES = {
    "Diagnosis": "analysis.diagnosis_report",
    "EpiMerConfig": "methods.epimer",
    "FisherCallback": "curvature.trainer",
    "EpimerError": "errors",
    "Grid": "analysis.sweep.grid",
    "Landscape": "analysis.landscape.landscape",
    "METHODS": "methods",
    "MergeRecipe": "pipeline.recipe",
    "MergeReport": "pipeline.report",
    "ModelRef": "hub.refs",
    "Option": "methods.options",
    "Plan": "pipeline.plan",
    "SweepReport": "analysis.sweep.report",
    "Task": "tasks.task",
    "ZOO_TASKS": "demo",
    "Results": "evaluation.results",
    "accuracy": "evaluation.accuracy",
    "diagnose": "analysis.diagnosis",
    "estimate_fisher": "curvature.data_pass",
    "evaluate": "evaluation.accuracy",
    "fisher_from_adam": "curvature.trainer",
    "landscape": "analysis.landscape.landscape",
    "make_plan": "pipeline.planner",
    "make_zoo": "demo.zoo",
    "merge": "pipeline.merge",
    "merge_state_dicts": "merging.state_dicts",
    "predict": "evaluation.predict",
    "push_folder": "hub.push",
    "push_merged": "pipeline.folder",
    "save_statistics": "curvature.files",
    "sweep": "analysis.sweep.sweep",
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
    "Option",
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
