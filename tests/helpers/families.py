"""Every family of models as small as it can be: a base, fine-tuned models, adapters, and transformers' own output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from helpers.data import CLASSES, write_data
from hf_epimer.models.architecture import Architecture
from hf_epimer.models.clip import CLIP
from hf_epimer.models.deit import DEIT
from hf_epimer.models.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from hf_epimer.models.loading import processor_class
from hf_epimer.models.siglip import SIGLIP
from hf_epimer.models.vit import VIT
from hf_epimer.models.weights import parameters_of

ROOT = Path(__file__).parents[2]
SIDE = 8
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}
LARGER = SIZE | {"image_size": 12}
"""Of pictures that a model was trained with first, where it stretches its positions to those it gets."""

TUNED = ("a", "b")


@dataclass(frozen=True)
class Family:
    """A family as the tests make it.

    Attributes:
        architecture: its entry in the table.
        model_class: of the fine-tuned models, which have a classifier each.
        config: makes the config of one, from the class names.
    """

    architecture: Architecture
    model_class: str
    config: Callable[..., Any]

    def make(self, **labels: Any) -> Any:
        """A model with random weights."""
        return getattr(transformers, self.model_class)(self.config(**labels)).eval()

    def loaded(self, folder: Path, **options: Any) -> Any:
        """A merge, by the class that its config.json names."""
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        return getattr(transformers, name).from_pretrained(folder, **options)

    def tower_of(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The parameters of its vision tower by canonical names."""
        return {name: parameter.detach() for name, parameter in parameters_of(model, self.architecture).items()}


def _named(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SIZE | {"intermediate_size": 24}

FAMILIES = {
    family.architecture.tag: family
    for family in (
        Family(
            CLIP,
            "CLIPForImageClassification",
            lambda **labels: transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, **labels),
        ),
        Family(
            SIGLIP,
            "SiglipForImageClassification",
            lambda **labels: transformers.SiglipConfig(vision_config=VISION, text_config=TEXT, **labels),
        ),
        Family(
            VIT,
            "ViTForImageClassification",
            lambda **labels: transformers.ViTConfig(**VISION, **labels),
        ),
        Family(
            DEIT,
            "DeiTForImageClassification",
            lambda **labels: transformers.DeiTConfig(**VISION, **labels),
        ),
        Family(
            DINOV2,
            "Dinov2ForImageClassification",
            lambda **labels: transformers.Dinov2Config(**LARGER, mlp_ratio=2, **labels),
        ),
        Family(
            DINOV2_WITH_REGISTERS,
            "Dinov2WithRegistersForImageClassification",
            lambda **labels: transformers.Dinov2WithRegistersConfig(**LARGER, mlp_ratio=2, **labels),
        ),
    )
}


def write_family(folder: Path, family: Family) -> Path:
    """base/, a/ and b/ with classifiers of three classes, data/a and data/b, a.yaml and b.yaml.

    The classes of `b` stand in another order in its model than in its data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = _shaken(family.make(num_labels=5), 0.3)
        base.save_pretrained(folder / "base")
        orders = {"a": CLASSES, "b": CLASSES[::-1]}
        for name in TUNED:
            tuned = family.make(**_named(orders[name]))
            kept = {key: value for key, value in base.state_dict().items() if not key.startswith("classifier")}
            tuned.load_state_dict(kept, strict=False)
            _shaken(tuned, 0.05).save_pretrained(folder / name)
            write_data(folder / "data" / name)
            lines = (f"name: {name}", f"dataset: data/{name}", "templates: ['{}']")
            (folder / f"{name}.yaml").write_text("\n".join(lines))
    side = {"height": SIDE, "width": SIDE}
    processor = processor_class(family.architecture)(size=side, crop_size=side)
    for name in ("base", *TUNED):
        processor.save_pretrained(folder / name)
    return folder


def _shaken(model: Any, size: float) -> Any:
    """The initial weights are so small that all pictures look alike."""
    for parameter in model.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return model


def logits_of(family: Family, folder: Path, label: str, pixels: torch.Tensor) -> torch.Tensor:
    """What transformers alone makes of a merge and the classifier beside it that has this label, as the card says."""
    code = re.findall(r"^(?:vision|logits) = .*", (folder / "README.md").read_text(), re.M)
    head = load_file(folder / "heads" / f"{label}.safetensors")
    names = vars(transformers) | {"linear": torch.nn.functional.linear, "head": head, "pixels": pixels}
    code[0] = re.sub(r'from_pretrained\(".*?"', f'from_pretrained("{folder}"', code[0])
    with torch.no_grad():
        exec("\n".join(code), names)
    logits: torch.Tensor = names["logits"]
    return logits


def lora_adapter(family: Family, folder: Path, name: str) -> Path:
    """An adapter of the base as PEFT saves it, with a classifier of three classes."""
    import peft

    target = folder / f"lora-{name}"
    if target.exists():
        return target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TUNED.index(name))
        kind = getattr(transformers, family.model_class)
        model = kind.from_pretrained(folder / "base", num_labels=len(CLASSES), ignore_mismatched_sizes=True)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc2"], modules_to_save=["classifier"])
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(target)
    return target


def families_page() -> Iterator[tuple[str, str]]:
    """(family, ability) of every `yes` in the table of docs/families.md."""
    header, _, *rows = re.findall(r"^\|(.*)\|$", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), re.M)
    abilities = [cell.strip() for cell in header.split("|")][2:]
    for row in rows:
        name, _, *said = (cell.strip() for cell in row.split("|"))
        assert set(said) <= {"yes", "no"}
        yield from (
            (name.split("`")[1], ability) for ability, cell in zip(abilities, said, strict=True) if cell == "yes"
        )
