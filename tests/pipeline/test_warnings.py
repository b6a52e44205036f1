"""What may be right but is more likely a mistake: said in a warning with the reason, and merged all the same."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.checkpoints import StateDict, card, rewrite, tiny_fisher, tiny_state, write_checkpoint
from helpers.command import Run, fails
from helpers.hub_server import StandInHub
from hf_epimer.hub.refs import ModelRef
from hf_epimer.models.clip import CLIP
from hf_epimer.models.source import resolve_model


def warned(result: tuple[int, str, str], *patterns: str) -> None:
    """Exit code 0, and one warning for every pattern."""
    code, _, complaint = result
    assert code == 0, complaint
    lines = complaint.splitlines()
    assert len(lines) == len(patterns), complaint
    for pattern in patterns:
        assert any(re.search(f"^warning: .*{pattern}", line) for line in lines), (pattern, complaint)


def mean(zoo: Path, *models: object) -> list[object]:
    return ["merge", *models, "--base", zoo / "base", "--method", "mean", "--out", zoo / "out"]


# --- models ---------------------------------------------------------------------------------------------------------


def test_the_same_weights_under_two_names(tiny_zoo: Path, run: Run) -> None:
    shutil.copytree(tiny_zoo / "a", tiny_zoo / "copy")
    (tiny_zoo / "copy" / "README.md").write_text("another card")
    models = [tiny_zoo / name for name in ("a", "b", "copy")]
    warned(run(*mean(tiny_zoo, *models)), "a and copy=.*copy have the same weights under two names")
    code, _, complaint = run(*mean(tiny_zoo, *models[:2]), "--overwrite")
    assert (code, complaint) == (0, "")


def test_weights_that_may_not_be_read_are_called_that(
    tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def denied(path: object, *flags: Any, **more: Any) -> int:
        if str(path) == str(tiny_zoo / "a" / "model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *flags, **more)  # type: ignore[arg-type]

    def refused(*pair: object, **how: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # root may read everything
    monkeypatch.setattr(filecmp, "cmp", refused)
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--method", "mean"]
    fails(run(*words, "--out", tiny_zoo / "out"), r"a: .*model.safetensors may not be read \(permission denied\)")


def test_the_same_weights_in_two_repos(empty_hub: StandInHub, tmp_path: Path, run: Run, base_state: StateDict) -> None:
    empty_hub.add_repo("org/base", write_checkpoint(tmp_path / "base", base_state))
    for name, seed in (("dtd", 1), ("svhn", 2), ("copy", 1)):
        folder = write_checkpoint(tmp_path / name, tiny_state(seed, base_state), card=card("org/base"))
        empty_hub.add_repo(f"org/{name}", folder)
    words = ["merge", "org/dtd", "org/svhn", "org/copy", "--method", "mean", "--dry-run"]
    warned(run(*words), "org/dtd@.* and copy=org/copy@.* have the same weights under two names")
    assert not [request for request in empty_hub.requests if request.path.endswith("model.safetensors")]


def test_a_label_that_card_or_name_contradicts(tiny_zoo: Path, run: Run) -> None:
    (tiny_zoo / "a").rename(tiny_zoo / "vit-dtd")
    (tiny_zoo / "b" / "README.md").write_text("---\ndatasets: [ufldl-stanford/svhn]\n---\n")
    wrong = [f"resisc45={tiny_zoo / 'vit-dtd'}", f"mnist={tiny_zoo / 'b'}"]
    said = ["vit-dtd is labelled resisc45, but its card or name speaks of dtd", "labelled mnist, but .* of svhn"]
    warned(run(*mean(tiny_zoo, *wrong)), *said)
    right = [f"dtd={tiny_zoo / 'vit-dtd'}", f"my-own={tiny_zoo / 'b'}"]
    code, _, complaint = run(*mean(tiny_zoo, *right), "--overwrite")
    assert (code, complaint) == (0, "")


@pytest.mark.parametrize(
    ("origin", "is_said"),
    [
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", True),
        ("OpenAI/CLIP-ViT-Base-Patch32", False),
        ("org/a", False),
        ("/home/ann/run-3", False),
        ("./out", False),
        (["org/x"], False),
    ],
)
def test_a_base_by_shape_that_a_config_contradicts(
    origin: object, is_said: bool, empty_hub: StandInHub, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(CLIP), "known_base", lambda self, config: "openai/clip-vit-base-patch32")
    base = tiny_state(0)
    empty_hub.add_repo("openai/clip-vit-base-patch32", write_checkpoint(tmp_path / "base", base))
    empty_hub.add_repo("org/a", write_checkpoint(tmp_path / "a", tiny_state(1, base), config={"_name_or_path": origin}))
    code, _, complaint = run("merge", "org/a", "--method", "mean", "--dry-run")
    assert code == 0, complaint
    said = "the base is taken to be openai/clip-vit-base-patch32, by its shape, but its config.json says that it comes"
    assert (said in complaint) is is_said, complaint


# --- statistics -----------------------------------------------------------------------------------------------------


def epimer(zoo: Path, *models: object) -> list[object]:
    return ["merge", *models, "--base", zoo / "base", "--method", "epimer", "--rank", 4, "--out", zoo / "out"]


def measured(folder: Path, **header: str) -> None:
    metadata = {"format": "hf-epimer.fisher/1", "samples": "8", "labels": "true", "seed": "0", **header}
    save_file(tiny_fisher(3), folder / "fisher.safetensors", metadata=metadata)


COMMIT = "1" * 40


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"task": "dtd", "model": "a", "model_sha": ""}, None),
        ({"task": "mnist", "model": "a", "model_sha": ""}, "measured on a, task mnist, and is used for .*task dtd"),
        ({"task": "", "model": "someone/else", "model_sha": COMMIT}, "measured on someone/else@111111111111, and"),
        ({"task": "dtd", "model": "org/a", "model_sha": COMMIT}, None),
        ({"task": "DTD", "model": "a", "model_sha": ""}, None),
        ({"task": "dtd", "model": "a", "model_sha": "2" * 64}, "measured on a@222222222222, task dtd, and is used"),
        ({"task": "dtd", "model": "other", "model_sha": "2" * 64}, "measured on other@222222222222, task dtd"),
        ({}, None),
    ],
)
def test_statistics_of_another_model_or_task(
    header: dict[str, str], said: str | None, tiny_zoo: Path, run: Run
) -> None:
    measured(tiny_zoo / "a", **header)
    result = run(*epimer(tiny_zoo, f"dtd={tiny_zoo / 'a'}", tiny_zoo / "b"))
    warned(result, *([said] if said else []))


def test_statistics_are_held_against_the_weights(tiny_zoo: Path, run: Run) -> None:
    words = epimer(tiny_zoo, tiny_zoo / "a", tiny_zoo / "b")
    sha = resolve_model(ModelRef(str(tiny_zoo / "a"))).content_sha
    for stated, said in ((sha, []), ("2" * 64, ["it was measured on a@222222222222, and is used for a="])):
        measured(tiny_zoo / "a", model="a", model_sha=stated)
        warned(run(*words, "--overwrite"), *said)


def test_published_statistics_are_those_of_their_repo(
    empty_hub: StandInHub, tmp_path: Path, run: Run, base_state: StateDict
) -> None:
    """A file that is pushed makes another commit, which is no contradiction; the name of another repo is one."""
    empty_hub.add_repo("org/base", write_checkpoint(tmp_path / "base", base_state))
    for name, model in (("dtd", "Org/DTD"), ("svhn", "org/dtd")):
        folder = write_checkpoint(tmp_path / name, tiny_state(len(name), base_state))
        (folder / "README.md").write_text(card("org/base"))
        measured(folder, model=model, model_sha=COMMIT)
        empty_hub.add_repo(f"org/{name}", folder)
    words = ["merge", "org/dtd", "org/svhn", "--method", "epimer", "--rank", 4, "--out", "out"]
    warned(run(*words), r"of svhn .*measured on org/dtd@1{12}, and is used for svhn=org/svhn@")


def test_curvature_that_is_zero_everywhere(tiny_zoo: Path, run: Run) -> None:
    rewrite(tiny_zoo / "a", lambda s: [value.zero_() for value in s.values()], "fisher.safetensors")
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--method", "fisher"]
    warned(run(*words, "--out", tiny_zoo / "out"), r"of a \(fisher.safetensors\): zero everywhere")


# --- merges of merges -----------------------------------------------------------------------------------------------


def test_a_merge_of_merges_finds_its_base_in_their_recipes(
    empty_hub: StandInHub, tmp_path: Path, run: Run, base_state: StateDict
) -> None:
    empty_hub.add_repo("org/base", write_checkpoint(tmp_path / "base", base_state))
    for number in range(1, 5):
        folder = write_checkpoint(tmp_path / f"t{number}", tiny_state(number, base_state))
        (folder / "README.md").write_text(card("org/base"))
        empty_hub.add_repo(f"org/t{number}", folder)
    pairs = (("org/t1", "org/t2"), ("org/t3",))  # the card of the latter calls org/t3 its base model
    for number, pair in enumerate(pairs, start=1):
        assert run("merge", *pair, "--method", "mean", "--out", f"m{number}", "--push-to", f"org/m{number}")[0] == 0
    for merges in (("m1", "m2"), ("org/m1", "org/m2"), ("org/m1", "org/t4"), ("m2", "org/t4")):
        code, output, complaint = run("merge", *merges, "--method", "mean", "--json", "--dry-run")
        assert (code, complaint) == (0, ""), complaint
        assert json.loads(output)["base"].startswith("base=org/base@")


def forgotten(folder: Path) -> None:
    (folder / "merge_config.json").unlink()


def of_a_folder_that_is_gone(folder: Path) -> None:
    content = json.loads((folder / "merge_config.json").read_text())
    (folder / "merge_config.json").write_text(json.dumps({**content, "base": "/nowhere/base"}))


def nonsense(folder: Path) -> None:
    (folder / "merge_config.json").write_text(json.dumps({"base": ["x"]}))


@pytest.mark.parametrize("damage", [forgotten, of_a_folder_that_is_gone, nonsense])
def test_merges_that_do_not_tell_their_base(damage: Callable[[Path], None], tiny_zoo: Path, run: Run) -> None:
    assert run(*mean(tiny_zoo, tiny_zoo / "a", tiny_zoo / "b"))[0] == 0
    code, output, _ = run("merge", tiny_zoo / "out", "--method", "mean", "--dry-run", "--json")
    assert code == 0 and json.loads(output)["base"] == f"base={tiny_zoo / 'base'}"
    damage(tiny_zoo / "out")
    code, _, complaint = run("merge", tiny_zoo / "out", "--method", "mean", "--dry-run")
    assert code == 2 and "name the base with --base" in complaint


# --- what only the merge itself shows -------------------------------------------------------------------------------


def test_a_checkpoint_that_would_spoil_the_others(tiny_zoo: Path, run: Run) -> None:
    base = load_file(tiny_zoo / "base" / "model.safetensors")

    def along_one_direction(state: StateDict) -> None:
        for name, value in state.items():
            if value.ndim == 2:
                state[name] = value + 2 * (value - base[name]).norm() / value.numel() ** 0.5

    rewrite(tiny_zoo / "c", along_one_direction)
    words = ["merge", *(tiny_zoo / name for name in "abc"), "--base", tiny_zoo / "base", "--out", tiny_zoo / "out"]
    complaint = r"c stands out among the tasks with \d\d% of its task vector.*--cap"
    warned(run(*words, "--metric", "task-vectors"), complaint)
    warned(run(*words, "--method", "tsv-m", "--overwrite"), complaint)
    code, _, said = run(*words, "--method", "mean", "--overwrite")
    assert (code, said) == (0, "")


def test_a_task_that_decides_a_literal_merge(tiny_zoo: Path, run: Run) -> None:
    rewrite(tiny_zoo / "b", lambda state: [value.mul_(100) for value in state.values()], "fisher.safetensors")
    words = ["merge", *(tiny_zoo / name for name in "abc"), "--base", tiny_zoo / "base", "--out", tiny_zoo / "out"]
    literal = ["--method", "epimer", "--preset", "paper"]
    warned(run(*words, *literal), r"b has 9\d% of all curvature, .*--normalize trace")
    code, _, complaint = run(*words, "--method", "epimer", "--overwrite")
    assert (code, complaint) == (0, "")
