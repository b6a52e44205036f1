"""`hf-epimer methods`: what each method needs, and which models it takes."""

from __future__ import annotations

import json

from helpers.command import Run
from hf_epimer.methods import METHODS


def test_every_method_says_which_models_it_takes(run: Run) -> None:
    code, out, _ = run("methods", "--json")
    described = json.loads(out)
    assert code == 0 and described.keys() == METHODS.keys()
    assert {name: row["models"] for name, row in described.items() if name in ("tsv-m", "epimer-core", "fisher")} == {
        "tsv-m": "any",
        "epimer-core": "any",
        "fisher": "families",
    }
    assert "docs/families.md" in run("methods")[1]
