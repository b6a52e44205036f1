"""Files of strangers that would hang or fill a program: one line of error, or a warning, at once."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.command import Run, contents, fails

pytestmark = pytest.mark.timeout(60)

DEEP = "[" * 100_000
BOMB = "---\na: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)


def with_header(file: Path, header: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def a_million_tensors(file: Path) -> None:
    entries = ",".join(f'"t{n}":{{"dtype":"F32","shape":[],"data_offsets":[0,0]}}' for n in range(1_000_000))
    with_header(file, f"{{{entries}}}".encode())


def endless(file: Path) -> None:
    with_header(file, b"{}", length=2**63)


def nested(file: Path) -> None:
    with_header(file, b'{"a":' * 100_000)


def no_tensors(file: Path) -> None:
    with_header(file, b'{"a": 1}')


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES = [a_million_tensors, endless, nested, no_tensors, a_pipe]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["a/model.safetensors", "base/model.safetensors", "a/fisher.safetensors"])
def test_safetensors_that_promise_too_much(file: str, damage: Callable[[Path], None], tiny_zoo: Path, run: Run) -> None:
    damage(tiny_zoo / file)
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--method", "epimer", "--rank", 4]
    started = time.monotonic()
    fails(run(*words, "--out", tiny_zoo / "out"), "safetensors|Fisher")
    assert time.monotonic() - started < 20
    assert contents(tiny_zoo) == ["a", "b", "base", "c"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, '{"weight_map": ' + DEEP, " " * (5 * 2**20) + "{}"])
def test_json_that_has_no_end(name: str, text: str, tiny_zoo: Path, run: Run) -> None:
    if name != "config.json":
        (tiny_zoo / "a" / "model.safetensors").rename(tiny_zoo / "a" / "x.safetensors")
    (tiny_zoo / "a" / name).write_text(text)
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--method", "mean"]
    fails(run(*words, "--out", tiny_zoo / "out"), "a[:/].*json")


def test_an_index_names_no_file_elsewhere(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "a" / "model.safetensors").rename(tiny_zoo / "a" / "x.safetensors")
    for name in ("../b/model.safetensors", str(tiny_zoo / "b" / "model.safetensors"), "/dev/zero"):
        index = {"weight_map": {"vision_model.post_layernorm.bias": name}}
        (tiny_zoo / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
        words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean", "--out", tiny_zoo / "out"]
        fails(run(*words), "shard .* is missing")


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ('{"weight_map": {}}', "it names no file"),
        ('{"weight_map": {"a": 1, "b": "x"}}', "is not a safetensors index"),
        ('{"weight_map": {"a": "' + "x" * 10**6 + '"}}', "shard x+ ... x* ?named by .* is missing"),
        ('{"weight_map": {"a": "' + "x" * 17 * 2**20 + '"}}', "larger than 16 MiB"),
    ],
    ids=["empty", "numbers", "a long name", "a flood"],
)
def test_an_index_that_is_none_is_one_short_line(index: str, why: str, tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "a" / "model.safetensors").rename(tiny_zoo / "a" / "x.safetensors")
    (tiny_zoo / "a" / "model.safetensors.index.json").write_text(index)
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean", "--out", tiny_zoo / "out"]
    result = run(*words)
    fails(result, why)
    assert len(result[2]) < 3000


@pytest.mark.parametrize("card", [BOMB + "---\n", f"---\na: {DEEP}\n---\n", "---\n" + "a: 1\n" * 500_000 + "---\n"])
def test_a_card_that_would_fill_the_memory_is_not_read(card: str, tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "a" / "README.md").write_text(card)
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean", "--out", tiny_zoo / "out"]
    started = time.monotonic()
    code, _, complaint = run(*words)
    assert time.monotonic() - started < 20
    assert code == 0
    assert complaint.count("\n") == 1
    assert complaint.startswith("warning: ") and "README.md has no readable metadata" in complaint
    assert len(complaint) < 500


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**9},
        {"image_size": 10**9, "patch_size": 1},
        {"hidden_act": "x" * 10**6},
    ],
)
def test_a_config_that_promises_a_giant(entries: dict[str, object], tiny_zoo: Path, run: Run) -> None:
    for folder in ("a", "base"):
        content = json.loads((tiny_zoo / folder / "config.json").read_text()) | entries
        (tiny_zoo / folder / "config.json").write_text(json.dumps(content))
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean", "--out", tiny_zoo / "out"]
    started = time.monotonic()
    code, _, complaint = run(*words)
    assert code == 1 and complaint.count("\n") == 1 and len(complaint) < 500, complaint[:500]
    assert time.monotonic() - started < 10


def test_links_in_a_folder_lead_to_nothing_that_is_published(tiny_zoo: Path, run: Run) -> None:
    """Whatever a stranger's folder links to, the merge has its own files only."""
    secret = tiny_zoo / "secret.txt"
    secret.write_text("hf_secret")
    for name in ("notes.txt", "merges.txt", "LICENSE", "results.json"):
        (tiny_zoo / "base" / name).symlink_to(secret)
    shutil.copy(tiny_zoo / "base" / "config.json", tiny_zoo / "config.json")
    (tiny_zoo / "base" / "config.json").unlink()
    (tiny_zoo / "base" / "config.json").symlink_to("../config.json")
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean", "--out", tiny_zoo / "out"]
    assert run(*words)[0] == 0
    for path in (tiny_zoo / "out").iterdir():
        assert not path.is_symlink()
        assert b"hf_secret" not in path.read_bytes()
