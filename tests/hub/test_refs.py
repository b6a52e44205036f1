"""References as people type them: labels of any alphabet, home folders, addresses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_epimer.errors import AccessError, EpimerError, UsageError
from hf_epimer.hub.refs import LONGEST_LABEL, ModelRef
from hf_epimer.hub.resolve import resolve


def test_a_folder_and_a_label_may_have_letters_of_any_alphabet(tmp_path: Path) -> None:
    for name in ("模型", "Ünïcode", "_x", "9"):
        (tmp_path / name).mkdir()
        ref = ModelRef.parse(f"{name}={tmp_path / name}")
        assert (ref.label, ref.location) == (name, str(tmp_path / name))
        assert ModelRef.parse(str(ref)) == ref


def test_a_subfolder_stands_behind_the_revision() -> None:
    for text, expected in {
        "org/a:unet": ModelRef("org/a", subfolder="unet"),
        "x=org/a@refs/pr/3:models/image_encoder": ModelRef("org/a", "refs/pr/3", "x", "models/image_encoder"),
    }.items():
        assert ModelRef.parse(text) == expected and str(expected) == text
    for text in ("org/a:", "org/a:../b", "org/a:/b", "org/a:b/", "org/a:unet@main", "org/a@:unet", "folder:unet"):
        with pytest.raises(UsageError, match="of the form org/name or org/name@revision:subfolder"):
            ModelRef.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://huggingface.co/org/a", "https://huggingface.co/org/a is a URL"),
        ("dtd=https://huggingface.co/org/a/tree/main", "https://huggingface.co/org/a/tree/main is a URL"),
        ("HTTPS://hf.co/org/a?token=secret#x", "HTTPS://hf.co/org/a is a URL"),
        ("https://ann:secret@huggingface.co/org/a", "https://huggingface.co/org/a is a URL"),
        ("huggingface.co/org/a", "huggingface.co/org/a is a URL"),
        ("hf://org/a", "hf://org/a is a URL"),
        ("s3://bucket/a?signature=secret", "s3://bucket/a is a URL"),
        ("file:///models/a", "file:///models/a is a URL"),
    ],
)
def test_an_address_is_called_one_and_its_secrets_are_not_shown(text: str, shown: str) -> None:
    for local in (True, False):
        with pytest.raises(UsageError, match="org/name") as refused:
            ModelRef.parse(text, local=local)
        assert shown in str(refused.value)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300 + "=org/a",
        "a" * (LONGEST_LABEL + 1) + "=org/a",
        "~nosuchuser/a",
        "x=~nosuchuser",
        "/" + "x" * 300,
        "-=org/a",
    ],
)
def test_what_cannot_be_a_reference_is_said_in_our_words(text: str) -> None:
    with pytest.raises(EpimerError) as refused:
        ModelRef.parse(text)
    assert "Errno" not in str(refused.value)
    assert "label" in str(refused.value) or "home" in str(refused.value) or "does not exist" in str(refused.value)


def test_the_home_folder_behind_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    assert ModelRef.parse("dtd=~/a").location == str(tmp_path / "a")


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_a_folder_that_may_not_be_read_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)  # root may read everything
    with pytest.raises(AccessError, match="the folder may not be read"):
        resolve(ModelRef(str(tmp_path)))
