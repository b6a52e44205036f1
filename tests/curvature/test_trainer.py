"""Fisher information out of training: the callback in a real Trainer, Adam's second moments, and the five lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionModel, Trainer, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from helpers.clip import inside
from hf_epimer import EpiMerConfig, FisherCallback, estimate_fisher, fisher_from_adam, merge_state_dicts
from hf_epimer.errors import DataError, StatisticsError, UsageError
from hf_epimer.methods.base import MethodConfig
from hf_epimer.methods.tsv import TSVMConfig
from hf_epimer.models.clip import CLIP
from hf_epimer.models.loading import load_tower


class ImageClassifier(nn.Module):
    """What people train: a tower with a linear head."""

    def __init__(self, vision: CLIPVisionModel) -> None:
        super().__init__()
        self.vision = vision
        self.head = nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        pooled = self.vision(pixel_values=pixel_values).pooler_output
        logits = self.head(self.dropout(pooled))
        return ImageClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class Pictures(torch.utils.data.Dataset):
    """Noise, the same each time, or augmented."""

    def __init__(self, count: int = 13, augmented: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 8, 8, generator=generator)
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.pixels[index]
        return {"pixel_values": pixels + torch.randn_like(pixels) if self.augmented else pixels, "labels": index % 3}


@pytest.fixture
def classifier(clip_base: Path) -> ImageClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageClassifier(load_tower(clip_base))


def train(model: nn.Module, data: Pictures, out: Path, callback: FisherCallback) -> Trainer:
    arguments = TrainingArguments(
        str(out), num_train_epochs=1, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


class Logits(nn.Module):
    """The trained model as `estimate_fisher` takes it."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits


def canonical(found: dict[str, Tensor]) -> dict[str | None, Tensor]:
    return {CLIP.canonical(name.removeprefix("model.vision.")): value for name, value in found.items()}


def test_the_callback_writes_the_file_beside_the_checkpoint(classifier: ImageClassifier, tmp_path: Path) -> None:
    data = Pictures()
    train(classifier, data, tmp_path / "out", FisherCallback("shapes"))
    found = load_file(tmp_path / "out" / "fisher.safetensors")
    batches = [(data.pixels, torch.tensor([index % 3 for index in range(13)]))]
    expected = estimate_fisher(Logits(classifier), batches)
    assert found.keys() == {f"vision_model.{name}" for name, _ in inside(classifier.vision).named_parameters()}
    for name, value in found.items():
        if not name.endswith("k_proj.bias"):
            other = canonical(expected)[name]
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-9 * float(other.max()))
    with safe_open(tmp_path / "out" / "fisher.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["format"], header["task"], header["samples"]) == ("hf-epimer.fisher/1", "shapes", "13")
    assert str(tmp_path) not in str(header)
    # and the other file from which the next person merges without data
    grams = load_file(tmp_path / "out" / "gradient_gram.safetensors")
    with safe_open(tmp_path / "out" / "gradient_gram.safetensors", "pt") as file:
        assert file.metadata()["format"] == "hf-epimer.gradient-gram/1" and file.metadata()["compress"] == "bf16"
    matrices = [name for name, value in found.items() if value.ndim == 2]
    assert grams.keys() == {f"{name}{part}" for name in matrices for part in (".gradient_gram", ".positions")}
    width = classifier.vision.config.hidden_size
    assert grams["vision_model.encoder.layers.0.mlp.fc1.weight.gradient_gram"].shape == (width * (width + 1) // 2,)


def test_augmented_data_are_refused_before_training(classifier: ImageClassifier, tmp_path: Path) -> None:
    before = classifier.head.weight.detach().clone()
    with pytest.raises(StatisticsError, match="augmentation"):
        train(classifier, Pictures(augmented=True), tmp_path / "out", FisherCallback())
    assert torch.equal(classifier.head.weight, before)
    train(classifier, Pictures(augmented=True), tmp_path / "out", FisherCallback(dataset=Pictures()))
    assert (tmp_path / "out" / "fisher.safetensors").is_file()
    assert not torch.equal(classifier.head.weight, before)
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_models_and_data_that_cannot_be_measured(classifier: ImageClassifier, tmp_path: Path) -> None:
    class Unlabelled(Pictures):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": self.pixels[index]}

    with pytest.raises(DataError, match="needs batches with `labels`"):
        train(classifier, Pictures(), tmp_path / "out", FisherCallback(dataset=Unlabelled()))
    with pytest.raises(StatisticsError, match="contains no CLIPVisionModel"):
        fisher_from_adam(torch.optim.Adam(nn.Linear(2, 2).parameters()), nn.Linear(2, 2))


def test_adam_knows_the_mean_of_squared_gradients(classifier: ImageClassifier) -> None:
    """With beta_2 -> 1 its bias-corrected second moment is the mean over the steps so far."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=0.0, betas=(0.9, 0.999999))
    with pytest.raises(StatisticsError, match="no second moment"):
        fisher_from_adam(optimizer, classifier)
    classifier.eval()
    data = Pictures(6)
    for index in range(6):
        optimizer.zero_grad()
        classifier(data.pixels[index : index + 1], torch.tensor([index % 3])).loss.backward()
        optimizer.step()
    found = fisher_from_adam(optimizer, classifier)
    expected = estimate_fisher(Logits(classifier), [(data.pixels, torch.tensor([0, 1, 2, 0, 1, 2]))])
    name = "encoder.layers.1.mlp.fc2.weight"
    assert found.keys() == {f"vision_model.{name}" for name, _ in inside(classifier.vision).named_parameters()}
    torch.testing.assert_close(
        found[f"vision_model.{name}"], canonical(expected)[f"vision_model.{name}"], rtol=2e-2, atol=1e-6
    )
    doubled = fisher_from_adam(optimizer, classifier, batch_size=2)
    assert torch.equal(doubled[f"vision_model.{name}"], 2 * found[f"vision_model.{name}"])


def test_five_lines_in_training_code(clip_zoo: Path, tmp_path: Path) -> None:
    """Modules and files in, a state dict that the base takes out; the same as the merge of plain tensors."""
    base = load_tower(clip_zoo / "base")
    tuned = [load_tower(clip_zoo / name) for name in "ab"]
    generator = torch.Generator().manual_seed(0)
    fisher = [{k: torch.rand(v.shape, generator=generator) for k, v in m.state_dict().items()} for m in tuned]
    on_disk = [{f"vision_model.{name}": value for name, value in entry.items()} for entry in fisher]
    from safetensors.torch import save_file

    save_file(on_disk[1], tmp_path / "fisher.safetensors")
    merged = EpiMerConfig(rank=4).merge(base, tuned, [on_disk[0], tmp_path / "fisher.safetensors"])
    states = [dict(model.state_dict()) for model in tuned]
    expected = merge_state_dicts(dict(base.state_dict()), states, "epimer", EpiMerConfig(rank=4), fisher)
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    base.load_state_dict(merged)
    prefixed = [{f"vision_model.{name}": value for name, value in state.items()} for state in states]
    assert TSVMConfig(rank=4).merge(base, prefixed).keys() == merged.keys()
    with pytest.raises(UsageError, match="MethodConfig is no method's config"):
        MethodConfig().merge(base, tuned)
