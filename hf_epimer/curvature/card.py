"""What the card of a checkpoint says about the statistics that lie beside its weights."""

from __future__ import annotations

from hf_epimer.methods.statistic import StatisticsFile


def statistics_section(file: StatisticsFile, repo_id: str, header: dict[str, str]) -> str:
    """What the card of a checkpoint says about a file of statistics that lies beside its weights.

    Args:
        header: the metadata in it.
    """
    dataset, revision = header["dataset"], header["dataset_revision"][:12]
    compress = f", stored as {header['compress']}" if header.get("compress") else ""
    return (
        f"## {file.title}\n\n"
        f"`{file.name}` holds {file.description}, measured on {header['samples']} samples of `{dataset}` (commit "
        f"`{revision}`) with {header['labels']} labels, seed {header['seed']}{compress}, of the weights at commit "
        f"`{header['model_sha'][:12]}`. With it the model can be merged without data:\n\n"
        f"    hf-epimer merge {repo_id} OTHER ... --push-to ORG/NAME\n"
    )
