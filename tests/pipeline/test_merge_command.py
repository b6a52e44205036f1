"""`hf-epimer merge` on local folders: what it writes and what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.checkpoints import TINY, StateDict, card, tiny_state, write_checkpoint
from helpers.command import Run, contents, fails
from hf_epimer import MergeRecipe, ModelRef, merge
from hf_epimer.methods import METHODS
from hf_epimer.methods.statistic import FISHER_DIAGONAL
from hf_epimer.models.clip import CLIP


def test_a_merged_folder_is_complete(tiny_zoo: Path, run: Run) -> None:
    out = tiny_zoo / "out"
    code, output, complaint = run(
        "merge", f"dtd={tiny_zoo / 'a'}", f"svhn={tiny_zoo / 'b'}", "--base", tiny_zoo / "base", "--rank", 4,
        "--method", "epimer", "--out", out,
    )  # fmt: skip
    assert (code, complaint) == (0, "")
    assert str(out) in output
    assert contents(out) == [
        "README.md",
        "config.json",
        "merge_config.json",
        "merge_report.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model"
    assert config["architectures"] == ["CLIPVisionModel"]
    assert {name: config[name] for name in TINY} == TINY
    report = json.loads((out / "merge_report.json").read_text())
    assert report["totals"]["layers"] == len(report["layers"]) == len(load_file(out / "model.safetensors"))
    matrix = next(layer for layer in report["layers"] if layer["name"].endswith("0.mlp.fc1.weight"))
    assert matrix["rank"] == 4
    assert matrix["steps"] >= 1
    assert matrix["eta"] > 0
    assert len(matrix["task_vector_norms"]) == 2
    assert report["totals"]["eta"] > 0
    assert report["totals"]["capped"] == ["vision_model.embeddings.position_embedding.weight"]
    merged = json.loads((out / "merge_config.json").read_text())
    assert merged["options"]["rank"] == 4
    assert torch.__version__.startswith(merged["versions"]["torch"])  # of a CUDA build it has more
    assert merged["models"] == [f"dtd={tiny_zoo / 'a'}", f"svhn={tiny_zoo / 'b'}"]


def test_the_card_says_what_was_done_and_keeps_paths_to_itself(tiny_zoo: Path, run: Run) -> None:
    from huggingface_hub import ModelCard

    out = tiny_zoo / "out"
    run(
        "merge",
        f"dtd={tiny_zoo / 'a'}",
        tiny_zoo / "b",
        "--base",
        tiny_zoo / "base",
        "--method",
        "epimer",
        "--alpha",
        0.9,
        "--out",
        out,
    )
    card = ModelCard.load(out / "README.md")
    assert "from Juanwu Lu, Anand Bhaskar, Brian Axelrod, Ekaterina Tolstaya and Tristan Emrich, " in card.text
    assert card.data.library_name == "transformers"
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert {"merge", "hf-epimer", "clip"} <= set(card.data.tags or [])
    assert card.data.datasets == ["tanganke/dtd"]
    text = str(card)
    assert str(tiny_zoo) not in text
    assert METHODS["epimer"].formula in text
    assert "| alpha | 0.9 |" in text
    assert "CLIPVisionModel.from_pretrained" in text
    assert "@misc{lu2026epimer" in text
    assert "hf-epimer merge dtd=a b --base base --method epimer --alpha 0.9" in text


def test_the_code_in_the_card_runs(tiny_zoo: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPConfig, CLIPModel

    out = tiny_zoo / "out"
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=TINY, text_config={**text, "vocab_size": 20}, projection_dim=24)
    CLIPModel(config).save_pretrained(tiny_zoo / "base")
    code, _, complaint = run("merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--out", out)
    assert code == 0, complaint
    snippet = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert snippet
    monkeypatch.chdir(tiny_zoo)
    names: dict[str, object] = {}
    exec(snippet[1], names)
    full = names["full"]
    assert isinstance(full, CLIPModel)
    expected = load_file(out / "model.safetensors")["vision_model.post_layernorm.weight"]
    assert torch.equal(full.vision_model.post_layernorm.weight, expected)


def test_merge_config_repeats_the_merge_bit_for_bit(tiny_zoo: Path, run: Run) -> None:
    first, second = tiny_zoo / "first", tiny_zoo / "second"
    code, _, complaint = run(
        "merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--method", "dare", "--drop", 0.5,
        "--weights", 2, 1, "--seed", 3, "--dtype", "float16", "--out", first,
    )  # fmt: skip
    assert code == 0, complaint
    code, _, complaint = run("merge", "--config", first / "merge_config.json", "--out", second)
    assert code == 0, complaint
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert load_file(second / "model.safetensors")["vision_model.post_layernorm.bias"].dtype == torch.float16


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.needs in (None, FISHER_DIAGONAL)]
)
def test_every_method_merges_files(method: str, tiny_zoo: Path, run: Run) -> None:
    out = tiny_zoo / "out"
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--method", method, "--out", out]
    code, output, complaint = run(*words, "--json")
    assert (code, complaint) == (0, "")
    assert json.loads(output)["method"] == method
    assert len(output.splitlines()) == 1


def test_default_folder_and_python_recipe(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_zoo)
    report = merge(MergeRecipe((ModelRef.parse("./a"), ModelRef.parse("b")), ModelRef.parse("base"), method="mean"))
    assert report.out == Path("merged-mean")
    assert (tiny_zoo / "merged-mean" / "model.safetensors").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_zoo: Path, run: Run) -> None:
    before = contents(tiny_zoo)
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--out", tiny_zoo / "out"]
    words += ["--method", "epimer", "--rank", 32]
    code, output, complaint = run(*words, "--dry-run", "--json")
    assert (code, complaint) == (0, "")
    plan = json.loads(output)
    assert plan["capped_ranks"]["vision_model.embeddings.position_embedding.weight"] == 2
    size = sum((tiny_zoo / name / "model.safetensors").stat().st_size for name in ("a", "b", "base"))
    assert plan["bytes_to_read"] == size + sum((tiny_zoo / n / "fisher.safetensors").stat().st_size for n in "ab")
    code, output, _ = run(*words, "--dry-run")
    assert code == 0
    assert "capped" in output
    assert contents(tiny_zoo) == before


def test_fisher_given_apart_and_by_label(tiny_zoo: Path, run: Run) -> None:
    together, apart = tiny_zoo / "together", tiny_zoo / "apart"
    words = [f"x={tiny_zoo / 'a'}", f"y={tiny_zoo / 'b'}", "--base", tiny_zoo / "base", "--method", "epimer"]
    assert run("merge", *words, "--out", together)[0] == 0
    for name in "ab":
        (tiny_zoo / name / "fisher.safetensors").rename(tiny_zoo / f"{name}.fisher.safetensors")
    fails(run("merge", *words, "--out", apart), r"Fisher information of x=.*--fisher.*tsv-m")
    given = [f"y={tiny_zoo / 'b.fisher.safetensors'}", f"x={tiny_zoo / 'a.fisher.safetensors'}"]
    code, _, complaint = run("merge", *words, "--out", apart, "--fisher", *given)
    assert code == 0, complaint
    assert (together / "model.safetensors").read_bytes() == (apart / "model.safetensors").read_bytes()
    again = tiny_zoo / "again"
    assert run("merge", "--config", apart / "merge_config.json", "--out", again)[0] == 0
    assert (again / "model.safetensors").read_bytes() == (apart / "model.safetensors").read_bytes()
    fails(run("merge", *words, "--fisher", given[0], tiny_zoo / "a.fisher.safetensors"), "label all", 2)
    fails(run("merge", *words, "--fisher", f"z={tiny_zoo / 'b.fisher.safetensors'}"), "no model is labelled z", 2)
    fails(run("merge", *words, "--fisher", tiny_zoo / "b.fisher.safetensors"), "2 models but 1", 2)


def test_base_from_cards(tmp_path: Path, run: Run, base_state: StateDict) -> None:
    write_checkpoint(tmp_path / "base", base_state)
    a = write_checkpoint(tmp_path / "a", tiny_state(1, base_state), card=card(str(tmp_path / "base")))
    b = write_checkpoint(tmp_path / "b", tiny_state(2, base_state))
    code, _, complaint = run("merge", a, b, "--method", "mean", "--out", tmp_path / "out")
    assert code == 0, complaint
    (b / "README.md").write_text(card("org/other"))
    fails(
        run("merge", a, b, "--method", "mean", "--out", tmp_path / "o"), r"disagree.*a says.*b says org/other.*--base"
    )
    (b / "README.md").write_text("---\n: : :\n---\n")
    assert run("merge", a, b, "--method", "mean", "--out", tmp_path / "broken-card")[0] == 0
    for folder in (a, b):
        (folder / "README.md").unlink()
    fails(run("merge", a, b, "--method", "mean", "--out", tmp_path / "o"), "name the base with --base", 2)


def test_labels_are_unique_and_fit_a_recipe(tiny_zoo: Path, run: Run) -> None:
    base = ["--base", tiny_zoo / "base", "--method", "mean", "--out"]
    fails(run("merge", f"x={tiny_zoo / 'a'}", f"x={tiny_zoo / 'b'}", *base, tiny_zoo / "o"), "two checkpoints are", 2)
    for name in ("my model", "x@main", "a=b"):
        (tiny_zoo / "a").rename(tiny_zoo / name)
        first, second = tiny_zoo / "first", tiny_zoo / "second"
        code, _, complaint = run("merge", tiny_zoo / name, tiny_zoo / "b", *base, first)
        assert code == 0, complaint
        assert run("merge", "--config", first / "merge_config.json", "--out", second)[0] == 0
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        for folder in (first, second):
            shutil.rmtree(folder)
        (tiny_zoo / name).rename(tiny_zoo / "a")


def test_references_may_stand_between_the_flags(tiny_zoo: Path, run: Run) -> None:
    words = ["merge", tiny_zoo / "a", "--base", tiny_zoo / "base", tiny_zoo / "b", "--method", "mean", "--json"]
    code, output, complaint = run(*words, "--out", tiny_zoo / "out[bold]")
    assert code == 0, complaint
    assert json.loads(output)["out"] == str(tiny_zoo / "out[bold]")
    code, output, _ = run("merge", tiny_zoo / "a", "--base", tiny_zoo / "base", "--out", tiny_zoo / "x[/]y")
    assert code == 0
    assert str(tiny_zoo / "x[/]y") in output


def test_reports_are_strict_json(tiny_zoo: Path, run: Run) -> None:
    words = ["merge", tiny_zoo / "a", tiny_zoo / "b", "--base", tiny_zoo / "base", "--damping", 1e38]
    words += ["--method", "epimer"]
    code, _, complaint = run(*words, "--out", tiny_zoo / "out")
    assert code == 0, complaint
    text = (tiny_zoo / "out" / "merge_report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Twenty more layers are 63 MB more of every model; the merge must not hold on to any of them.

    Both are larger than what may wait for a layer before it.
    """
    import subprocess
    import sys

    peaks = []
    for depth in (20, 40):
        tower = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": depth}
        generator = torch.Generator().manual_seed(0)
        shapes = CLIP.shapes(tower)
        base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        folder = tmp_path / str(depth)
        write_checkpoint(folder / "base", base, config=tower)
        for name in "ab":
            tuned = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
            write_checkpoint(folder / name, tuned, config=tower, fisher={n: v.square() for n, v in base.items()})
        words = ["merge", folder / "a", folder / "b", "--base", folder / "base", "--out", folder / "o", "--json"]
        done = subprocess.run([sys.executable, "-m", "hf_epimer", *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["memory"]["peak_anonymous"])
    assert peaks[0] > 0
    assert peaks[1] - peaks[0] < 30e6
