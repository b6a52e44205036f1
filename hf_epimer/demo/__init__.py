"""A small zoo of CLIP vision models, drawn and trained on the spot, to try merging without network or downloads."""

from __future__ import annotations

from pathlib import Path

ZOO_TASKS = ("shapes", "digits", "textures", "signs")
"""The zoo's tasks, each with a model of its own; known before it is made."""


def zoo_folder() -> Path:
    """Where the zoo is kept: beside the Hub's own cache, so that HF_HOME moves both."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf-epimer" / "demo-zoo-1"
