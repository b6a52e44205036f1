"""What is asked for decides where it is kept: files measured by earlier versions are found again."""

from __future__ import annotations

import pytest

from hf_epimer.curvature.request import CurvatureRequest, Gradients
from hf_epimer.hub.refs import ModelRef
from hf_epimer.methods.statistic import FISHER_FILE, KRONECKER_FILE
from hf_epimer.models.source import ModelSource
from hf_epimer.tasks.dataset import Sampling, TaskImages
from hf_epimer.tasks.task import Task


def request(sampling: Sampling, gradients: Gradients, monkeypatch: pytest.MonkeyPatch) -> CurvatureRequest:
    monkeypatch.setattr("hf_epimer.tasks.dataset.data_revision", lambda task: "c" * 40)
    model, base = (
        ModelSource(ModelRef(name, revision=letter * 40), name, frozenset({"config.json", "model.safetensors"}))
        for name, letter in (("org/m", "a"), ("org/b", "b"))
    )
    return CurvatureRequest(model, base, TaskImages(Task("dtd", "org/dtd", templates=("a {}",)), sampling), gradients)


def test_the_cache_of_earlier_versions_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = request(Sampling(), Gradients(), monkeypatch)
    assert plain.cached(FISHER_FILE).name == "dtd-fisher-b3a5536b529314249e192768.safetensors"
    assert plain.cached(KRONECKER_FILE).name == "dtd-kronecker-26c0b3833849240269e2aabb.safetensors"
    other = request(
        Sampling(12, split="val", seed=3, streaming=True), Gradients("sampled", "squared-mean", "bf16"), monkeypatch
    )
    assert other.cached(FISHER_FILE).name == "dtd-fisher-31e0e6bca5f9a51ce93a282a.safetensors"


def test_everything_that_decides_the_numbers_decides_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    varied = [
        request(sampling, gradients, monkeypatch).cached(FISHER_FILE)
        for sampling, gradients in [
            (Sampling(), Gradients()),
            (Sampling(255), Gradients()),
            (Sampling(None, 0.5), Gradients()),
            (Sampling(split="test"), Gradients()),
            (Sampling(seed=1), Gradients()),
            (Sampling(streaming=True), Gradients()),
            (Sampling(), Gradients("sampled")),
            (Sampling(), Gradients(kind="squared-mean")),
            (Sampling(), Gradients(precision="bf16")),
        ]
    ]
    assert len(set(varied)) == len(varied)
