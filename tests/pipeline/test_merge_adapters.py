"""`hf-epimer merge` on adapters: what comes out, by which road, from folders and from the Hub, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.adapters import FC1, QUERY, folded, make, rewrite_config, rewrite_weights
from helpers.checkpoints import StateDict, tiny_fisher, tiny_state, write_checkpoint
from helpers.command import Run, contents, fails
from helpers.hub_cases import environment
from helpers.hub_server import StandInHub
from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.lora import merge_adapters, read_adapter
from hf_epimer.lora.core_space import IN_THE_CORE
from hf_epimer.merging.stream import tagged_bases
from hf_epimer.methods import METHODS
from hf_epimer.models.clip import CLIP
from hf_epimer.numerics.lowrank import LowRank
from hf_epimer.pipeline import inputs as gathering

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ADAPTER_FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "merge_config.json",
    "merge_report.json",
]


@pytest.fixture
def adapters(base_folder: Path) -> tuple[Path, Path]:
    """Two adapters of one base, of unlike ranks and targets, with statistics beside them."""
    a = make(base_folder, "a", 1, target_modules=["q_proj", "fc1"])
    b = make(base_folder, "b", 2, r=2, bias="lora_only", target_modules=["q_proj", "fc2"])
    for seed, folder in enumerate((a, b)):
        save_file(tiny_fisher(seed), folder / "fisher.safetensors", metadata={"format": "hf-epimer.fisher/1"})
        kronecker = {"format": "hf-epimer.kronecker/1"}
        save_file(tiny_kronecker(seed), folder / "kronecker.safetensors", metadata=kronecker)
    return a, b


def tiny_kronecker(seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in tiny_state(0).items():
        if value.ndim == 2:
            for part, size in (("output", value.shape[0]), ("input", value.shape[1])):
                x = torch.randn(3 * size, size, generator=generator) * torch.logspace(0, -1, size)
                found[f"{name}.{part}_factor"] = x.mT @ x / len(x)
    return found


def weights(folder: Path) -> StateDict:
    return load_file(folder / "model.safetensors")


def distance(found: StateDict, expected: StateDict, base: StateDict) -> float:
    """Relative error of the merged task vector of the whole model."""
    error = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in base)
    return (error / sum(float((expected[n].double() - base[n].double()).square().sum()) for n in base)) ** 0.5


# --- what comes out -------------------------------------------------------------------------------------------------


def test_adapters_become_an_adapter(adapters: tuple[Path, Path], base: Checkpoint, base_folder: Path, run: Run) -> None:
    """The base is the one that the adapters name; the folder is PEFT's, and no more."""
    out = base_folder.parent / "out"
    words = ["merge", *adapters, "--method", "tsv-m", "--weights", 2, 1, "--out", out]
    code, output, complaint = run(*words)
    assert (code, complaint) == (0, "")
    assert "merged 2 adapters with tsv-m" in output
    assert contents(out) == ADAPTER_FILES
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base_folder), None)
    read = [read_adapter(folder, base, CLIP.canonical) for folder in adapters]
    options = METHODS["tsv-m"].config()
    expected = {name: base.tensor(name).double() for name in base.shapes}
    for u in merge_adapters(read, METHODS["tsv-m"], options, weights=[2, 1]):
        expected[u.name] += u.update.dense().view(u.shape) if isinstance(u.update, LowRank) else u.update
    assert distance(folded(out, base_folder), expected, weights(base_folder)) < 1e-6
    report = json.loads((out / "merge_report.json").read_text())
    changed = {name for adapter in read for name in adapter.changed}
    assert {layer["name"] for layer in report["layers"]} == changed
    assert report["totals"]["largest_rank"] == 6
    assert report["totals"]["largest_cut_off"] < 1e-6
    assert report["totals"]["layers"] == len(changed)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_name_as_an_adapter_and_dense(
    method: str, adapters: tuple[Path, Path], base_folder: Path, run: Run
) -> None:
    """Through the core both are the same merge; on whole layers the adapter lacks what does not fit into its rank."""
    thin, full = base_folder.parent / "thin", base_folder.parent / "full"
    words = ["merge", *adapters, "--method", method, "--json"]
    code, output, complaint = run(*words, "--out", thin)
    assert (code, complaint) == (0, "")
    assert json.loads(output)["method"] == method
    assert run(*words, "--dense", "--out", full)[0] == 0
    assert contents(full) == sorted(
        {*ADAPTER_FILES, "config.json", "model.safetensors", "preprocessor_config.json"}
        - {"adapter_config.json", "adapter_model.safetensors"}
    )
    error = distance(folded(thin, base_folder), weights(full), weights(base_folder))
    cut = json.loads((thin / "merge_report.json").read_text())["totals"]["largest_cut_off"]
    if method in IN_THE_CORE and METHODS[method].needs is None:
        assert error < 1e-6
        assert cut < 1e-6
    else:
        assert error <= cut + 1e-6
    report = json.loads((full / "merge_report.json").read_text())
    assert report["totals"]["layers"] == len(weights(full)) == len(weights(base_folder))
    untouched = "vision_model.embeddings.patch_embedding.weight"
    assert torch.equal(weights(full)[untouched], weights(base_folder)[untouched])
    before, after = weights(base_folder), weights(full)
    for layer in report["layers"]:
        moved = float((after[layer["name"]].double() - before[layer["name"]].double()).norm())
        assert layer["merged_norm"] == pytest.approx(moved, rel=1e-4, abs=1e-5)


def test_a_full_model_that_was_folded_by_peft_merges_alike(
    adapters: tuple[Path, Path], base_folder: Path, run: Run
) -> None:
    """Adapters beside full checkpoints are task vectors: with one folded by PEFT the merge is the same."""
    root = base_folder.parent
    write_checkpoint(root / "full", {n: v.contiguous() for n, v in folded(adapters[1], base_folder).items()})
    shutil.copy(adapters[1] / "fisher.safetensors", root / "full")
    for method in ("epimer", "ties", "frechet-lora"):
        for second, out in ((adapters[1], "lora"), (root / "full", "mixed")):
            words = ["merge", f"a={adapters[0]}", f"b={second}", "--base", base_folder, "--method", method]
            dense = ["--dense"] * (out == "lora")
            code, _, complaint = run(*words, *dense, "--out", root / out, "--overwrite")
            assert (code, complaint) == (0, "")
            assert (root / out / "model.safetensors").exists()
        if method != "ties":  # which looks at single entries, of the core or of the layer
            assert distance(weights(root / "mixed"), weights(root / "lora"), weights(base_folder)) < 1e-3


@pytest.mark.parametrize("method", ["mean", "fisher"])
def test_out_rank_cuts_the_merged_adapter(
    method: str, adapters: tuple[Path, Path], base_folder: Path, run: Run
) -> None:
    thin, full = base_folder.parent / "thin", base_folder.parent / "full"
    words = ["merge", *adapters, "--method", method, "--out-rank", 3]
    code, output, _ = run(*words, "--out", thin)
    assert code == 0
    assert "largest rank of a merged layer: 3" in output
    stored = load_file(thin / "adapter_model.safetensors")
    assert {value.shape[0] for key, value in stored.items() if "lora_A" in key} == {2, 3}
    totals = json.loads((thin / "merge_report.json").read_text())["totals"]
    assert totals["largest_rank"] == 3
    assert 0.01 < totals["largest_cut_off"] < 1
    assert run(*words, "--dense", "--out", full)[0] == 0
    assert distance(folded(thin, base_folder), weights(full), weights(base_folder)) < 1e-6
    assert "| out_rank | 3 |" in (thin / "README.md").read_text()


def test_merge_config_repeats_the_merge_bit_for_bit(adapters: tuple[Path, Path], base_folder: Path, run: Run) -> None:
    first, second = base_folder.parent / "first", base_folder.parent / "second"
    chosen = ["--lora-mean", "procrustes", "--out-rank", 3, "--weights", 3, 1, "--dtype", "bfloat16"]
    for flags, file in (([], "adapter_model.safetensors"), (["--dense"], "model.safetensors")):
        words = ["merge", *adapters, "--method", "frechet-lora", *chosen, *flags, "--out", first, "--overwrite"]
        assert run(*words)[0] == 0
        code, _, complaint = run("merge", "--config", first / "merge_config.json", "--out", second, "--overwrite")
        assert code == 0, complaint
        assert (first / file).read_bytes() == (second / file).read_bytes()
        assert contents(first) == contents(second)
        assert next(iter(load_file(first / file).values())).dtype == torch.bfloat16


def test_dry_run_says_what_would_be_written(adapters: tuple[Path, Path], base_folder: Path, run: Run) -> None:
    before = contents(base_folder.parent)
    code, output, complaint = run("merge", *adapters, "--dry-run", "--json")
    assert (code, complaint) == (0, "")
    plan = json.loads(output)
    assert plan["writes"] == "adapter"
    assert plan["base"] == f"base={base_folder}" or str(base_folder) in plan["base"]
    assert json.loads(run("merge", *adapters, "--dense", "--dry-run", "--json")[1])["writes"] == "checkpoint"
    assert contents(base_folder.parent) == before


def test_the_card_of_an_adapter(adapters: tuple[Path, Path], base_folder: Path, run: Run) -> None:
    from huggingface_hub import ModelCard

    out = base_folder.parent / "out"
    assert run("merge", *adapters, "--method", "frechet-lora", "--out", out)[0] == 0
    card = ModelCard.load(out / "README.md")
    text = str(card)
    assert card.data.library_name == "peft"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert {"merge", "hf-epimer", "clip", "lora"} <= set(card.data.tags or [])
    assert "2 LoRA adapters of a CLIP vision model merged into one adapter" in text
    assert METHODS["frechet-lora"].formula in text
    assert "| largest rank of a merged layer | 6 |" in text
    assert "| largest part of a layer's norm cut off | 0.00% |" in text
    assert str(base_folder.parent) not in text


def test_the_code_in_the_card_runs(clip_zoo: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(clip_zoo / "base", tmp_path / "base")
    folders = [make(tmp_path / "base", name, seed) for seed, name in enumerate("ab")]
    assert run("merge", *folders, "--method", "mean", "--out", tmp_path / "out")[0] == 0
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert snippet
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    expected = folded(tmp_path / "out", tmp_path / "base")
    tower = names["full"].vision_model.state_dict()
    assert torch.equal(tower[QUERY.removeprefix("vision_model.")], expected[QUERY])


def test_adapters_too_far_apart_are_a_warning_and_in_the_card(base_folder: Path, run: Run) -> None:
    folders = [make(base_folder, name, seed, target_modules=["q_proj"]) for seed, name in enumerate("ab")]
    out = base_folder.parent / "out"
    code, _, complaint = run("merge", *folders, "--method", "frechet-lora", "--lora-mean", "polar", "--out", out)
    assert code == 0
    assert re.fullmatch(r"warning: in \d+ of \d+ layers the adapters are too far apart .*\n", complaint)
    assert "too far apart for a unique mean" in (out / "README.md").read_text()


# --- measuring ------------------------------------------------------------------------------------------------------


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


# --- bad input ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_refused_before_any_work(
    adapters: tuple[Path, Path], base_folder: Path, run: Run
) -> None:
    a, b = adapters
    root = base_folder.parent
    before = contents(root)
    words = ["merge", a, b, "--method", "mean", "--out", root / "out"]

    def broken(change: Callable[[], Any], pattern: str, code: int = 1, *flags: object) -> None:
        shutil.copytree(b, root / "kept")
        change()
        fails(run(*words, *flags), pattern, code)
        fails(run(*words, *flags, "--dry-run"), pattern, code)
        shutil.rmtree(b)
        (root / "kept").rename(b)
        assert contents(root) == before

    broken(lambda: rewrite_config(b, use_dora=True), r"b.*use_dora.*merge_and_unload")
    broken(lambda: rewrite_config(b, peft_type="IA3"), "IA3 adapter; only LoRA")
    broken(lambda: (b / "adapter_config.json").write_text("[1"), "adapter_config.json is not readable JSON")
    broken(
        lambda: (b / "adapter_model.safetensors").rename(b / "adapter_model.bin"),
        r"only pickled weights \(adapter_model.bin\).*never opened",
    )
    broken(lambda: (b / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors")
    broken(
        lambda: (b / "adapter_model.safetensors").write_bytes((b / "adapter_model.safetensors").read_bytes()[:-10]),
        "truncated or corrupt",
    )
    broken(
        lambda: rewrite_weights(
            b, lambda s: s.update({k.replace("layers.0", "layers.7"): v.clone() for k, v in s.items()})
        ),
        r"b: it adapts vision_model.encoder.layers.7.*which the base does not have",
    )
    broken(lambda: rewrite_weights(b, lambda s: s.pop(next(k for k in s if "lora_B" in k))), "is missing")
    broken(
        lambda: rewrite_config(b, base_model_name_or_path="org/other"), r"disagree.*a says .*b says org/other.*--base"
    )
    broken(lambda: rewrite_config(b, base_model_name_or_path="/nowhere/base"), "adapter_config.json names.*--base")
    broken(lambda: None, "--out-rank must be a whole number of at least 1", 2, "--out-rank", 0)


def test_out_rank_is_of_adapters_alone(adapters: tuple[Path, Path], base_folder: Path, run: Run) -> None:
    full = write_checkpoint(base_folder.parent / "full", tiny_state(3, weights(base_folder)))
    words = ["--base", base_folder, "--method", "mean", "--out-rank", 2, "--out", base_folder.parent / "out"]
    fails(
        run("merge", adapters[0], full, *words), "--out-rank is of merged adapters, and full=.* is a full checkpoint", 2
    )
    fails(run("merge", full, *words), "--out-rank is of merged adapters", 2)
    assert "out" not in contents(base_folder.parent)


def test_adapters_that_name_no_base(adapters: tuple[Path, Path], base_folder: Path, run: Run) -> None:
    for folder in adapters:
        rewrite_config(folder, base_model_name_or_path=None)
        (folder / "README.md").unlink(missing_ok=True)
    words = ["merge", *adapters, "--method", "mean", "--out", base_folder.parent / "out"]
    fails(run(*words), "no model card names a base_model: name the base with --base", 2)
    assert run(*words, "--base", base_folder)[0] == 0


def test_an_adapter_of_another_width(adapters: tuple[Path, Path], base_folder: Path, clip_zoo: Path, run: Run) -> None:
    words = ["merge", *adapters, "--method", "mean", "--base", clip_zoo / "base", "--out", base_folder.parent / "out"]
    fails(run(*words), "a: .* the adapter was trained on another model")


def test_nothing_half_written_is_left(adapters: tuple[Path, Path], base_folder: Path, run: Run) -> None:
    rewrite_weights(adapters[1], lambda s: s.update({k: v / 0 for k, v in s.items() if "layers.1" in k}))
    before = contents(base_folder.parent)
    fails(
        run("merge", *adapters, "--method", "mean", "--out", base_folder.parent / "out"), "b: NaN or Inf in .*layers.1"
    )
    assert contents(base_folder.parent) == before
    make(base_folder, "c", 3, target_modules=["patch_embedding", "fc1"])
    words = [
        "merge",
        base_folder.parent / "c",
        "--method",
        "mean",
        "--dtype",
        "float16",
        "--out",
        base_folder.parent / "o",
    ]
    rewrite_weights(base_folder.parent / "c", lambda s: s.update({k: v * 1e6 for k, v in s.items()}))
    fails(run(*words), "do not fit into torch.float16; choose another --dtype")
    fails(run(*words, "--dense"), "do not fit into torch.float16; choose another --dtype")
    assert "o" not in contents(base_folder.parent)


# --- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(empty_hub: StandInHub, adapters: tuple[Path, Path], base_folder: Path) -> StandInHub:
    """A Hub with org/base and the adapters org/a and org/b, which name it, b at a commit."""
    empty_hub.add_repo("org/base", base_folder)
    for folder, revision in zip(adapters, (None, empty_hub.commits("org/base")[0].oid), strict=True):
        rewrite_config(folder, base_model_name_or_path="org/base", revision=revision)
        (folder / "README.md").unlink()
        empty_hub.add_repo(f"org/{folder.name}", folder)
    return empty_hub


def test_adapters_from_the_hub_pushed_and_loaded_back(hub: StandInHub, run: Run, tmp_path: Path) -> None:
    pinned = hub.commits("org/base")[0].oid
    hub.commit("org/base", {"config.json": b"{}"})  # b names the commit before this one
    hub.add_repo("org/merged", write_checkpoint(tmp_path / "old", tiny_state(9)))
    code, output, complaint = run("merge", "org/a", "org/b", "--method", "tsv-m", "--push-to", "org/merged")
    assert (code, complaint) == (0, "")
    head = hub.commits("org/merged")[0]
    assert head.title == "Merge 2 adapters with tsv-m (hf-epimer)"
    assert head.oid in output
    present = set(head.files)
    assert set(ADAPTER_FILES) <= present
    assert not {"model.safetensors", "config.json"} & present  # of the checkpoint that was there before
    recipe = json.loads(hub.read("org/merged", "merge_config.json"))
    assert recipe["base"] == f"org/base@{pinned}"
    assert recipe["models"] == [f"{name}=org/{name}@{hub.commits(f'org/{name}')[0].oid}" for name in "ab"]
    card = hub.read("org/merged", "README.md").decode()
    assert re.search(r"base_model:\s+- org/base\n", card) or "base_model: org/base\n" in card
    assert f'CLIPVisionModel.from_pretrained("org/base", revision="{pinned}")' in card
    assert 'PeftModel.from_pretrained(base, "org/merged")' in card
    assert all(hub.commits(f"org/{name}")[0].oid[:12] in card for name in "ab")
    script = (
        "from peft import PeftModel\nfrom transformers import CLIPVisionModel\n"
        f"base = CLIPVisionModel.from_pretrained('org/base', revision='{pinned}')\n"
        "tuned = PeftModel.from_pretrained(base, 'org/merged').merge_and_unload().state_dict()\n"
        "print(float(next(v for k, v in tuned.items() if k.endswith('layers.0.mlp.fc1.weight'))[0, 0]))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(hub, tmp_path)
    )
    assert loaded.returncode == 0, loaded.stderr
    expected = folded(Path("merged-tsv-m"), tmp_path / "base")[FC1][0, 0]
    assert float(loaded.stdout) == pytest.approx(float(expected), rel=1e-5)


def test_a_full_merge_pushed_over_an_adapter_leaves_no_adapter(hub: StandInHub, run: Run) -> None:
    words = ["merge", "org/a", "org/b", "--method", "mean", "--push-to", "org/merged", "--overwrite"]
    assert run(*words)[0] == 0
    assert run(*words, "--dense")[0] == 0
    present = set(hub.commits("org/merged")[0].files)
    assert {"config.json", "model.safetensors"} <= present
    assert not {"adapter_config.json", "adapter_model.safetensors"} & present
    code, _, complaint = run("push", "merged-mean", "org/again")
    assert code == 0, complaint


def test_only_needed_files_are_fetched_and_offline_works(
    hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.commit("org/a", {"optimizer.pt": b"x" * 1000, "adapter_model.bin": b"x"})
    assert run("merge", "org/a", "org/b", "--method", "mean", "--out", "out")[0] == 0
    paths = [r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    assert {path.split("/")[-1].split("?")[0] for path in paths} <= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    hub.clear_log()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, complaint = run("merge", "org/a", "org/b", "--method", "mean", "--out", "again")
    assert (code, complaint) == (0, "")
    assert hub.requests == []
    assert Path("out/adapter_model.safetensors").read_bytes() == Path("again/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["tsv-m"], False),
        (["frechet-lora", "--out-rank", 2], False),
        (["fisher"], True),  # works on whole layers
        (["mean", "--dense"], True),
    ],
)
def test_the_weights_of_the_base_are_fetched_only_where_they_are_read(
    words: list[Any], read: bool, hub: StandInHub, base_folder: Path, run: Run
) -> None:
    for seed, name in enumerate("cd"):
        folder = make(base_folder, name, seed, target_modules=["q_proj", "fc1"])
        rewrite_config(folder, base_model_name_or_path="org/base")
        (folder / "README.md").unlink()
        save_file(tiny_fisher(seed), folder / "fisher.safetensors", metadata={"format": "hf-epimer.fisher/1"})
        hub.add_repo(f"org/{name}", folder)
    flags = ["--base", "org/base", "--method", *words]
    plan = json.loads(run("merge", "org/c", "org/d", *flags, "--dry-run", "--json")[1])
    assert (plan["bytes_to_read"] > (base_folder / "model.safetensors").stat().st_size) == read
    code, _, complaint = run("merge", "org/c", "org/d", *flags, "--out", "out")
    assert (code, complaint) == (0, "")
    fetched = [r.path for r in hub.requests if r.method == "GET" and "/org/base/resolve/" in r.path]
    assert any("config.json" in path for path in fetched)
    assert any("model.safetensors" in path for path in fetched) == read
    local = [base_folder.parent / name for name in "cd"]
    assert run("merge", *local, "--base", base_folder, "--method", *words, "--out", "local")[0] == 0
    name = "model.safetensors" if "--dense" in words else "adapter_model.safetensors"
    assert Path("out", name).read_bytes() == Path("local", name).read_bytes()


def test_what_an_adapter_replaces_is_read_from_a_base_on_demand(
    hub: StandInHub, adapters: tuple[Path, Path], base_folder: Path, run: Run
) -> None:
    code, _, complaint = run("merge", "org/a", "org/b", "--method", "mean", "--out", "out")  # b has biases
    assert (code, complaint) == (0, "")
    fetched = [r.path for r in hub.requests if r.method == "GET" and "/org/base/resolve/" in r.path]
    assert any("model.safetensors" in path for path in fetched)
    assert run("merge", *adapters, "--base", base_folder, "--method", "mean", "--out", "local")[0] == 0
    files = [Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("out", "local")]
    assert files[0] == files[1]


def test_revisions_of_the_base_must_agree(hub: StandInHub, run: Run, adapters: tuple[Path, Path]) -> None:
    old = hub.commits("org/base")[0].oid
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    hub.commit("org/a", {"adapter_config.json": json.dumps({**config, "revision": "main"}).encode()})
    words = ["merge", "org/a", "org/b", "--method", "mean", "--out", "out"]
    fails(run(*words), f"disagree on base_model: a says org/base@main, b says org/base@{old}.*--base")
    code, _, complaint = run(*words, "--base", "org/base")
    assert code == 0, complaint


def test_an_adapter_from_the_hub_names_no_folder_of_this_machine(
    hub: StandInHub, run: Run, adapters: tuple[Path, Path], base_folder: Path
) -> None:
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    moved = json.dumps({**config, "base_model_name_or_path": str(base_folder)}).encode()
    hub.commit("org/a", {"adapter_config.json": moved})
    fails(run("merge", "org/a", "--method", "mean", "--out", "out"), "org/a.*adapter_config.json names.*--base")
    hub.commit("org/a", {"adapter_config.json": moved.replace(str(base_folder).encode(), b"org/gone")})
    fails(run("merge", "org/a", "--method", "mean", "--out", "out"), "org/gone: there is no such repo")
    assert not Path("out").exists()
