"""What the card of a checkpoint says about the statistics that lie beside its weights."""

from __future__ import annotations

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
