"""The classifier against transformers' own CLIP, the Fisher estimate against plain autograd, and their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from helpers.accelerator import DEVICE, StandIn
from helpers.classifiers import load_classifier, source_of, zero_shot_rows
from hf_epimer.errors import CheckpointError, TaskError
from hf_epimer.models import classifier as classifiers
from hf_epimer.models.classifier import Classifier, LinearHead, ZeroShotHead
from hf_epimer.models.head import load_head
from hf_epimer.models.loading import load_processor, load_tower
from hf_epimer.tasks.task import Task

CLASSES = ("a", "b", "ab")
TEMPLATES = ("{} b.", "a {}", "{}")
TASK = Task("any", "org/any", templates=TEMPLATES)


@pytest.fixture
def base(clip_base: Path) -> Path:
    return clip_base


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    colour = [Image.fromarray(rng.integers(0, 256, (11, 9, 3), dtype=np.uint8)) for _ in range(2)]
    return [*colour, Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))]


@pytest.fixture
def model(base: Path) -> Classifier:
    return load_classifier(base, base, TASK, CLASSES)


def test_logits_are_those_of_clip(base: Path, images: list[Image.Image]) -> None:
    """With one template, the zero-shot logits are CLIP's logits of the images against the prompts."""
    clip = CLIPModel.from_pretrained(base).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(base), load_processor(base)
    pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")
    prompts = tokenizer([f"a {name}" for name in CLASSES], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(**pixels, **prompts).logits_per_image
        model = load_classifier(base, base, replace(TASK, templates=("a {}",)), CLASSES)
        found = model(model.pixels(images))
    assert expected.std() > 0.1  # otherwise agreement would mean little
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_guesses_in_bfloat16_are_those_of_float32(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are in doubt are looked at again: without that, these on the border get another class."""
    pixels = torch.randn(2000, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    guesses = model.top1(pixels)
    few, many = (pixels[guesses == number] for number in guesses.bincount().topk(2).indices.flip(0))
    one, other = few, many[: len(few)]
    assert len(one) > 10
    for _ in range(20):
        middle = (one + other) / 2
        is_first = (model.top1(middle) == model.top1(few))[:, None, None, None]
        one, other = torch.where(is_first, middle, one), torch.where(is_first, other, middle)
    assert torch.equal(model.top1(one, "bf16"), model.top1(one))
    monkeypatch.setattr(classifiers, "UNSURE", -1.0)
    assert not torch.equal(model.top1(one, "bf16"), model.top1(one))


@pytest.mark.parametrize("is_linear", [False, True])
def test_doubt_is_the_distance_from_the_nearest_border(model: Classifier, is_linear: bool) -> None:
    """Features that are moved so far, along the shortest way to any class, are on a border and over none."""
    weight, bias = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0, 0, 0.2, 0])
    head = LinearHead(weight, bias) if is_linear else ZeroShotHead(torch.eye(3), weight, torch.tensor(2.0))
    features = normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(2)), dim=-1)
    likeliest = head(features).argmax(-1)
    reached = torch.full((len(features),), False)
    for other in head.weight:
        away = normalize(head.weight[likeliest] - other, dim=-1)
        moved = features - classifiers.margin(head, features)[:, None] * away
        logits = moved @ head.weight.T + (bias if is_linear else 0)
        least = logits.gather(1, likeliest[:, None]) - logits
        assert float(least.min()) > -1e-5
        reached |= (least < 1e-5).sum(-1) > 1
    assert reached.all()


def test_one_class_is_never_in_doubt() -> None:
    head = LinearHead(torch.ones(1, 3), torch.zeros(1))
    assert classifiers.margin(head, torch.ones(2, 3)).isinf().all()


def test_of_many_classes_none_is_in_doubt_about_itself() -> None:
    head = ZeroShotHead(
        torch.eye(64), torch.randn(60, 64, generator=torch.Generator().manual_seed(0)), torch.tensor(4.6)
    )
    assert float(classifiers.margin(head, head.rows).min()) > 0.1


def test_pictures_go_to_the_device_of_the_tower(model: Classifier) -> None:
    with StandIn() as device:
        logits = model.to(DEVICE)(torch.ones(4, 3, 8, 8))
    assert logits.device == DEVICE and device.sent >= 4 * 3 * 8 * 8 and device.waits == 0


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
    torch.testing.assert_close(zero_shot_rows(base, CLASSES, TEMPLATES), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_only_the_tower_is_trainable_under_its_names_on_disk(base: Path, model: Classifier) -> None:
    on_disk = {name for name in load_file(base / "model.safetensors") if name.startswith("vision_model.")}
    assert set(model.tower_parameters()) == on_disk
    assert len(list(model.parameters())) == len(on_disk)


def test_a_missing_tensor_is_an_error(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tower = {name: value for name, value in tensors.items() if name.startswith("vision_model.")}
    load_tower(base).config.save_pretrained(tmp_path)
    save_file(tower, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_tower(tmp_path)
    del tower["vision_model.pre_layrnorm.bias"]
    save_file(tower, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"pre_layrnorm\.bias"):
        load_tower(tmp_path)


def test_a_tasks_own_head_is_used_and_checked(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    weight = torch.arange(30.0).reshape(3, 10)
    save_file({"weight": weight}, file)
    task = Task("own", "org/own", head=str(file))
    head = load_head(source_of(base), source_of(base), task, CLASSES)
    assert isinstance(head, ZeroShotHead)
    torch.testing.assert_close(head.rows, normalize(weight, dim=-1))
    with pytest.raises(TaskError, match="3 rows for the 2 classes"):
        load_head(source_of(base), source_of(base), task, CLASSES[:2])
    save_file({"bias": weight}, file)
    with pytest.raises(TaskError, match="weight"):
        load_head(source_of(base), source_of(base), task, CLASSES)
    save_file({"weight": torch.ones(3, 7)}, file)
    with pytest.raises(TaskError, match="projects to 10"):
        load_head(source_of(base), source_of(base), task, CLASSES)
