"""The demonstration zoo at its smallest: layout, repeatability, completeness, and what the drawings promise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.classifiers import load_classifier
from hf_epimer.demo.captions import FAMILIES, all_texts, captioned_drawings, make_tokenizer
from hf_epimer.demo.drawings import DRAWINGS, KINDS
from hf_epimer.demo.zoo import ZooSize, make_zoo
from hf_epimer.errors import OutputError
from hf_epimer.evaluation.accuracy import accuracy
from hf_epimer.models.clip import CLIP
from hf_epimer.tasks.task import infer_task, load_task_file

SMALL = ZooSize(
    captioned=60, pretrain_steps=2, pretrain_batch=16, train=24, test=12, tune_steps=2, tune_batch=8, fisher=2
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such small matrices gain nothing from threads, and lose much when other work shares the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def zoo(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("demo") / "zoo", seed=3, size=SMALL)


def test_every_file_of_the_layout_is_there(zoo: Path) -> None:
    model = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {entry.name for entry in zoo.iterdir()} == {"base", "datasets", "tasks", "zoo.json", *FAMILIES}
    base = {entry.name for entry in (zoo / "base").iterdir()}
    assert {*model, "tokenizer_config.json"} <= base
    assert base - model <= CLIP.zero_shot.files  # type: ignore[union-attr]
    for name in FAMILIES:
        assert {entry.name for entry in (zoo / name).iterdir()} == model | {"fisher.safetensors"}
        data = {entry.name for entry in (zoo / "datasets" / name / "data").iterdir()}
        assert data == {"train-00000-of-00001.parquet", "test-00000-of-00001.parquet"}
    summary = json.loads((zoo / "zoo.json").read_text())
    assert summary["seed"] == 3
    assert set(summary["tasks"]) == set(FAMILIES)


def test_towers_and_fisher_share_the_names_of_the_base(zoo: Path) -> None:
    base = load_file(zoo / "base" / "model.safetensors")
    expected = {name: value.shape for name, value in base.items() if name.startswith("vision_model.")}
    for name in FAMILIES:
        tower = load_file(zoo / name / "model.safetensors")
        fisher = load_file(zoo / name / "fisher.safetensors")
        assert {key: value.shape for key, value in tower.items()} == expected
        assert {key: value.shape for key, value in fisher.items()} == expected
        assert all(bool((value >= 0).all()) for value in fisher.values())
        assert any(not torch.equal(value, base[key]) for key, value in tower.items())
        with safe_open(zoo / name / "fisher.safetensors", "pt") as file:
            assert (file.metadata()["task"], file.metadata()["samples"]) == (name, "2")


def test_recorded_accuracies_come_back_from_the_files(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    recorded = json.loads((zoo / "zoo.json").read_text())["tasks"]
    for name in ("shapes", "signs"):
        task = load_task_file(zoo / "tasks" / f"{name}.yaml")
        for folder, key in ((zoo / "base", "zero_shot"), (zoo / name, "fine_tuned")):
            found = accuracy(load_classifier(folder, zoo / "base", task, task.class_names or ()), task, "test")
            assert found.samples == SMALL.test
            assert found.accuracy == pytest.approx(recorded[name][key])
        assert infer_task(repo_name=name, tasks={name: task}) is task


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_leaves_the_generators_alone(zoo: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected, numbers = torch.rand(1), np.random.get_state()[1].tolist()
    torch.manual_seed(5)
    again = make_zoo(tmp_path / "again", seed=3, size=SMALL)
    assert torch.equal(torch.rand(1), expected)
    assert np.random.get_state()[1].tolist() == numbers
    other = make_zoo(tmp_path / "other", seed=4, size=SMALL)
    for file in ("base/model.safetensors", "base/tokenizer.json", "digits/model.safetensors"):
        assert (zoo / file).read_bytes() == (again / file).read_bytes()
    for file in ("base/model.safetensors", "datasets/digits/data/test-00000-of-00001.parquet"):
        assert (zoo / file).read_bytes() != (other / file).read_bytes()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        if stage == "digits":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_zoo(tmp_path / "zoo", interrupt, size=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_complete_zoo_is_kept_and_another_folder_refused(zoo: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    before = (zoo / "zoo.json").stat().st_mtime_ns
    assert make_zoo(zoo, lambda stage, fraction: stages.append(stage), seed=9, size=SMALL) == zoo
    assert stages == []
    assert (zoo / "zoo.json").stat().st_mtime_ns == before
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match="holds no zoo"):
        make_zoo(tmp_path, size=SMALL)


@pytest.mark.parametrize("family", list(KINDS))
def test_drawings_depend_on_kind_seed_and_difficulty_alone(family: str) -> None:
    def picture(kind: str, seed: int, difficulty: float) -> bytes:
        image = DRAWINGS[family](kind, np.random.default_rng(seed), difficulty)
        assert image.mode == "RGB"
        assert image.size == (32, 32)
        return image.tobytes()

    kinds = KINDS[family]
    assert len({picture(kind, 0, 0.5) for kind in kinds}) == len(kinds)
    assert picture(kinds[0], 0, 0.5) == picture(kinds[0], 0, 0.5)
    assert len({picture(kinds[0], seed, d) for seed in (0, 1) for d in (0.0, 1.0)}) == 4


def test_every_word_of_every_caption_is_one_known_token() -> None:
    tokenizer = make_tokenizer(all_texts())
    captions = captioned_drawings(300, np.random.default_rng(0))[1]
    for caption in captions:
        pieces = tokenizer.tokenize(caption)
        assert "".join(pieces).replace("</w>", " ").strip() == caption.lower().replace(".", " .")
        assert all(piece.endswith("</w>") for piece in pieces)


@pytest.mark.slow
def test_the_demo_command_merges_and_measures_in_five_ways(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_epimer.cli.main import main
    from hf_epimer.demo import run

    monkeypatch.setattr(run, "zoo_folder", lambda: zoo)
    assert main(["demo", "--json", "--out", str(tmp_path / "merges")]) == 0
    accuracy_of = json.loads(capsys.readouterr().out)["accuracy"]
    assert set(accuracy_of) == {"zero-shot", "fine-tuned", *run.MERGES}
    for method in run.MERGES:
        assert set(accuracy_of[method]) == set(FAMILIES)
        card = (tmp_path / "merges" / method.replace(", ", "-") / "README.md").read_text()
        assert ("Then calibrated" in card) == method.endswith("calibrated")
    assert main(["demo", "--quiet", "--out", str(tmp_path / "merges")]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("merged: epimer", "and calibrated", "average", "worst", "try next"))


def test_merge_with_evaluate_writes_results_and_puts_them_into_the_card(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard

    from hf_epimer.cli.main import main

    names = list(FAMILIES)[:2]
    files = [str(zoo / "tasks" / f"{name}.yaml") for name in names]
    models = [str(zoo / name) for name in names]
    words = [
        "merge",
        *models,
        "--base",
        str(zoo / "base"),
        "--evaluate",
        "--task",
        *files,
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert set(results) == {"model", "base", "tasks", "average", "worst", "mixed_precision"}
    for name in names:
        row = results["tasks"][name]
        task = load_task_file(zoo / "tasks" / f"{name}.yaml")
        found = accuracy(load_classifier(tmp_path / "o", zoo / "base", task, task.class_names or ()), task, "test")
        assert (row["correct"], row["samples"]) == (found.correct, found.samples)
        assert row["accuracy"] == pytest.approx(found.accuracy)
    assert results["average"] == pytest.approx(np.mean([row["accuracy"] for row in results["tasks"].values()]))
    assert results["worst"]["accuracy"] == min(row["accuracy"] for row in results["tasks"].values())
    card = ModelCard.load(tmp_path / "o" / "README.md")
    shown = {(entry.dataset_name, entry.metric_value) for entry in card.data.eval_results or ()}
    assert shown == {(name, round(row["accuracy"], 4)) for name, row in results["tasks"].items()}
    assert "| **average** |" in str(card)
