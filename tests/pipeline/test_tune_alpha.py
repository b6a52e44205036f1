"""Choosing alpha by predictions, without labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.command import Run
from hf_epimer import ModelRef
from hf_epimer.models.classifier import Classifier
from hf_epimer.models.head import classifier_for
from hf_epimer.models.loading import load_tower
from hf_epimer.models.source import resolve_model
from hf_epimer.pipeline.tune_alpha import ALPHAS, nearest
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import load_task_file


@pytest.fixture
def words(clip_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    tasks = ("--task", clip_zoo / "a.json", clip_zoo / "b.json")
    models = (f"a={clip_zoo / 'a'}", f"b={clip_zoo / 'b'}", "--base", clip_zoo / "base")
    return ("merge", *models, *tasks, "--method", "task-arithmetic", "--samples", 24)


@torch.no_grad()
def predictions(model: Classifier, weights: dict[str, torch.Tensor], pictures: torch.Tensor) -> torch.Tensor:
    for name, parameter in model.tower_parameters().items():
        parameter.copy_(weights[name])
    return model(pictures).softmax(-1)


def test_the_chosen_alpha_is_the_one_with_the_nearest_predictions(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    """Against merges at every alpha, written by the command, and divergences by their definition."""
    code, out, err = run(*words, "--tune-alpha", "--weights", 3, 1, "--out", tmp_path / "m")
    assert code == 0, err
    home = resolve_model(ModelRef(str(clip_zoo / "base")))
    expected = {}
    for alpha in ALPHAS:
        folder = tmp_path / f"{alpha:g}"
        assert run(*words, "--alpha", alpha, "--weights", 3, 1, "--out", folder)[0] == 0
        expected[alpha] = 0.0
        for name, weight in (("a", 0.75), ("b", 0.25)):
            task = load_task_file(clip_zoo / f"{name}.json")
            samples = read_samples(task, task.train_split, limit=24, seed=0)
            model = classifier_for(load_tower(clip_zoo / "base"), home, home, task, samples.class_names)
            pictures = torch.cat([batch.inputs for batch in ImageBatches(samples, model.pixels, 7)])
            own, ours = (
                predictions(model, load_file(where / "model.safetensors"), pictures)
                for where in (clip_zoo / name, folder)
            )
            expected[alpha] += weight * float((own * (own.log() - ours.log())).sum(1).mean())
    best = min(expected, key=expected.__getitem__)
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    found = {float(alpha): value for alpha, value in report["totals"]["divergence_at_alpha"].items()}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert report["totals"]["alpha"] == best and f"alpha: {best:g}: where predictions" in out
    assert min(found, key=found.__getitem__) not in (ALPHAS[0], ALPHAS[-1])
    written = json.loads((tmp_path / "m" / "merge_config.json").read_text())
    assert written["options"]["alpha"] == best
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"| alpha | {best:g}: where predictions are nearest" in card and f"| alpha | {best} |" in card
    there = (tmp_path / f"{best:g}" / "model.safetensors").read_bytes()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == there


def test_a_tuned_merge_is_repeated_from_its_config(words: tuple[object, ...], run: Run, tmp_path: Path) -> None:
    assert run(*words, "--tune-alpha", "--calibrate", "--out", tmp_path / "m")[0] == 0
    again = run("merge", "--config", tmp_path / "m" / "merge_config.json", "--out", tmp_path / "n")
    assert again[0] == 0, again[2]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "n" / "model.safetensors").read_bytes()


def test_what_cannot_be_tuned_is_said_before_any_work(
    words: tuple[object, ...], run: Run, tmp_path: Path, clip_zoo: Path
) -> None:
    code, _, err = run(*words, "--tune-alpha", "--alpha", 1, "--out", tmp_path / "m")
    assert code == 2 and "--alpha and --tune-alpha" in err
    code, _, err = run(*words, "--tune-alpha", "--method", "mean", "--out", tmp_path / "m")
    assert code == 2 and "mean has no alpha" in err
    nameless = ("merge", clip_zoo / "a", clip_zoo / "b", "--base", clip_zoo / "base", "--method", "tsv-m")
    code, _, err = run(*nameless, "--tune-alpha", "--out", tmp_path / "m")
    assert code == 2 and "to choose alpha, its task must be known" in err
    code, out, _ = run(*words, "--tune-alpha", "--out", tmp_path / "m", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and len(plan["tune_alpha_on"]) == 2 and plan["calibrate_on"] == []
    assert not (tmp_path / "m").exists()


def test_an_alpha_at_the_end_of_what_was_tried_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert nearest(dict.fromkeys(ALPHAS, 1.0) | {1.0: 0.5}) == 1.0
    assert not caplog.text
    assert nearest(dict.fromkeys(ALPHAS, 1.0) | {ALPHAS[-1]: 0.5}) == ALPHAS[-1]
    assert "at the end of what was tried" in caplog.text
