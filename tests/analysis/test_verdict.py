"""The verdict of a diagnosis: its words follow from its numbers."""

from __future__ import annotations

import re

import pytest
import torch

from hf_epimer.analysis.verdict import RankTotals, verdict
from hf_epimer.numerics.diagnostics import CurvatureDiagnosis


def totals(
    kept: float = 0.7, *, share: float = 0.1, equal: float = 0.1, inside: float = 2.0, outside: float = 1.0,
    traces: tuple[float, ...] = (1, 1, 1), rank: int = 8, beside: float = 0.0,
) -> RankTotals:  # fmt: skip
    curvature = CurvatureDiagnosis(share, 1, equal, 1, inside, outside, 1, traces)
    return RankTotals(rank, 0, (0.9, kept, 0.9), (0.95, 0.95, 0.95), curvature, (0.12, 0.3), beside)


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ([totals(share=0.004)], "curvature will hardly matter: at rank 8 eta is 0.4%.*isotropy deviation 0.12"),
        ([totals(equal=0.004)], "only as one weight per task and layer.*10.0%.*0.4% once"),
        ([totals(equal=0.03)], "can matter, mostly as one weight.*10.0%.*3.0% once"),
        ([totals()], "Curvature can matter: at rank 8"),
        ([totals(traces=(1, 8, 1))], "b has 80% of all curvature.*--normalize trace"),
        ([totals(outside=9, rank=4), totals(outside=3)], "R_S 3, V_S of the matrices 2.; R_S falls .*9 at rank 4"),
        ([totals(outside=3.2, rank=4), totals(outside=3)], "rank makes little difference .R_S 3.2 at rank 4"),
        ([totals(outside=9, rank=2), totals(outside=2, rank=4), totals(outside=3)], "rank 4 leaves out least .R_S 2"),
        ([totals(outside=3)], "R_S 3, V_S of the matrices 2.\\.$"),
        ([totals(beside=1.6, outside=2.1, inside=3.0)], "R_S 2.1, V_S of the matrices 1.4"),
        ([totals(0.2, rank=4), totals(0.4), totals(0.6, rank=16)], "Ranks below 16 .* of b .rank 8: 40% of b kept"),
        ([totals(0.2)], "Even rank 8 .* of b .20% of b kept; its own directions alone would keep 95%"),
        ([totals(0.6, rank=4), totals()], "Every rank keeps at least half .*rank 4: 60% of b"),
    ],
)
def test_the_verdict_follows_its_rules(given: list[RankTotals], pattern: str) -> None:
    found = verdict("abc", given, torch.eye(3))
    assert any(re.search(pattern, sentence) for sentence in found), found
    assert len([sentence for sentence in found if re.search("[Cc]urvature (can|will|acts)", sentence)]) == 1
    assert ("of all curvature" in " ".join(found)) == (given[-1].curvature.traces != (1, 1, 1))  # type: ignore[union-attr]
    assert ("R_S" in " ".join(found)) == (given[-1].curvature.residual > 2)  # type: ignore[union-attr]


def test_the_verdict_on_directions() -> None:
    gram = torch.tensor([[1, -0.2, 0], [-0.2, 1, 0.05], [0, 0.05, 1]]).double()
    assert verdict("abc", [totals()], gram)[-2] == "Tasks that point against each other: a and b (cosine -0.20)."
    assert verdict("abc", [totals()], gram.abs())[-2].endswith("(cosines from 0.00 to 0.20).")
    assert "at most one" in verdict("ab", [totals()], torch.diag(torch.tensor([1.0, 0.0])))[-2]


def test_the_verdict_names_a_checkpoint_that_stands_out_and_a_method() -> None:
    *_, named, method = verdict("abc", [totals()], torch.eye(3), (0.01, 0.25, 0.0))
    assert re.match("b stands out among the tasks with 25% of its task vector", named)
    assert re.search("with images of every task the plain command.*else by the task vectors", method)
    *others, method = verdict("abc", [totals()], torch.eye(3), (0.01, 0.04, 0.0))
    assert "stands out" not in " ".join(others) + method
