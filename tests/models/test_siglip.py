"""SigLIP without classifiers: a zero-shot head that is not projected, and a pooling head whose projections are one."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from helpers.classifiers import load_classifier
from helpers.command import Run
from helpers.data import CLASSES, write_data
from helpers.families import FAMILIES, SIDE
from hf_epimer.curvature.data_pass import estimate_fisher
from hf_epimer.curvature.per_sample import per_sample_gradients
from hf_epimer.errors import StatisticsError
from hf_epimer.models.loading import processor_class
from hf_epimer.models.siglip import SIGLIP
from hf_epimer.models.weights import parameter_names
from hf_epimer.tasks.task import Task, load_task_file

pytestmark = pytest.mark.skipif(not hasattr(transformers, "Siglip2Tokenizer"), reason="needs sentencepiece before")
TEMPLATES = ("{}", "the {}")
LONGEST = 12


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, a full SigLIP, and towers a/ and b/, with data and task files. Read only."""
    folder = tmp_path_factory.mktemp("siglip")
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    vocabulary = special | {letter: 5 + number for number, letter in enumerate("▁" + string.ascii_lowercase)}
    config = FAMILIES["siglip"].config()
    text = config.text_config.to_dict() | {"vocab_size": len(vocabulary), "max_position_embeddings": LONGEST}
    config = transformers.SiglipConfig(vision_config=config.vision_config.to_dict(), text_config=text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.SiglipModel(config)
        for name in ("base", "a", "b"):
            for parameter in model.parameters():
                parameter.data += (0.3 if name == "base" else 0.05) * torch.randn_like(parameter)
            (model if name == "base" else model.vision_model).save_pretrained(folder / name)
    transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder / "base")
    processor_class(SIGLIP)(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "base")
    for name in ("a", "b"):
        write_data(folder / "data" / name)
        templates = ", ".join(f"'{template}'" for template in TEMPLATES)
        (folder / f"{name}.yaml").write_text(f"name: {name}\ndataset: data/{name}\ntemplates: [{templates}]\n")
    return folder


def logits_of(model: Any, pixels: Tensor, folder: Path) -> Tensor:
    """As SigLIP defines them, but for the bias, which is the same for all classes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for name in CLASSES:
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        tokens = tokenizer(prompts, padding="max_length", max_length=LONGEST, return_tensors="pt")
        texts = model.text_model(input_ids=tokens["input_ids"]).pooler_output
        rows.append(normalize(normalize(texts, dim=-1).mean(0), dim=-1))
    images = normalize(model.vision_model(pixel_values=pixels).pooler_output, dim=-1)
    logits: Tensor = model.logit_scale.exp() * images @ torch.stack(rows).detach().T
    return logits


def test_a_zero_shot_head_is_that_of_the_full_model(zoo: Path) -> None:
    pixels = torch.randn(3, 3, SIDE, SIDE)
    ours = load_classifier(zoo / "base", zoo / "base", Task("any", "org/any", templates=TEMPLATES), CLASSES)
    model = transformers.SiglipModel.from_pretrained(zoo / "base").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), logits_of(model, pixels, zoo / "base"))


def test_the_fisher_information_reaches_into_the_pooling_head(zoo: Path) -> None:
    """Against autograd, sample by sample, through transformers' own pooling head."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(5, 3, SIDE, SIDE, generator=generator), torch.tensor([0, 1, 2, 1, 0])
    classifier = load_classifier(zoo / "base", zoo / "base", load_task_file(zoo / "a.yaml"), CLASSES)
    found = estimate_fisher(classifier, [(pixels, labels)])
    model = transformers.SiglipModel.from_pretrained(zoo / "base").eval()
    names = parameter_names(model.vision_model, SIGLIP)
    expected: dict[str, Any] = dict.fromkeys(names.values(), 0.0)
    for picture, label in zip(pixels, labels, strict=True):
        model.zero_grad()
        cross_entropy(logits_of(model, picture[None], zoo / "base"), label[None]).backward()
        for name, canonical in names.items():
            gradient = model.vision_model.get_parameter(name).grad
            assert gradient is not None
            expected[canonical] += gradient.square() / len(labels)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-9)


def test_an_attention_of_another_kind_is_named() -> None:
    model = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
    with (
        pytest.raises(StatisticsError, match="gradients of a MultiheadAttention are not known here"),
        per_sample_gradients(model, {"in_proj_weight": "w"}, lambda name, gradient: None),
    ):
        pass


def test_towers_merge_calibrated_and_are_measured(
    zoo: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    words = ["--base", "base", "--task", "a.yaml", "--task", "b.yaml", "--samples", "8", "--out", tmp_path / "out"]
    code, _, complaint = run("merge", "a=a", "b=b", *words, "--evaluate")
    assert (code, complaint) == (0, "")
    _, report = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SiglipModel.from_pretrained" in card and "zero-shot head" in card and not (tmp_path / "out/heads").exists()
