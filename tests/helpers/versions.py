"""What only newer releases of the libraries can do; make test-lowest runs the rest."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version


def needs_transformers(since: str, what: str) -> None:
    """Skip the test where an older transformers is installed."""
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"{what}: for transformers from {since} on")
