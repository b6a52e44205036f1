"""docs/families.md at its word: every `yes` of its table is a case here, compared with what transformers does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers.classifiers import load_classifier, source_of
from helpers.command import Run, strict
from helpers.data import CLASSES
from helpers.families import FAMILIES, SIDE, TUNED, Family, families_page, logits_of, lora_adapter, write_family
from hf_epimer.evaluation.accuracy import evaluate
from hf_epimer.methods import METHODS
from hf_epimer.models import ARCHITECTURES
from hf_epimer.models.weights import blocks_of, parameter_names
from hf_epimer.tasks.images import ImageBatches, read_samples
from hf_epimer.tasks.task import load_task_file

TASKS = ("--task", "a.yaml", "--task", "b.yaml", "--samples", "8")


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's models, made when it is first asked for. Read only."""
    return cache(lambda tag: write_family(tmp_path_factory.mktemp(tag), FAMILIES[tag]))


@pytest.mark.parametrize(("tag", "ability"), [cell for cell in families_page() if cell[0] in FAMILIES])
def test_every_yes_of_the_table(
    tag: str,
    ability: str,
    zoos: Callable[[str], Path],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(zoos(tag))

    def command(*words: object) -> None:
        code, _, complaint = run(*words)
        assert (code, complaint) == (0, ""), complaint

    def merge(*words: object, out: str = "merged", models: tuple[str, ...] = TUNED) -> Path:
        named = [f"{label}={model}" for label, model in zip(TUNED, models, strict=True)]
        command("merge", *named, "--base", "base", *words, "--out", tmp_path / out)
        return tmp_path / out

    CHECKS[ability](FAMILIES[tag], zoos(tag), merge, command)


def test_the_page_speaks_of_every_family() -> None:
    tags = {family.tag for family in ARCHITECTURES}
    assert set(families_page()) == {(tag, ability) for tag in tags for ability in CHECKS}


# --- one check for each column --------------------------------------------------------------------------------------

Merge = Callable[..., Path]  # of the two fine-tuned models, with these words: the folder
Command = Callable[..., None]  # which must end well and say nothing


def check_merge(family: Family, zoo: Path, merge: Merge, command: Command) -> None:
    """A mean of two is that, whatever class reads it; its classifiers are those of the models."""
    folder = merge("--method", "mean")
    model, report = family.loaded(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    kind = getattr(transformers, family.model_class)
    tuned = [family.tower_of(kind.from_pretrained(zoo / name)) for name in TUNED]
    merged = family.tower_of(model)
    assert merged.keys() == tuned[0].keys() and len(merged) == len(model.state_dict())
    for name, value in merged.items():
        torch.testing.assert_close(value, (tuned[0][name] + tuned[1][name]) / 2)
    for name in TUNED:
        stored, head = load_file(zoo / name / "model.safetensors"), load_file(folder / "heads" / f"{name}.safetensors")
        assert torch.equal(head["weight"], stored["classifier.weight"])
        assert torch.equal(head["bias"], stored["classifier.bias"])
    card = (folder / "README.md").read_text()
    assert f"vision = {type(model).__name__}.from_pretrained" in card and "heads/b.safetensors" in card
    for name, method in METHODS.items():
        if method.needs is None and method.core == "neither":
            merge("--method", name, out=name)


def check_statistics(family: Family, zoo: Path, merge: Merge, command: Command) -> None:
    """Fisher information by autograd alone, sample by sample; and a merge by each statistic there is."""
    task = load_task_file(zoo / "a.yaml")
    classifier = load_classifier(zoo / "a", zoo / "base", task, CLASSES)
    batches = ImageBatches(read_samples(task, "train", limit=6, seed=0), classifier.pixels, 6)
    (batch,) = batches
    model = getattr(transformers, family.model_class).from_pretrained(zoo / "a").eval()
    names = parameter_names(model, family.architecture)
    expected: dict[str, Any] = dict.fromkeys(names.values(), 0.0)
    for pixels, label in zip(batch.inputs, batch.labels, strict=True):
        model.zero_grad()
        cross_entropy(model(pixel_values=pixels[None]).logits, label[None]).backward()
        for name, canonical in names.items():
            gradient = model.get_parameter(name).grad
            expected[canonical] += 0.0 if gradient is None else gradient.square() / len(batch.labels)
    measured = merge("--method", "fisher", *TASKS).parent / "fisher.safetensors"
    command("fisher", "a", "--base", "base", "--task", "a.yaml", "--samples", "6", "--out", measured)
    found = load_file(measured)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, torch.zeros_like(value) + expected[name], rtol=1e-3, atol=1e-9)
    for method in ("epimer", "regmean", "kronecker-core"):
        merge("--method", method, *TASKS, *(["--rank", "4"] if method == "epimer" else []), out=method)


def check_calibrate(family: Family, zoo: Path, merge: Merge, command: Command) -> None:
    """The residuals of a block are what the block computes, and all their layers are solved again."""
    task = load_task_file(zoo / "a.yaml")
    tower = load_classifier(zoo / "a", zoo / "base", task, CLASSES).tower.requires_grad_(False)
    blocks = blocks_of(tower, family.architecture)
    for block in blocks:
        hidden, expected = _seen(tower, block.module)
        assert source_of(zoo / "base").positions == hidden.shape[1]
        for residual in block.residuals(family.architecture):
            hidden = residual.run(block.module, hidden)
        torch.testing.assert_close(hidden, expected)
    totals = strict(merge(*TASKS, "--calibrate") / "merge_report.json")["totals"]
    assert totals["calibrated"] == 2 * 6


def _seen(tower: Any, block: nn.Module) -> tuple[Tensor, Tensor]:
    """What goes into a block and comes out of it when pictures run through its tower."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen.append((arguments[0].detach(), output[0] if isinstance(output, tuple) else output))

    hook = block.register_forward_hook(note)
    tower(pixel_values=torch.randn(2, 3, SIDE, SIDE))
    hook.remove()
    return seen[0]


def check_refine(family: Family, zoo: Path, merge: Merge, command: Command) -> None:
    """What is trained is nearer to what each model's classifier reads."""
    report = strict(merge(*TASKS, "--method", "mean", "--refine", "--refine-steps", "4") / "merge_report.json")
    refinement = report["totals"]["refinement"]
    assert sum(refinement["after"].values()) < sum(refinement["before"].values())


def check_evaluate(family: Family, zoo: Path, merge: Merge, command: Command) -> None:
    """Logits as transformers computes them, of a model and of a merge; and the accuracies that follow from them."""
    pixels = torch.randn(3, 3, SIDE, SIDE)
    task = load_task_file(zoo / "b.yaml")
    model = getattr(transformers, family.model_class).from_pretrained(zoo / "b").eval()
    order = [model.config.label2id[name] for name in CLASSES]
    assert order == [2, 1, 0]
    with torch.no_grad():
        ours = load_classifier(zoo / "b", zoo / "base", task, CLASSES)(pixels)
        torch.testing.assert_close(ours, model(pixel_values=pixels).logits[:, order])
    folder = merge("--method", "mean", *TASKS, "--evaluate", "--compare")
    row = strict(folder / "results.json")["tasks"]["b"]
    assert row.keys() >= {"base", "fine_tuned"}  # measured with the same classifier
    with torch.no_grad():
        ours = load_classifier(folder, zoo / "base", task, CLASSES)(pixels)
        torch.testing.assert_close(ours, logits_of(family, folder, "b", pixels)[:, order])
    assert not evaluate(str(folder), [task]).zero_shot


def check_adapters(family: Family, zoo: Path, merge: Merge, command: Command) -> None:
    """What PEFT makes of the merged adapter is what `--dense` writes; classifiers are kept from both."""
    import peft

    if parse(transformers.__version__) < parse(family.architecture.since):
        pytest.skip(f"a merged adapter has the names of transformers {family.architecture.since}")

    adapters = tuple(str(lora_adapter(family, zoo, name)) for name in TUNED)
    words = ("--method", "tsv-m")
    dense = merge(*words, "--dense", out="dense", models=adapters)
    sparse = merge(*words, out="sparse", models=adapters)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        base = type(family.loaded(dense)).from_pretrained(zoo / "base", num_labels=0)
        merged = peft.PeftModel.from_pretrained(base, sparse).merge_and_unload()
    expected, found = family.loaded(dense).state_dict(), merged.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for folder in (dense, sparse):
        assert sorted(path.name for path in (folder / "heads").iterdir()) == ["a.safetensors", "b.safetensors"]


CHECKS: dict[str, Callable[[Family, Path, Merge, Command], None]] = {
    "merge": check_merge,
    "statistics": check_statistics,
    "calibrate": check_calibrate,
    "refine": check_refine,
    "evaluate": check_evaluate,
    "adapters": check_adapters,
}
