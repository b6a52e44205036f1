"""`rank_pattern` and `alpha_pattern`: as PEFT reads them, and never for longer than a moment."""

from __future__ import annotations

import re
import time

import pytest

from hf_epimer.errors import CheckpointError
from hf_epimer.lora.patterns import Patterns

MODULES = [
    f"vision_model.encoder.layers.{layer}.{module}"
    for layer in range(24)
    for module in (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
]


def by_peft(patterns: dict[str, float], module: str) -> float:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return -1


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 3, "layers.1.self_attn.k_proj": 4},
        {MODULES[5]: 1, "mlp.fc2": 2, MODULES[11]: 3},
        {r".*layers\.(1|2[0-3])\..*q_proj": 9, "q_proj": 2},
        {"^vision_model.*fc1": 5, "fc1": 6},
        {"fc1": 6, "^vision_model.*fc1": 5},
        {"^encoder.*": 5, "(q|k)_proj": 7},
        {r"encoder\.layers\.\d+\.mlp.fc2": 8},
        {"layers.[0-4].mlp.fc1$": 2, r"layers\.1\.mlp\.fc1": 3},
        {"mlp.fc1|fc2": 4, "proj": 3},
        {r"layers.(0|1|2|3|4|5|6|7|8|9|10|11)\..*(q|k|v)_proj": 3},
        {r"(?:.*)layers.[0-9]+.self_attn.q_proj": 1, "model.*encoder.*layers.*q_proj": 2},
        {r"\w+_proj": 4, "layers.1?.mlp.fc1": 5, r"layers\.\d{2}\.mlp.fc1": 6},
        {},
    ],
)
def test_values_are_those_that_peft_finds(patterns: dict[str, float]) -> None:
    read = Patterns("rank_pattern", patterns, "a")
    found = {module: read.value(module, -1) for module in MODULES}
    assert found == {module: by_peft(patterns, module) for module in MODULES}
    assert not patterns or len(set(found.values())) > 1


SLOW: tuple[dict[str, float], ...] = (
    {"(a+)+$": 1},
    {"((a|b)*)*c": 1},
    {"(.*)*x": 1},
    {"(?=.*)x": 1},
    {".*" * 12 + "X": 1},
    {r"\w?" * 60 + "X": 1},
    {r"(\w|.)" * 30 + "X": 1},
    {"a" * 400 + "*": 1},
    {f".*.*.*X{number}": 1 for number in range(99)},
    {f".*X{number}": 1 for number in range(9999)},
    {str(number): 1 for number in range(100_000)},
)


@pytest.mark.parametrize("patterns", SLOW, ids=[next(iter(patterns))[:12] for patterns in SLOW])
@pytest.mark.timeout(20)
def test_what_would_never_end_is_refused_at_once(patterns: dict[str, float]) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^x: adapter_config.json: .*rank_pattern") as refused:
        Patterns("rank_pattern", patterns, "x: adapter_config.json")
    assert time.monotonic() - started < 5
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("key", [r"(\w|\w|.)" * 10 + "X", r"\w?" * 16 + "X", ".*.*.*X", r"\w{1,99}\w{1,99}\w{1,99}X"])
@pytest.mark.timeout(60)
def test_what_is_matched_takes_a_moment(key: str) -> None:
    patterns = Patterns("rank_pattern", {key: 1}, "x")
    started = time.monotonic()
    assert {patterns.value(module, 2) for module in MODULES} == {2}
    assert time.monotonic() - started < 30  # about 3 s; as PEFT matches them, minutes to ages


@pytest.mark.parametrize(
    ("patterns", "why"),
    [
        ({"(": 4}, "no simple expression"),
        ({"[": 4}, "no simple expression"),
        ({"a)": 4}, "no simple expression"),
        ({"[b-a]": 4}, "no expression"),
        ({"q_proj": None}, "is None, not a number"),
        ({"q_proj": "4"}, "is '4', not a number"),
        ({"q_proj": True}, "is True, not a number"),
        ({"q_proj": float("nan")}, "is nan, not a number"),
        ([1], "no object"),
        ("q_proj", "no object"),
    ],
)
def test_values_that_make_no_sense(patterns: object, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        Patterns("alpha_pattern", patterns, "a")
