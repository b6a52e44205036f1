"""The classifier against transformers' own CLIP, the Fisher estimate against plain autograd, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from hf_epimer.classifier import Classifier, ImageProcessor, load_classifier, load_vision, task_head, zero_shot_head
from hf_epimer.errors import CheckpointError, DataError, TaskError
from hf_epimer.statistics import FisherMetadata, estimate_fisher, save_fisher
from hf_epimer.tasks import Task

CLASSES = ("a", "b", "ab")
TEMPLATES = ("{} b.", "a {}", "{}")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with two small towers of unlike widths and random weights."""
    folder = tmp_path_factory.mktemp("base")
    tokens = ["a", "b", ".", "a</w>", "b</w>", ".</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[("a", "b</w>")], model_max_length=8)
    special = {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 8}
    size = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 10}
    text = size | special | {"vocab_size": len(tokens), "hidden_size": 12, "max_position_embeddings": 8}
    vision = size | {"hidden_size": 16, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10))
        for parameter in model.parameters():  # the initial weights are so small that all classes look alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = ImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    colour = [Image.fromarray(rng.integers(0, 256, (11, 9, 3), dtype=np.uint8)) for _ in range(2)]
    return [*colour, Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))]


@pytest.fixture
def model(base: Path) -> Classifier:
    return load_classifier(base, base, zero_shot_head(base, CLASSES, TEMPLATES))


def test_logits_are_those_of_clip(base: Path, images: list[Image.Image]) -> None:
    """With one template, the zero-shot logits are CLIP's logits of the images against the prompts."""
    clip = CLIPModel.from_pretrained(base).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(base), ImageProcessor.from_pretrained(base)
    pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")
    prompts = tokenizer([f"a {name}" for name in CLASSES], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(**pixels, **prompts).logits_per_image
        model = load_classifier(base, base, zero_shot_head(base, CLASSES, ["a {}"]))
        found = model(model.pixels(images))
    assert expected.std() > 0.1  # otherwise agreement would mean little
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_head_averages_unit_text_features(base: Path) -> None:
    clip = CLIPModel.from_pretrained(base).eval()
    tokenizer = CLIPTokenizer.from_pretrained(base)
    rows = []
    with torch.no_grad():
        for name in CLASSES:
            features = []
            for template in TEMPLATES:
                tokens = tokenizer(template.format(name), return_tensors="pt")
                feature = clip.text_projection(clip.text_model(**tokens).pooler_output)[0]
                features.append(feature / feature.norm())
            mean = sum(features) / len(features)
            rows.append(mean / mean.norm())
    torch.testing.assert_close(zero_shot_head(base, CLASSES, TEMPLATES), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_only_the_tower_is_trainable_under_its_names_on_disk(base: Path, model: Classifier) -> None:
    on_disk = {name for name in load_file(base / "model.safetensors") if name.startswith("vision_model.")}
    assert set(model.vision_parameters()) == on_disk
    assert len(list(model.parameters())) == len(on_disk)


def test_a_missing_tensor_is_an_error(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tower = {name: value for name, value in tensors.items() if name.startswith("vision_model.")}
    load_vision(base).config.save_pretrained(tmp_path)
    save_file(tower, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_vision(tmp_path)
    del tower["vision_model.pre_layrnorm.bias"]
    save_file(tower, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"pre_layrnorm\.bias"):
        load_vision(tmp_path)


def test_a_tasks_own_head_is_used_and_checked(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    weight = torch.arange(30.0).reshape(3, 10)
    save_file({"weight": weight}, file)
    task = Task("own", "org/own", head=str(file))
    torch.testing.assert_close(task_head(task, base, CLASSES), weight)
    with pytest.raises(TaskError, match="3 rows for the 2 classes"):
        task_head(task, base, CLASSES[:2])
    save_file({"bias": weight}, file)
    with pytest.raises(TaskError, match="weight"):
        task_head(task, base, CLASSES)
    with pytest.raises(TaskError, match="projects to 10"):
        load_classifier(base, base, torch.ones(3, 7))


def reference_fisher(base: Path, images: list[Image.Image], labels: list[int], head: Tensor) -> dict[str, Tensor]:
    """The definition, written with transformers' CLIP and one backward pass per sample."""
    clip = CLIPModel.from_pretrained(base).eval()
    processor = ImageProcessor.from_pretrained(base)
    total: dict[str, Tensor] = {}
    for image, label in zip(images, labels, strict=True):
        clip.zero_grad()
        pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        feature = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)[0]
        scores = clip.logit_scale.detach().exp() * (normalize(head, dim=1) @ (feature / feature.norm()))
        (torch.logsumexp(scores, 0) - scores[label]).backward()
        for name, parameter in clip.named_parameters():
            if name.startswith("vision_model."):
                total[name] = total.get(name, 0) + parameter.grad**2 / len(images)
    return total


def test_fisher_is_the_mean_of_squared_gradients(base: Path, model: Classifier, images: list[Image.Image]) -> None:
    labels = [2, 0, 1]
    expected = reference_fisher(base, images, labels, model.head)
    found = estimate_fisher(model, images, labels)
    assert found.keys() == expected.keys()
    # Softmax ignores a shift that is common to all keys, so the gradient of the keys' bias is nothing but rounding.
    rounding = 1e-9 * max(float(value.max()) for value in expected.values())
    assert sum(float(value.max()) < rounding for value in expected.values()) == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=rounding, msg=name)
    assert all(value.dtype == torch.float32 for value in found.values())


def test_fisher_refuses_unusable_samples(model: Classifier, images: list[Image.Image]) -> None:
    with pytest.raises(DataError, match="label 3"):
        estimate_fisher(model, images, [0, 1, 3])
    with pytest.raises(DataError, match="as many images"):
        estimate_fisher(model, images, [0])
    with pytest.raises(DataError, match="as many images"):
        estimate_fisher(model, [], [])


def test_a_fisher_file_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    fisher = {"vision_model.a": torch.rand(2, 3)}
    save_fisher(path, fisher, FisherMetadata(3, "dtd", "org/dtd", "abc", "org/model", "def", "true", 7))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "hf-epimer.fisher/1", "samples": "3", "task": "dtd", "dataset": "org/dtd",
            "dataset_revision": "abc", "model": "org/model", "model_sha": "def", "labels": "true", "seed": "7",
        }  # fmt: skip
        torch.testing.assert_close(file.get_tensor("vision_model.a"), fisher["vision_model.a"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["fisher.safetensors"]
