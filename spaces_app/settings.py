"""Where the page runs and what it may spend: on a public Space strangers share one machine, at home it is one's own.

On a Space nothing is read with a token and no folder of the machine can be named. The owner of a copy on larger
hardware raises the limits with variables of the Space: EPIMER_SECONDS, EPIMER_GIGABYTES, EPIMER_MODELS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GIGABYTE = 10**9


@dataclass(frozen=True)
class Settings:
    """What is allowed; None for no limit.

    Attributes:
        on_space: whether this is a Hugging Face Space.
        seconds: for one merge, diagnosis or sweep.
        gigabytes: of weights and statistics that one of them may download.
        models: checkpoints at a time.
    """

    on_space: bool
    seconds: float | None
    gigabytes: float | None
    models: int | None

    @property
    def bytes(self) -> float:
        """`gigabytes`, to compare sizes with."""
        return float("inf") if self.gigabytes is None else self.gigabytes * GIGABYTE

    @classmethod
    def from_environment(cls) -> Settings:
        """As the environment has it."""
        on_space = bool(os.environ.get("SPACE_ID"))
        return cls(
            on_space=on_space,
            seconds=_number("EPIMER_SECONDS", 900 if on_space else None),
            gigabytes=_number("EPIMER_GIGABYTES", 8 if on_space else None),
            models=int(_number("EPIMER_MODELS", 8) or 8) if on_space else None,
        )


def on_zero_gpu() -> bool:
    """Whether this is a Space whose GPU is lent for seconds; what `spaces` looks at, too."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def _number(name: str, otherwise: float | None) -> float | None:
    word = os.environ.get(name)
    return float(word) if word else otherwise


def forget_token(nowhere: Path) -> None:
    """Make this process and its children anonymous on the Hub: a Space owner's token must open nothing to visitors.

    To be called before huggingface_hub is imported.

    Args:
        nowhere: a path at which there is no file.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
    os.environ["HF_TOKEN_PATH"] = str(nowhere)
