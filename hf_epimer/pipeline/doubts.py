"""What a merge shows of its inputs that is likely a mistake, or spoils the result: a line for each, with a remedy."""

from __future__ import annotations

from collections.abc import Sequence

from hf_epimer.merging.report import LayerReport, curvature_shares, further_than_their_base, spiked_shares
from hf_epimer.pipeline.plan import Plan

SPIKED = 0.05
"""Share of a task vector that stands out among the others' from which on it is worth a line: of twelve checkpoints of
many classes, in nine sets, none had more than .03; of three of two classes one had .03, the others .08 and .24."""

DOMINANT = 0.8
"""Share of the summed curvature with which one task decides a merge that takes curvature at its own size."""


def doubts(plan: Plan, layers: Sequence[LayerReport]) -> list[str]:
    """One sentence for each, after all layers have been merged."""
    names = [str(model) for model in plan.models]
    labels = [model.label for model in plan.models]
    return [
        *(
            f"{names[number]} differs from the base {plan.base} by more than its norm: is it the right one?"
            for number in further_than_their_base(layers)
        ),
        *(spiked(label, share) for label, share in zip(labels, spiked_shares(layers)) if share >= SPIKED),
        *(dominant(label, share) for label, share in zip(labels, curvature_shares(layers)) if share >= DOMINANT),
    ]


def spiked(label: str, share: float) -> str:
    """A checkpoint that moved every layer along few directions, which the other tasks' inputs share."""
    return (
        f"{label} stands out among the tasks with {share:.0%} of its task vector, as checkpoints of two classes, or "
        "stopped early, do: it would spoil the others, which is why epimer-core cuts it off (--cap)"
    )


def dominant(label: str, share: float) -> str:
    """A task whose loss is so much steeper that a literal mean is its alone."""
    return f"{label} has {share:.0%} of all curvature, so the merge is nearly its alone: --normalize trace mends that"
