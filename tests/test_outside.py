"""Small texts of strangers: bounded in size and depth, never waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_epimer.outside import Unreadable, exists, expanded, parse_json, parse_yaml, read_text

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("parse", "text", "why"),
    [
        (parse_json, "[" * 100_000, "nested too deeply"),
        (parse_json, '{"a":' * 100_000, "nested too deeply"),
        (parse_json, "1" * 5000, "not valid JSON"),
        (parse_json, "{", "not valid JSON"),
        (parse_yaml, "[" * 100_000, "nested too deeply"),
        (parse_yaml, BOMB, "aliases"),
        (parse_yaml, "a: 1" + "0" * 5000, "not valid YAML"),
        (parse_yaml, "a: [", "not valid YAML"),
        (parse_yaml, "!!python/object/apply:os.system ['true']", "not valid YAML"),
        (parse_yaml, "? [a]\n: b", "not valid YAML"),
        (parse_yaml, "a: 2024-99-99", "not valid YAML"),
    ],
)
def test_texts_that_would_never_end(parse: object, text: str, why: str) -> None:
    assert callable(parse)
    with pytest.raises(Unreadable, match=why) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


def test_plain_texts_are_read() -> None:
    assert parse_json('{"a": [1, "ü"]}') == {"a": [1, "ü"]}
    assert parse_yaml("a: [1, ü]\nb: true") == {"a": [1, "ü"], "b": True}


@pytest.mark.timeout(10)
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(Unreadable, match="no ordinary file"):
            read_text(path)


def test_a_file_that_is_too_large_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 11)
    with pytest.raises(Unreadable, match="larger than"):
        read_text(tmp_path / "a", largest=10)
    assert read_text(tmp_path / "a", largest=11) == "x" * 11
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(Unreadable, match="no UTF-8"):
        read_text(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "b")


def test_names_that_no_file_can_have_do_not_exist() -> None:
    assert not exists(Path("x" * 300))
    assert not exists(Path("a\0b"))
    with pytest.raises(ValueError, match="no such user"):
        expanded("~nosuchuser/x")
