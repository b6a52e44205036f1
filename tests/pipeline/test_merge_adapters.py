"""`hf-epimer merge` on adapters: what comes out, by which road, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.adapters import ADAPTER_FILES, QUERY, folded, make, rewrite_config, rewrite_weights
from helpers.checkpoints import StateDict, tiny_state, write_checkpoint
from helpers.command import Run, contents, fails
from hf_epimer.checkpoints.reader import Checkpoint
from hf_epimer.lora import merge_adapters, read_adapter
from hf_epimer.methods import METHODS
from hf_epimer.models.clip import CLIP
from hf_epimer.numerics.lowrank import LowRank

peft = pytest.importorskip("peft")


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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
    assert (code, complaint) == (0, ""), complaint
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
    assert (code, complaint) == (0, ""), complaint
    assert json.loads(output)["method"] == method
    assert run(*words, "--dense", "--out", full)[0] == 0
    assert contents(full) == sorted(
        {*ADAPTER_FILES, "config.json", "model.safetensors", "preprocessor_config.json"}
        - {"adapter_config.json", "adapter_model.safetensors"}
    )
    error = distance(folded(thin, base_folder), weights(full), weights(base_folder))
    cut = json.loads((thin / "merge_report.json").read_text())["totals"]["largest_cut_off"]
    if METHODS[method].core == "both" and METHODS[method].needs is None:
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
            assert (code, complaint) == (0, ""), complaint
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
    assert (code, complaint) == (0, ""), complaint
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
