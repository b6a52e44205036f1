"""What a merged folder may publish, and files that come into it later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.checkpoints.manifest import FILES, entering, find_foreign, publishable, read_manifest
from hf_epimer.errors import OutputError

RECORD = "merge_config.json"
RECIPE = {"method": "mean", "models": ["a"], "options": {}, "versions": {}}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "merged", RECORD) as folder:
        (folder / RECORD).write_text(json.dumps(RECIPE))
        (folder / "README.md").write_text("card")
        (folder / "config.json").write_text("{}")
        save_file({"a": torch.ones(300)}, folder / "model.safetensors")
    return tmp_path / "merged"


def test_the_manifest_lists_everything_but_its_own_record(merged: Path) -> None:
    content = json.loads((merged / RECORD).read_text())
    assert {key: content[key] for key in RECIPE} == RECIPE
    assert sorted(content[FILES]) == ["README.md", "config.json", "model.safetensors"]
    assert content[FILES]["README.md"] == {"size": 4, "sha256": hashlib.sha256(b"card").hexdigest()}
    assert find_foreign(merged) is None


def test_nothing_but_what_the_merge_wrote_is_published(merged: Path) -> None:
    for name in (".env", "id_rsa", "optimizer.pt", "model-00001-of-00002.safetensors"):
        (merged / name).write_text("secret")
    (merged / "more").mkdir()
    (merged / "more" / "README.md").write_text("secret")
    (merged / "README.md").write_text("an edited card")
    assert publishable(merged) == ["README.md", "config.json", RECORD, "model.safetensors"]


def test_files_in_folders_below_are_ours_too(tmp_path: Path) -> None:
    for _ in range(2):
        with atomic_folder(tmp_path / "merged", RECORD, overwrite=True) as folder:
            (folder / RECORD).write_text(json.dumps(RECIPE))
            (folder / "heads").mkdir()
            for name in ("model.safetensors", "heads/dtd.safetensors"):
                save_file({"a": torch.ones(300)}, folder / name)
    merged = tmp_path / "merged"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]  # the first was replaced and is gone
    assert find_foreign(merged) is None
    (merged / "heads" / "of-mine.safetensors").write_text("mine")
    assert publishable(merged) == ["heads/dtd.safetensors", RECORD, "model.safetensors"]
    assert find_foreign(merged) == "heads/of-mine.safetensors was not written by hf-epimer"
    (merged / "heads" / "dtd.safetensors").write_bytes(b"cut")
    with pytest.raises(OutputError, match=r"heads/dtd\.safetensors has 3 bytes instead of"):
        publishable(merged)


def test_of_a_folder_from_before_manifests_the_names_of_a_merge_are_published(merged: Path) -> None:
    (merged / RECORD).write_text(json.dumps(RECIPE))
    (merged / ".env").write_text("secret")
    assert publishable(merged) == ["README.md", "config.json", RECORD, "model.safetensors"]


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_weights(folder: Path) -> None:
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")


def linked_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to("../elsewhere")


def linked_card(folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("../secret")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_record(folder: Path) -> None:
    (folder / RECORD).unlink()


def nonsense(folder: Path) -> None:
    (folder / RECORD).write_text('{"method": "mean"}')


def no_models(folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps(RECIPE | {"models": 5}))


DAMAGES: list[tuple[Callable[[Path], None], str, bool]] = [  # whether it is found without a manifest, too
    (cut, "model.safetensors", True),
    (emptied, "model.safetensors", True),
    (gone, "model.safetensors.* is missing", True),
    (other_weights, "model.safetensors has .* bytes instead of", False),
    (linked_weights, "model.safetensors.* is a link", True),
    (linked_card, "README.md.* is a link", True),
    (without_config, "config.json.* is missing", False),
    (no_record, "there is no merge_config.json", True),
    (nonsense, "its merge_config.json is no recipe", True),
    (no_models, "its merge_config.json is no recipe", True),
]


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize(
    ("damage", "why", "is_seen_without"), DAMAGES, ids=[damage.__name__ for damage, _, _ in DAMAGES]
)
def test_a_folder_that_is_not_whole_is_not_published(
    damage: Callable[[Path], None], why: str, is_seen_without: bool, has_manifest: bool, merged: Path
) -> None:
    if not has_manifest:
        (merged / RECORD).write_text(json.dumps(RECIPE))
    damage(merged)
    if has_manifest or is_seen_without:
        with pytest.raises(OutputError, match=why):
            publishable(merged)
    else:
        assert publishable(merged)


def test_a_missing_shard_is_found_without_a_manifest(merged: Path) -> None:
    (merged / RECORD).write_text(json.dumps(RECIPE))
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (merged / "model.safetensors").rename(merged / shards["a"])
    (merged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(OutputError, match=r"model-00002-of-00002.safetensors is missing"):
        publishable(merged)
    (merged / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(OutputError, match="no index of shards"):
        publishable(merged)


def test_a_file_that_the_program_adds_later_is_its_own(merged: Path) -> None:
    for text in ("{}", '{"a": 1}'):
        with entering(merged / "results.json"):
            (merged / "results.json").write_text(text)
        assert find_foreign(merged) is None
    assert "results.json" in publishable(merged)
    (merged / "results.json").write_text("[]")
    assert find_foreign(merged) == "results.json was changed after hf-epimer wrote it"


def test_what_somebody_else_wrote_or_edited_stays_theirs(merged: Path) -> None:
    for name in ("README.md", "results.json"):
        (merged / name).write_text("by hand")
        with entering(merged / name):
            (merged / name).write_text("by hand, and some accuracies")
        assert find_foreign(merged) is not None
        (merged / name).unlink()
    assert find_foreign(merged) is None


def test_beside_no_record_nothing_is_entered(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with entering(tmp_path / "results.json"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert read_manifest(tmp_path) is None
