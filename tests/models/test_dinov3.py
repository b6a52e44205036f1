"""DINOv3 against transformers: what docs/families.md says of it, with heads that tasks bring."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from helpers.classifiers import load_classifier
from helpers.command import Run, strict
from helpers.data import CLASSES, write_data
from helpers.versions import needs_transformers
from hf_epimer.methods import METHODS
from hf_epimer.models.dinov3 import DINOV3
from hf_epimer.models.loading import processor_class
from hf_epimer.models.weights import blocks_of, parameter_names
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import load_task_file

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MORE = {"image_size": 12, "patch_size": 4, "num_register_tokens": 2}
SIDE = 8
"""Of the pictures, smaller than those of its training."""

TASKS = ("--task", "a.yaml", "b.yaml", "--samples", "12")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a and b as transformers writes them; data, heads and task files."""
    needs_transformers(DINOV3.since, "DINOv3 under its names of today")
    folder = tmp_path_factory.mktemp("dinov3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZE, **MORE))
        for name in ("base", "a", "b"):
            for parameter in model.parameters():
                parameter.data += (0.3 if name == "base" else 0.05) * torch.randn_like(parameter)
            model.save_pretrained(folder / name)
        for name in ("a", "b"):
            write_data(folder / "data" / name)
            head = {"weight": torch.randn(len(CLASSES), 16), "bias": torch.randn(len(CLASSES))}
            save_file(head, folder / f"head-{name}.safetensors")
            lines = (f"name: {name}", f"dataset: data/{name}", f"head: head-{name}.safetensors")
            (folder / f"{name}.yaml").write_text("\n".join(lines))
    processor_class(DINOV3)(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "base")
    return folder


@pytest.fixture
def zoo(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working folder."""
    monkeypatch.chdir(made)
    return made


def merge(run: Run, out: Path, *words: object, models: tuple[str, ...] = ("a", "b")) -> Path:
    named = [f"{label}={model}" for label, model in zip("ab", models, strict=True)]
    code, _, complaint = run("merge", *named, "--base", "base", *words, "--out", out)
    assert code == 0, complaint
    return out


def test_merge(zoo: Path, tmp_path: Path, run: Run) -> None:
    merge(run, tmp_path / "mean", "--method", "mean")
    found, told = transformers.DINOv3ViTModel.from_pretrained(tmp_path / "mean", output_loading_info=True)
    assert not any(told.values())
    tuned = [load_file(zoo / name / "model.safetensors") for name in ("a", "b")]
    merged = load_file(tmp_path / "mean" / "model.safetensors")
    assert merged.keys() == tuned[0].keys() and len(merged) == len(found.state_dict())
    for name, value in merged.items():
        torch.testing.assert_close(value, (tuned[0][name] + tuned[1][name]) / 2)
    for name, method in METHODS.items():
        if method.needs is None and method.core == "neither":
            merge(run, tmp_path / f"by-{name}", "--method", name)


def test_statistics(zoo: Path, tmp_path: Path, run: Run) -> None:
    """By autograd alone, sample by sample; and merges by each statistic there is."""
    task = load_task_file("a.yaml")
    classifier = load_classifier(zoo / "a", zoo / "base", task, CLASSES)
    (batch,) = ImageBatches(read_samples(task, "train", limit=6, seed=0), classifier.pixels, 6)
    model, head = transformers.DINOv3ViTModel.from_pretrained("a").eval(), load_file("head-a.safetensors")
    names = parameter_names(model, DINOV3)
    expected = {names[name]: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for pixels, label in zip(batch.inputs, batch.labels, strict=True):
        model.zero_grad()
        logits = model(pixels[None]).last_hidden_state[:, 0] @ head["weight"].T + head["bias"]
        cross_entropy(logits, label[None]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[names[name]] += parameter.grad.square() / len(batch.labels)
    words = ("--base", "base", "--task", "a.yaml", "--samples", "6", "--out", tmp_path / "fisher.safetensors")
    assert run("fisher", "a", *words)[0] == 0
    found = load_file(tmp_path / "fisher.safetensors")
    assert found.keys() == expected.keys() and not found["embeddings.mask_token"].any()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-9)
    for method in ("epimer", "regmean", "kronecker-core"):
        merge(run, tmp_path / method, "--method", method, *TASKS)


def test_calibrate_and_evaluate(zoo: Path, tmp_path: Path, run: Run) -> None:
    """The residuals of a block are what the block computes; logits are transformers' own."""
    classifier = load_classifier(zoo / "a", zoo / "base", load_task_file("a.yaml"), CLASSES)
    model, head = transformers.DINOv3ViTModel.from_pretrained("a").eval(), load_file("head-a.safetensors")
    pixels, seen = torch.randn(3, 3, SIDE, SIDE), []
    with torch.no_grad():
        logits = model(pixels).last_hidden_state[:, 0] @ head["weight"].T + head["bias"]
        torch.testing.assert_close(classifier(pixels), logits)
        for block in blocks_of(classifier.tower, DINOV3):
            hook = block.module.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
            classifier(pixels)
            hook.remove()
            hidden, output = seen.pop()
            for residual in block.residuals(DINOV3):
                hidden = residual.run(block.module, hidden)
            torch.testing.assert_close(hidden, output[0] if isinstance(output, tuple) else output)
    merge(run, tmp_path / "out", "--calibrate", "--evaluate", "--compare", *TASKS)
    assert strict(tmp_path / "out" / "merge_report.json")["totals"]["calibrated"] == 2 * 6
    assert strict(tmp_path / "out" / "results.json")["tasks"].keys() == {"a", "b"}


def test_refine(zoo: Path, tmp_path: Path, run: Run) -> None:
    merge(run, tmp_path / "out", "--method", "mean", "--refine", "--refine-steps", "8", *TASKS)
    refinement = strict(tmp_path / "out" / "merge_report.json")["totals"]["refinement"]
    assert sum(refinement["after"][name] / refinement["before"][name] for name in "ab") < 2


def test_adapters(zoo: Path, tmp_path: Path, run: Run) -> None:
    """What PEFT makes of the merged adapter is what `--dense` writes."""
    import peft

    for seed, name in enumerate(("la", "lb")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
        adapted = peft.get_peft_model(transformers.DINOv3ViTModel.from_pretrained("base"), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / name)
    models = (str(tmp_path / "la"), str(tmp_path / "lb"))
    sparse = merge(run, tmp_path / "sparse", "--method", "tsv-m", models=models)
    dense = merge(run, tmp_path / "dense", "--method", "tsv-m", "--dense", models=models)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        base = transformers.DINOv3ViTModel.from_pretrained("base")
        merged = peft.PeftModel.from_pretrained(base, sparse).merge_and_unload().state_dict()
    expected = transformers.DINOv3ViTModel.from_pretrained(dense).state_dict()
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
