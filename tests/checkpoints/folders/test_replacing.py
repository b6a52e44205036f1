"""A result is replaced only where this program wrote all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.result_folders import RECORD, below, fill, result
from hf_epimer.checkpoints import folders
from hf_epimer.checkpoints.folders import atomic_folder, check_target
from hf_epimer.checkpoints.manifest import find_foreign
from hf_epimer.errors import OutputError


def test_a_folder_that_this_program_wrote_is_replaced(tmp_path: Path) -> None:
    out = result(tmp_path / "out", "old")
    check_target(out, overwrite=True)
    with atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (out / "README.md").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "people"]
    (out / "README.md").unlink()  # what is missing cannot be lost
    check_target(out, overwrite=True)


def somebodys(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


def named_like_ours(folder: Path) -> None:
    folder.mkdir()
    (folder / RECORD).write_text("{}")
    (folder / "model.safetensors").write_text("years of work")


def not_even_json(folder: Path) -> None:
    folder.mkdir()
    (folder / RECORD).write_text("[" * 100_000)


def with_a_note(folder: Path) -> None:
    (result(folder) / "notes.txt").write_text("mine")


def with_an_edited_card(folder: Path) -> None:
    (result(folder) / "README.md").write_text("y")


def with_other_weights(folder: Path) -> None:
    (result(folder) / "model.safetensors").write_bytes(b"longer weights")


def with_an_empty_folder(folder: Path) -> None:
    (result(folder) / "later").mkdir()


def with_a_folder_of_ones_own(folder: Path) -> None:
    (result(folder) / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "README.md").write_text("x")


def with_a_link_for_a_file(folder: Path) -> None:
    (folder.parent / "elsewhere.md").write_text("x")
    (result(folder) / "README.md").unlink()
    (folder / "README.md").symlink_to("../elsewhere.md")


def with_a_record_that_is_a_link(folder: Path) -> None:
    (result(folder) / RECORD).rename(folder.parent / "record.json")
    (folder / RECORD).symlink_to("../record.json")


def from_before_manifests_with_a_note(folder: Path) -> None:
    folder.mkdir()
    fill(folder)
    (folder / "notes.txt").write_text("mine")


FOREIGN: list[tuple[Callable[[Path], None], str]] = [
    (somebodys, "no record of hf-epimer"),
    (named_like_ours, "no record of hf-epimer"),
    (not_even_json, "no record of hf-epimer"),
    (with_a_note, "notes.txt was not written by hf-epimer"),
    (with_an_edited_card, "README.md was changed"),
    (with_other_weights, "model.safetensors was changed"),
    (with_an_empty_folder, "later/ was not written"),
    (with_a_folder_of_ones_own, "checkpoint-1/ was not written"),
    (with_a_link_for_a_file, "README.md is a link"),
    (with_a_record_that_is_a_link, "no record of hf-epimer"),
    (from_before_manifests_with_a_note, "notes.txt was not written"),
]


@pytest.mark.parametrize("way", ["directly", "by a link", "by dots", "by a link and dots"])
@pytest.mark.parametrize(("make", "why"), FOREIGN, ids=[make.__name__ for make, _ in FOREIGN])
def test_what_somebody_else_wrote_is_never_replaced(
    make: Callable[[Path], None], why: str, way: str, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    make(victim)
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "far" / "link").symlink_to(victim / ".." / "far" / "deep")
    named = {
        "directly": victim,
        "by a link": tmp_path / "link",
        "by dots": tmp_path / "far" / ".." / "victim",
        "by a link and dots": tmp_path / "far" / "link" / ".." / ".." / "victim",
    }[way]
    before = below(tmp_path)
    with pytest.raises(OutputError, match=why) as refused:
        check_target(named, overwrite=True)
    assert str(victim) in str(refused.value)
    with pytest.raises(OutputError, match=why), atomic_folder(named, RECORD, overwrite=True) as folder:
        fill(folder)
    assert below(tmp_path) == before


def test_a_result_from_before_manifests_is_replaced_where_every_name_is_one_of_a_merge(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    check_target(tmp_path / "out", overwrite=True)
    with atomic_folder(tmp_path / "out", RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (tmp_path / "out" / "README.md").read_text() == "new"


def test_a_manifest_from_a_stranger_points_nowhere_else(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (tmp_path / "precious").write_text("x")
    content = json.loads((out / RECORD).read_text())
    content["files"]["../precious"] = content["files"]["README.md"]
    (out / RECORD).write_text(json.dumps(content))
    records = "merge_config.json, diagnosis.json, sweep.json, conversion.json, landscape.json"
    assert find_foreign(out) == f"it has no record of hf-epimer ({records})"
    with pytest.raises(OutputError), atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder)
    assert (tmp_path / "precious").read_text() == "x"


def test_what_comes_into_the_folder_during_the_work_is_not_lost(tmp_path: Path) -> None:
    out = result(tmp_path / "out", "old")
    check_target(out, overwrite=True)
    with pytest.raises(OutputError, match=r"notes.txt was not written"), atomic_folder(out, RECORD, True) as folder:
        fill(folder, "new")
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "README.md").read_text() == "old"


def test_what_comes_in_while_two_folders_change_places_is_kept_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = result(tmp_path / "out", "old")
    original = folders._exchange

    def exchange(first: Path, second: Path) -> bool:
        (second / "notes.txt").write_text("mine")  # a moment after the last look
        return original(first, second)

    monkeypatch.setattr(folders, "_exchange", exchange)
    with atomic_folder(out, RECORD, overwrite=True) as folder:
        fill(folder, "new")
    assert (out / "README.md").read_text() == "new"
    (kept,) = tmp_path.glob("out-replaced-*")
    assert (kept / "notes.txt").read_text() == "mine"
    assert str(kept) in caplog.text
