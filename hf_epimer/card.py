"""The model card of a merge: metadata the Hub understands, and a body a person can check.

The text is `card_template.md`; this module only fills it in. No local path gets into a card: a checkpoint that is a
folder appears under the folder's name.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_epimer.config import MergeRecipe, ModelRef, is_repo_id
from hf_epimer.errors import MismatchError
from hf_epimer.hub import Source
from hf_epimer.methods.base import Method

if TYPE_CHECKING:
    from hf_epimer.evaluation import Results

TEMPLATE = Path(__file__).with_name("card_template.md")


def merge_card(
    recipe: MergeRecipe,
    method: Method,
    base: Source,
    models: Sequence[Source],
    weights: Sequence[float],
    diagnostics: dict[str, str],
    datasets: Sequence[str],
    results: Results | None = None,
    *,
    as_adapter: bool = False,
) -> str:
    """The README.md of a merged folder.

    Args:
        recipe: pinned.
        weights: l_t, summing to 1.
        diagnostics: what to show of the report, label -> text.
        datasets: Hub ids of the data sets the models were tuned on.
        results: accuracies, where it was evaluated; of a part of the test images (`recipe.limit`) they are in the body
            only, where their number stands beside them.
        as_adapter: the result is an adapter of the base; a full checkpoint otherwise.
    """
    name = (
        recipe.push_to.split("/")[1] if recipe.push_to else Path(recipe.out or f"merged-{method.name}").resolve().name
    )
    parents = [base] if as_adapter else models
    on_hub = [source.ref.location for source in parents if not source.ref.is_local]
    rank = {"out_rank": recipe.out_rank} if recipe.out_rank else {}
    data = ModelCardData(
        base_model=on_hub or None,
        base_model_relation="adapter" if as_adapter else "merge",
        library_name="peft" if as_adapter else "transformers",
        pipeline_tag="image-feature-extraction",
        tags=["merge", "hf-epimer", "clip", *(["lora"] if as_adapter else []), method.name],
        datasets=list(datasets) or None,
        model_name=name if results and not recipe.limit else None,
        eval_results=_eval_results(results) if results and not recipe.limit else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        count=len(models),
        as_adapter=as_adapter,
        method=method,
        base=_row(base),
        models=[_row(m) | {"weight": f"{w:.4g}"} for m, w in zip(models, weights, strict=True)],
        calibrated_on=recipe.samples if recipe.calibrate else None,
        results=_results_table(results) if results else None,
        limit=recipe.limit,
        options=asdict(recipe.options) | rank | {"seed": recipe.seed, "exact": recipe.exact},
        diagnostics=diagnostics,
        command=_command(recipe),
        load_from=recipe.push_to or name,
        citation=method.paper.bibtex(),
    )
    return str(card)


STATISTICS = {
    "fisher.safetensors": (
        "Fisher information",
        "the diagonal of this model's Fisher information (the mean square of every entry of the per-sample gradients)",
    ),
    "kronecker.safetensors": (
        "Kronecker factors",
        "Kronecker factors of this model's curvature: the second moments of every layer's inputs and output gradients",
    ),
}


def statistics_section(file: str, repo_id: str, header: dict[str, str]) -> str:
    """What the card of a checkpoint says about a file of statistics that lies beside its weights.

    Args:
        file: its name.
        header: the metadata in it.
    """
    title, what = STATISTICS[file]
    dataset, revision = header["dataset"], header["dataset_revision"][:12]
    compress = f", stored as {header['compress']}" if header.get("compress") else ""
    return (
        f"## {title}\n\n"
        f"`{file}` holds {what}, measured on {header['samples']} samples of `{dataset}` (commit `{revision}`) with "
        f"{header['labels']} labels, seed {header['seed']}{compress}, of the weights at commit "
        f"`{header['model_sha'][:12]}`. With it the model can be merged without data:\n\n"
        f"    hf-epimer merge {repo_id} OTHER ... --push-to ORG/NAME\n"
    )


def _row(source: Source) -> dict[str, str]:
    ref = source.ref
    if ref.is_local:
        name = ref.name.replace("|", "\\|")
        return {"label": source.label, "link": f"`{name}` (local folder)", "commit": "", "load": ref.name, "pin": ""}
    link = f"[{ref.location}](https://huggingface.co/{ref.location})"
    pin = f', revision="{ref.revision}"'
    commit = f"`{(ref.revision or '')[:12]}`"
    return {"label": source.label, "link": link, "commit": commit, "load": ref.location, "pin": pin}


def _command(recipe: MergeRecipe) -> str:
    """What was typed, with local folders by their names only."""
    if not recipe.command:
        return "hf-epimer merge --config merge_config.json"
    return "hf-epimer " + shlex.join(_without_path(word) for word in recipe.command)


def _without_path(word: str) -> str:
    label, equals, rest = word.rpartition("=")
    path = Path(rest).expanduser()
    looks_local = path.is_absolute() or rest.startswith((".", "~")) or path.exists()
    return f"{label}{equals}{path.name}" if looks_local and path.name else word


def _eval_results(results: Results) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=results.datasets[task],
            dataset_name=task,
            metric_type="accuracy",
            metric_value=round(row.accuracy, 4),
        )
        for task, row in results.tasks.items()
    ]


def _results_table(results: Results) -> dict[str, Any]:
    return {
        "rows": [
            {
                "task": task,
                "accuracy": f"{row.accuracy:.3f}",
                "interval": "{:.3f} to {:.3f}".format(*row.interval),
                "samples": row.samples,
            }
            for task, row in results.tasks.items()
        ],
        "average": f"{results.average:.3f}",
        "worst_task": results.worst,
        "worst": f"{results.tasks[results.worst].accuracy:.3f}",
    }


def with_results(card: str, results: Results, name: str) -> str:
    """A card with the accuracies in its metadata (model-index), beside or instead of older ones of the same tasks."""
    content = ModelCard(card, ignore_metadata_errors=True)
    data: Any = content.data
    new = _eval_results(results)
    measured = {entry.dataset_name for entry in new}
    data.model_name = data.model_name or name
    data.eval_results = [*(old for old in data.eval_results or [] if old.dataset_name not in measured), *new]
    return str(content)


def base_from_cards(cards: Sequence[tuple[Source, dict[str, Any]]]) -> tuple[ModelRef | None, str]:
    """The base model on which all cards that name one agree, or None and why not.

    A card with several base models is a merge's: it names none. The card of a local folder may name a folder, absolute
    or relative to itself (or, as PEFT writes it, to the working directory, if it cannot be a Hub id); one from the Hub
    names Hub ids and nothing else.

    Args:
        cards: every checkpoint with its card's metadata; for an adapter `base_model` and `revision`
            as its config has them, which is then `said_in`.

    Raises:
        MismatchError: a card names something that is neither.
    """
    named: dict[str, ModelRef] = {}
    for source, card in cards:
        base = card.get("base_model")
        choices = base if isinstance(base, list) else [base]
        if len(choices) == 1 and choices[0]:
            named[source.label] = _named_base(source, str(choices[0]), card)
    bases = {ref.location for ref in named.values()}
    revisions = {ref.revision for ref in named.values()} - {None}
    if len(bases) == 1 and len(revisions) <= 1:  # one that names no revision agrees with one that does
        return max(named.values(), key=lambda ref: ref.revision or ""), ""
    if not bases:
        return None, "no model card names a base_model"
    listed = ", ".join(f"{label} says {base}" for label, base in named.items())
    return None, f"the models disagree on base_model: {listed}"


def _named_base(source: Source, name: str, card: dict[str, Any]) -> ModelRef:
    if source.ref.is_local:
        places = [Path(source.ref.location), *([] if is_repo_id(name) else [Path()])]
        if folder := next((place / name for place in places if (place / name).is_dir()), None):
            return ModelRef(str(folder.resolve()))
    if not is_repo_id(name):
        where = card.get("said_in", "its card")
        raise MismatchError(f"{source}: {where} names base_model {name!r}, which cannot be found; name it with --base")
    return ModelRef(name, card.get("revision"))
