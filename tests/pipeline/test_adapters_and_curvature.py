"""Adapters measured: accuracy, curvature that is given or estimated, diagnosis."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.adapters import ADAPTER_FILES, folded, make
from helpers.checkpoints import write_checkpoint
from helpers.command import Run, contents, fails
from hf_epimer.merging.stream import tagged_bases
from hf_epimer.pipeline import inputs as gathering

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def measured(clip_zoo: Path, tmp_path: Path) -> Path:
    """A copy of clip_zoo whose a/ and b/ are adapters."""
    shutil.copytree(clip_zoo, tmp_path / "zoo")
    for seed, name in enumerate("ab", start=1):
        shutil.rmtree(tmp_path / "zoo" / name)
        make(tmp_path / "zoo" / "base", name, seed)
    return tmp_path / "zoo"


def test_evaluate_measures_adapter_and_dense_alike(measured: Path, run: Run) -> None:
    tasks = ["--task", measured / "a.json", measured / "b.json"]
    found = []
    for flags, out in (([], measured / "thin"), (["--dense"], measured / "full")):
        words = ["merge", measured / "a", measured / "b", "--method", "mean", "--evaluate", *tasks, *flags]
        code, _, complaint = run(*words, "--out", out)
        assert (code, complaint) == (0, "")
        found.append(json.loads((out / "results.json").read_text()))
        assert f"| **average** | **{found[-1]['average']:.3f}** |" in (out / "README.md").read_text()
    assert found[0]["tasks"] == found[1]["tasks"]
    by_hand = measured / "hand"  # base + adapter by PEFT, as a checkpoint
    shutil.copytree(measured / "full", by_hand)
    save_file({n: v.contiguous() for n, v in folded(measured / "thin", measured / "base").items()},
              by_hand / "model.safetensors")  # fmt: skip
    from hf_epimer.evaluation.accuracy import evaluate_folder
    from hf_epimer.tasks.task import load_task_file

    loaded = [load_task_file(measured / f"{name}.json") for name in "ab"]
    again = evaluate_folder(by_hand, measured / "base", loaded, name="")
    assert again.to_json()["tasks"] == found[0]["tasks"]


@pytest.mark.parametrize("kronecker", [True, False])
def test_curvature_of_an_adapter_is_that_of_base_and_adapter(kronecker: bool, measured: Path, run: Run) -> None:
    shutil.copytree(measured / "base", measured / "full")
    tower = {n: v.contiguous() for n, v in folded(measured / "a", measured / "base").items()}
    (measured / "full" / "model.safetensors").unlink()
    save_file(tower, measured / "full" / "model.safetensors", metadata={"format": "pt"})
    flags = ["--task", measured / "a.json", "--samples", 16, *(["--kronecker"] if kronecker else [])]
    for name in ("a", "full"):
        file = measured / f"{name}.safetensors"
        code, _, complaint = run("fisher", measured / name, "--base", measured / "base", *flags, "--out", file)
        assert (code, complaint) == (0, "")
    found, expected = load_file(measured / "a.safetensors"), load_file(measured / "full.safetensors")
    assert found.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():  # the gradient of a key's bias is zero but for rounding
        assert float((found[name] - value).norm()) < 1e-3 * float(value.norm()) + 1e-9 * largest


@pytest.mark.parametrize(
    "words",
    [
        ("frechet-lora", "--metric", "kronecker"),
        ("epimer", "--metric", "kronecker"),
        ("epimer", "--metric", "projected"),
        ("epimer",),
        ("regmean",),
    ],
)
def test_curvature_is_estimated_where_it_is_missing(words: tuple[str, ...], measured: Path, run: Run) -> None:
    tasks = ["--task", measured / "a.json", measured / "b.json", "--samples", 8]
    models = [measured / "a", measured / "b"]
    code, output, complaint = run("merge", *models, "--method", *words, *tasks, "--dry-run", "--json")
    assert (code, complaint) == (0, "")
    if words != ("regmean",):  # which may find what others have left in the cache
        assert len(json.loads(output)["to_estimate"]) + len(json.loads(output)["statistics"]) == 2
    code, _, complaint = run("merge", *models, "--method", *words, *tasks, "--out", measured / "out")
    assert (code, complaint) == (0, "")
    assert contents(measured / "out") == ADAPTER_FILES
    flat = ["merge", *models, "--method", words[0] if words[0] != "regmean" else "mean", "--out", measured / "flat"]
    if words[0] == "frechet-lora":
        assert run(*flat)[0] == 0
        differ = load_file(measured / "out" / "adapter_model.safetensors")
        same = load_file(measured / "flat" / "adapter_model.safetensors")
        assert any(differ[key].shape != value.shape or not torch.allclose(differ[key], value, atol=1e-4)
                   for key, value in same.items())  # fmt: skip


def test_adapters_are_merged_in_the_basis_of_their_statistics(
    measured: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in one that the merge computes anew: statistics taken in a basis of rank 2 give the merge of rank 2."""
    tasks = ["--task", measured / "a.json", measured / "b.json", "--samples", 8]
    words = ["merge", measured / "a", measured / "b", "--method", "epimer", "--metric", "projected", *tasks]
    assert run(*words, "--rank", 2, "--out", measured / "two")[0] == 0
    assert run(*words, "--rank", 4, "--out", measured / "four")[0] == 0
    monkeypatch.setattr(gathering, "tagged_bases", lambda found, rank, **options: tagged_bases(found, 2, **options))
    code, _, complaint = run(*words, "--rank", 4, "--out", measured / "given")
    assert (code, complaint) == (0, "")
    two, four, given = (load_file(measured / name / "adapter_model.safetensors") for name in ("two", "four", "given"))
    assert two.keys() == given.keys()
    assert all(torch.equal(two[key], value) for key, value in given.items())
    assert not all(two[key].shape == four[key].shape and torch.equal(two[key], four[key]) for key in two)


def test_kronecker_factors_are_found_beside_adapters_and_given(
    adapters: tuple[Path, Path], base_folder: Path, run: Run
) -> None:
    beside, given = base_folder.parent / "beside", base_folder.parent / "given"
    words = ["merge", *adapters, "--method", "frechet-lora", "--metric", "kronecker"]
    code, _, complaint = run(*words, "--out", beside)
    assert (code, complaint) == (0, "")
    files = []
    for folder in adapters:
        files.append(f"{folder.name}={base_folder.parent / folder.name}.kronecker.safetensors")
        (folder / "kronecker.safetensors").rename(files[-1].split("=", 1)[1])
    fails(run(*words, "--out", given), r"frechet-lora needs the Kronecker factors of a=.*kronecker.safetensors beside")
    code, _, complaint = run(*words, "--fisher", *reversed(files), "--out", given)
    assert (code, complaint) == (0, "")
    assert all((beside / name).read_bytes() == (given / name).read_bytes() for name in ADAPTER_FILES[1:3])


def test_adapters_are_diagnosed_as_task_vectors(adapters: tuple[Path, Path], base_folder: Path, run: Run) -> None:
    root = base_folder.parent
    for name, folder in zip("ab", adapters, strict=True):
        write_checkpoint(root / f"full-{name}", {n: v.contiguous() for n, v in folded(folder, base_folder).items()})
    pairs = {}
    for kind, folders in (("thin", adapters), ("full", (root / "full-a", root / "full-b"))):
        for folder in folders:
            (folder / "fisher.safetensors").unlink(missing_ok=True)
        code, output, complaint = run(
            "diagnose", *folders, "--base", base_folder, "--rank", 4, "--out", root / kind, "--json"
        )
        assert code == 0, complaint
        pairs[kind] = json.loads(output)
    cosines = [found["totals"]["cosine"][0][1] for found in pairs.values()]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-4)
    assert 0 < abs(cosines[0]) < 0.5
