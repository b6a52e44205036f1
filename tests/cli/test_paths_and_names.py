"""What people type where a file, folder, label or task is meant, and what a stranger's files call things."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from helpers.command import Run, contents, fails
from hf_epimer.hub.refs import LONGEST_LABEL


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_a_home_folder_behind_a_flag(tiny_zoo: Path, home: Path, run: Run) -> None:
    shutil.copytree(tiny_zoo, home / "zoo")
    words = ["merge", "~/zoo/a", "b=~/zoo/b", "--base=~/zoo/base", "--method=mean"]
    assert run(*words, "--out=~/merged")[0] == 0
    assert run("merge", "--config=~/merged/merge_config.json", "--out=~/again")[0] == 0
    assert run("diagnose", "~/zoo/a", "~/zoo/b", "--base=~/zoo/base", "--out=~/look")[0] == 0
    assert {"again", "look", "merged", "zoo"} <= set(contents(home))
    assert not Path("~").exists()
    for flag in ("--out=~nosuchuser/x", "--config=~nosuchuser/x", "--task=~nosuchuser/x"):
        code, _, complaint = run(*words, flag)
        assert code == 2
        assert "no such user" in complaint and "DEBUG" not in complaint
    fails(run("push", "~nosuchuser/x", "org/merged"), "no such user", 2)


def test_folders_with_letters_of_any_alphabet_are_merged_again_from_their_recipe(tiny_zoo: Path, run: Run) -> None:
    shutil.copytree(tiny_zoo / "a", tiny_zoo / "模型")
    shutil.copytree(tiny_zoo / "b", tiny_zoo / ("long-" * 30))
    words = ["merge", tiny_zoo / "模型", tiny_zoo / ("long-" * 30), "--base", tiny_zoo / "base", "--method", "mean"]
    assert run(*words, "--out", tiny_zoo / "first")[0] == 0
    models = json.loads((tiny_zoo / "first" / "merge_config.json").read_text())["models"]
    assert models[0].startswith("模型=") and len(models[1].split("=")[0]) <= LONGEST_LABEL
    code, _, complaint = run("merge", "--config", tiny_zoo / "first/merge_config.json", "--out", tiny_zoo / "second")
    assert code == 0, complaint
    same = [(tiny_zoo / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert same[0] == same[1]


def test_a_label_that_is_too_long_is_an_error_that_says_so(tiny_zoo: Path, run: Run) -> None:
    fails(run("merge", f"{'a' * 300}={tiny_zoo / 'a'}", "--method", "mean"), "a label has at most 64 characters", 2)


@pytest.mark.timeout(60)
def test_a_pipe_for_a_file_is_refused_at_once(tiny_zoo: Path, run: Run, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    merge = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--method", "mean"]
    fails(run("merge", "--config", pipe), "--config .*it is no ordinary file", 2)
    fails(run(*merge, "--task", pipe), "pipe.json: cannot be read as a task file: it is no ordinary file")
    fails(run("evaluate", tiny_zoo / "a", "--task", pipe), "pipe.json: cannot be read as a task file")
    fails(run("evaluate", tiny_zoo / "a", "--task", "dtd", "--fine-tuned", pipe), "no ordinary file", 2)
    task = {"name": "x", "dataset": "org/x", "head": str(pipe)}
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    fails(run("merge", "--config", tmp_path / "deep.json"), "nested too deeply", 2)
    fails(run(*merge, "--task", tmp_path / "deep.json"), "nested too deeply")


NAMES = ["../../escaped", "/tmp/escaped", "a/b", "..", ".hidden", "a\nb", "a\x1b[2Jb", " a", "a ", "x" * 65, "-rf", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_a_name_and_no_path(name: str, clip_zoo: Path, own_home: None, run: Run, tmp_path: Path) -> None:
    task = {**json.loads((clip_zoo / "a.json").read_text()), "name": name, "dataset": str(clip_zoo / "data" / "a")}
    (tmp_path / "task.json").write_text(json.dumps(task))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    fails(run("evaluate", clip_zoo / "a", "--base", clip_zoo / "base", "--task", tmp_path / "task.json"), "name")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_names_of_any_alphabet_are_files_by_their_digest(clip_zoo: Path, own_home: None, run: Run) -> None:
    from huggingface_hub import constants

    task = {**json.loads((clip_zoo / "a.json").read_text()), "dataset": str(clip_zoo / "data" / "a")}
    for name in ("Stanford Cars", "数字"):
        Path("task.json").write_text(json.dumps({**task, "name": name}))
        code, output, complaint = run(
            "evaluate", clip_zoo / "a", "--base", clip_zoo / "base", "--task", "task.json", "--json"
        )
        assert code == 0, complaint
        assert list(json.loads(output)["tasks"]) == [name]
    made = contents(Path(constants.HF_HOME) / "hf-epimer" / "heads")
    assert len(made) == 2 and all(name.isascii() and " " not in name for name in made)


def test_a_misspelt_task_is_told_from_a_missing_file(clip_zoo: Path, run: Run) -> None:
    words = ["evaluate", clip_zoo / "a", "--base", clip_zoo / "base", "--task"]
    fails(run(*words, "minst"), "no task is called 'minst': did you mean mnist?")
    fails(run(*words, "nothing-like-it"), "no task is called 'nothing-like-it': known are")
    fails(run(*words, "nothing.yaml"), "nothing.yaml: cannot be read as a task file: No such file")


def test_evaluate_writes_over_its_own_files_only(clip_zoo: Path, own_home: None, run: Run, tmp_path: Path) -> None:
    words = ["evaluate", clip_zoo / "a", "--base", clip_zoo / "base", "--task", clip_zoo / "a.json", "--limit", 4]
    for text in ("years of work", '{"tasks": {}}', "[]"):
        (tmp_path / "thesis.tex").write_text(text)
        fails(run(*words, "--out", tmp_path / "thesis.tex"), "thesis.tex exists and is no results.json")
        assert (tmp_path / "thesis.tex").read_text() == text
    for _ in range(2):
        assert run(*words, "--out", tmp_path / "results.json")[0] == 0
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("years of work")
    fails(run(*words, "--confusion", tmp_path / "pictures"), r"a.png exists and was not drawn by hf-epimer")
    (tmp_path / "pictures" / "a.png").unlink()
    for _ in range(2):
        assert run(*words, "--confusion", tmp_path / "pictures")[0] == 0
    assert contents(tmp_path / "pictures") == ["a.png"]


def test_what_evaluate_adds_to_a_merged_folder_is_replaced_with_it(
    clip_zoo: Path, own_home: None, run: Run, tmp_path: Path
) -> None:
    words = [
        "merge",
        clip_zoo / "a",
        clip_zoo / "b",
        "--base",
        clip_zoo / "base",
        "--method",
        "mean",
        "--out",
        "merged",
    ]
    assert run(*words)[0] == 0
    measure = ["evaluate", "merged", "--base", clip_zoo / "base", "--task", clip_zoo / "a.json", "--limit", 4]
    assert run(*measure, "--out", "merged/results.json", "--update-card")[0] == 0
    code, _, complaint = run(*words, "--overwrite")
    assert code == 0, complaint
    assert "results.json" not in contents(tmp_path / "merged")
