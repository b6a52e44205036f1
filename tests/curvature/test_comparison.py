"""Metrics judged by the exact Hessian."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from helpers.clip import inside
from helpers.command import Run
from hf_epimer import ModelRef
from hf_epimer.curvature import estimate as estimation
from hf_epimer.curvature.comparison import compare_with_hessian
from hf_epimer.curvature.hessian import projected_hessian
from hf_epimer.curvature.request import CurvatureRequest
from hf_epimer.models.source import resolve_model
from hf_epimer.numerics.subspace import tagged_basis
from hf_epimer.tasks.dataset import Sampling, TaskImages
from hf_epimer.tasks.task import load_task_file

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.slow
def test_diagnose_estimates_on_request_and_judges_metrics_by_the_exact_hessian(
    clip_zoo: Path, run: Run, tmp_path: Path, own_cache: Path
) -> None:
    words = ["diagnose", *(f"{name}={clip_zoo / name}" for name in "ab"), "--base", clip_zoo / "base", "--rank", 2]
    words += ["--task", clip_zoo / "a.json", clip_zoo / "b.json"]
    assert run(*words, "--out", "free")[0] == 0
    assert json.loads((tmp_path / "free" / "diagnosis.json").read_text())["curvature"] is None
    assert not own_cache.exists()
    assert run(*words, "--samples", 12, "--exact", "--out", "exact")[0] == 0
    found = json.loads((tmp_path / "exact" / "diagnosis.json").read_text())
    assert len(list(own_cache.iterdir())) == 2
    assert found["totals"]["ranks"][0]["curvature"]["eta"] > 0
    assert found["exact"].keys() == {"a", "b"}
    for metrics in found["exact"].values():
        assert metrics.keys() == {"diagonal", "projected", "kronecker"}
        assert all(-1 <= own["agreement"] <= 1 and own["scale"] != 0 for own in metrics.values())
    code, _, complaint = run(*words[:-3], "--exact", "--out", "unknown")
    assert code == 1 and "--exact needs its task" in complaint


def test_agreement_is_that_of_the_dense_matrices(clip_zoo: Path) -> None:
    """Every metric against its own definition, on samples of which the Hessian is known by another test."""
    task = load_task_file(clip_zoo / "a.json")
    source = resolve_model(ModelRef(str(clip_zoo / "a")))
    base = resolve_model(ModelRef(str(clip_zoo / "base")))
    request = CurvatureRequest(source, base, TaskImages(task, Sampling(10)))
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    generator = torch.Generator().manual_seed(0)
    basis = tagged_basis(torch.randn(2, 16, 24, generator=generator), 3, exact=True)
    assert basis is not None
    found = compare_with_hessian(request, {name: basis}, batch_size=4)
    subject, batches = estimation.load_subject(request, 10, Accelerator())
    exact = projected_hessian(subject, batches, {name: basis})[name]
    (batch,) = batches
    atoms = torch.stack([torch.outer(u, v) for u, v in zip(basis.u.mT, basis.v.mT, strict=True)])
    weight = inside(subject.model.tower).get_parameter("encoder.layers.1.mlp.fc2.weight")
    z, squares = [], torch.zeros_like(weight)
    for pixels, label in zip(batch.inputs, batch.labels, strict=True):
        loss = torch.nn.functional.cross_entropy(subject.model(pixels.unsqueeze(0)), label.unsqueeze(0))
        (gradient,) = torch.autograd.grad(loss, weight)
        z.append((atoms * gradient).sum((1, 2)))
        squares += gradient.square() / len(batch.labels)
    projected = torch.stack(z).mT @ torch.stack(z) / len(z)
    diagonal = torch.einsum("imn,mn,jmn->ij", atoms, squares, atoms)
    for metric, matrix in (("projected", projected), ("diagonal", diagonal)):
        cosine = float((matrix * exact).sum() / (matrix.norm() * exact.norm()))
        assert found[metric].agreement == pytest.approx(cosine, abs=1e-4)
        assert found[metric].scale == pytest.approx(float(matrix.trace() / exact.trace()), rel=1e-3)
