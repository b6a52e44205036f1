"""The model card of a merge: metadata the Hub understands, and a body a person can check.

The text is `card_template.md`; this module only fills it in. No local path gets into a card: a checkpoint that is a
folder appears under the folder's name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from hf_epimer.hub.source import Source
from hf_epimer.pipeline.license import license_metadata, licenses
from hf_epimer.pipeline.plan import Plan
from hf_epimer.pipeline.recipe import MergeRecipe
from hf_epimer.pipeline.report import MergeReport

if TYPE_CHECKING:
    from hf_epimer.evaluation.results import Results

TEMPLATE = Path(__file__).with_name("card_template.md")


def merge_card(
    plan: Plan,
    report: MergeReport,
    results: Results | None = None,
    picture: str | None = None,
    heads: Sequence[str] = (),
) -> str:
    """The README.md of a merged folder.

    Args:
        results: accuracies, where it was evaluated; of a part of the test images (`recipe.limit`) they are in the body
            only, where their number stands beside them.
        picture: the name of the file that shows them, if there is one.
        heads: the labels of the classifiers that lie beside the weights.
    """
    recipe, method, architecture, as_adapter = plan.recipe, plan.method, plan.architecture, plan.writes_adapter
    name = recipe.push_to.split("/")[1] if recipe.push_to else recipe.target.resolve().name
    parents = [plan.base] if as_adapter else [model.source for model in plan.models]
    on_hub = [source.title for source in parents if not source.ref.is_local]
    rank = {"out_rank": recipe.out_rank} if recipe.out_rank else {}
    output = plan.output
    full = None if plan.has_heads else architecture.zero_shot
    data = ModelCardData(
        base_model=on_hub or None,
        base_model_relation="adapter" if as_adapter else "merge",
        library_name="peft" if as_adapter else architecture.library.partition(".")[0],
        pipeline_tag=_pipeline_tag(plan.base) if plan.treatment else _pipeline(recipe),
        tags=["merge", "hf-epimer", architecture.tag, *(["lora"] if as_adapter else []), method.name],
        datasets=_datasets(plan) or None,
        **license_metadata(plan),
        model_name=name if results and not recipe.limit else None,
        eval_results=_eval_results(results) if results and not recipe.limit else None,
    )
    # what ModelCard.from_template does, which would load the Hub's whole client
    return jinja2.Template(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        title=name,
        count=len(plan.models),
        as_adapter=as_adapter,
        method=method,
        architecture=architecture,
        output=output,
        full=full,
        is_full=recipe.full,
        heads=heads,
        licenses=licenses(plan),
        classes=", ".join(sorted({output.output_class, *([full.model_class] if full else [])})),
        base=_row(plan.base),
        treatment=plan.treatment.summary() if plan.treatment else None,
        has_tokenizer=architecture.library == "transformers" and "tokenizer_config.json" in plan.base.files,
        models=[_row(model.source) | {"weight": f"{model.weight:.4g}"} for model in plan.models],
        calibrated_on=recipe.samples if recipe.calibrate else None,
        refined=report.totals.get("refinement"),
        refined_on=max(report.totals["refinement"]["images"].values()) if recipe.refine else None,
        results=_results_table(results) if results else None,
        picture=picture,
        zero_shot=results is not None and results.zero_shot,
        limit=recipe.limit,
        options=asdict(recipe.options) | rank | {"seed": recipe.seed, "exact": recipe.exact},
        diagnostics=report.in_words(),
        command=_command(recipe),
        load_from=recipe.push_to or name,
        citation=method.paper.bibtex(),
    )


def _pipeline(recipe: MergeRecipe) -> str:
    """The task of transformers' pipelines that a merge serves."""
    return "zero-shot-image-classification" if recipe.full else "image-feature-extraction"


def _row(source: Source) -> dict[str, str]:
    ref = source.ref
    if ref.is_local:
        name = ref.name.replace("|", "\\|")
        return {"label": source.label, "link": f"`{name}` (local folder)", "commit": "", "load": ref.name, "pin": ""}
    link = f"[{source.title}](https://huggingface.co/{source.title})"
    pin = f', revision="{ref.revision}"'
    commit = f"`{(ref.revision or '')[:12]}`" + (f" ({source.conversion})" if source.conversion else "")
    return {"label": source.label, "link": link, "commit": commit, "load": source.title, "pin": pin}


def _pipeline_tag(base: Source) -> str | None:
    """What a base of no known family says that it is for."""
    tag = str(base.card.get("pipeline_tag"))
    return tag if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", tag) else None


def _command(recipe: MergeRecipe) -> str:
    """What was typed, or else the recipe's command line, with local folders and files by their names only."""
    words = ("hf-epimer", *recipe.command) if recipe.command else shlex.split(recipe.command_line())
    return shlex.join(map(_without_path, words))


def _without_path(word: str) -> str:
    label, equals, rest = word.rpartition("=")
    path = Path(rest).expanduser()
    looks_local = path.is_absolute() or rest.startswith((".", "~")) or path.exists()
    return f"{label}{equals}{path.name}" if looks_local and path.name else word


def _datasets(plan: Plan) -> list[str]:
    """Hub ids of the data sets that the models were tuned on."""
    return sorted({task.dataset for task in plan.tasks if not Path(task.dataset).is_absolute()})


class _TaskResult(EvalResult):
    """An accuracy that stays an entry of its own where another task has the same data set, config and split."""

    @property
    def unique_identifier(self) -> tuple[Any, ...]:
        return (*super().unique_identifier, self.dataset_name)


def _eval_results(results: Results) -> list[EvalResult]:
    return [
        _TaskResult(
            task_type="zero-shot-image-classification" if results.zero_shot else "image-classification",
            dataset_type=results.measured_on[task].dataset,
            dataset_config=results.measured_on[task].config,
            dataset_split=results.measured_on[task].split,
            dataset_name=task,
            metric_type="accuracy",
            metric_value=round(row.accuracy, 4),
        )
        for task, row in results.tasks.items()
    ]


def _results_table(results: Results) -> dict[str, Any]:
    beside = {"base": results.of_base, "fine-tuned": results.fine_tuned}
    known = {whose: accuracies for whose, accuracies in beside.items() if accuracies}
    return {
        "beside": list(known),
        "rows": [
            {
                "task": task,
                "accuracy": f"{row.accuracy:.3f}",
                "interval": "{:.3f} to {:.3f}".format(*row.interval),
                "samples": row.samples,
                "beside": [f"{accuracies[task]:.3f}" for accuracies in known.values()],
            }
            for task, row in results.tasks.items()
        ],
        "averages_beside": [f"{fmean(accuracies.values()):.3f}" for accuracies in known.values()],
        "average": f"{results.average:.3f}",
        "worst_task": results.worst,
        "worst": f"{results.tasks[results.worst].accuracy:.3f}",
    }


def with_results(card: str, results: Results, name: str) -> str:
    """A card with the accuracies in its metadata (model-index), beside or instead of older ones of the same tasks."""
    from huggingface_hub import ModelCard

    content = ModelCard(card, ignore_metadata_errors=True)
    data: Any = content.data
    new = _eval_results(results)
    measured = {entry.dataset_name for entry in new}
    data.model_name = data.model_name or name
    kept = [_TaskResult(**vars(old)) for old in data.eval_results or [] if old.dataset_name not in measured]
    data.eval_results = [*kept, *new]
    return str(content)
