"""A resolved reference to a model, with what its files say of it: kind, config, architecture, weights.

Nothing here reads a weight; `ModelSource.open` reads the headers of weight files.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_epimer.checkpoints.reader import FORMATS, WEIGHTS, Checkpoint, choose_weights, read_json
from hf_epimer.errors import CheckpointError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.hub.resolve import resolve
from hf_epimer.hub.source import Source
from hf_epimer.lora.peft_files import ADAPTER_CONFIG, adapter_weights, check_config, is_adapter
from hf_epimer.merging.inputs import check_shapes
from hf_epimer.models import architecture_of
from hf_epimer.models.any_architecture import Stored
from hf_epimer.models.architecture import Architecture
from hf_epimer.outside import LARGEST_LISTING, leads_elsewhere, read_text
from hf_epimer.types import Shape

CONFIG = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
LARGEST_PROCESSOR = 2**20
"""Bytes of an image processor's settings."""

HEADS = "heads"
"""The folder beside a merge in which the classifiers of its tasks lie."""


def resolve_model(ref: ModelRef) -> ModelSource:
    """Look a reference to a model up, as `hf_epimer.hub.resolve.resolve` does. Nothing is downloaded.

    Raises:
        NotFoundError, AccessError, HubError: as there.
    """
    return ModelSource(**vars(resolve(ref)))


@dataclass(frozen=True)
class ModelSource(Source):
    """A full checkpoint, or a LoRA adapter of one, at one commit. Its facts are worked out once, when asked for."""

    def labelled(self, label: str) -> ModelSource:
        """The same model under another label; what has been worked out stays."""
        same = copy.copy(self)
        object.__setattr__(same, "label", label)
        return same

    def check_readable(self) -> None:
        """Work out now what a merge needs to know of it.

        Raises:
            CheckpointError: its config says that it cannot be merged, or it has no weights that may be read.
        """
        facts = (self.config if self.is_adapter else self.vision_config), self.weight_files
        assert all(facts)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter, which has no config.json of its own and needs its base."""
        return is_adapter(self.files)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json, or an adapter's adapter_config.json.

        Raises:
            CheckpointError: there is none, it is no JSON object, or of a kind of adapter that cannot be merged.
        """
        name = ADAPTER_CONFIG if self.is_adapter else CONFIG
        if name not in self.files:
            raise CheckpointError(f"{self}: there is no {name}; {self._listing}")
        config = read_json(self.fetch(name), str(self))
        if self.is_adapter:
            check_config(config, str(self))
        else:
            check_not_quantised(config, str(self))
        return config

    @cached_property
    def weight_files(self) -> tuple[str, ...]:
        """The names of its weight files; an adapter's config is one of them, for its scale is in it.

        Raises:
            CheckpointError: it has none that may be read.
        """
        if self.is_adapter:
            return ADAPTER_CONFIG, adapter_weights(self.files, str(self))
        elsewhere = (self.elsewhere, self._listing)
        return tuple(choose_weights(self.files, str(self), self._read_index, *elsewhere))

    def _read_index(self, name: str) -> str:
        return read_text(self.fetch(name), LARGEST_LISTING)

    @cached_property
    def head_files(self) -> tuple[str, ...]:
        """The names of the classifiers that lie beside a merge."""
        if self.ref.is_local:
            names = [
                path.relative_to(self.ref.location).as_posix() for path in Path(self.ref.location).glob(f"{HEADS}/*")
            ]
        else:
            names = [name for name in self.files if name.startswith(f"{HEADS}/")]
        return tuple(sorted(name for name in names if name.endswith(".safetensors") and name.count("/") == 1))

    @property
    def _listing(self) -> str:
        """What is there instead of what was looked for, and what to do about it."""
        names = sorted({re.sub("/.*", "/", name) for name in self.files}, key=lambda name: (name.endswith("/"), name))
        if self.ref.is_local:
            names += sorted(f"{path.name}/" for path in Path(self.ref.location).iterdir() if path.is_dir())
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        if any("open_clip" in name for name in names):
            remedy = "; it is in OpenCLIP's layout: `hf-epimer convert REF --out DIR` makes a CLIPModel of it"
        elif any(name.endswith(".safetensors") for name in names):
            remedy = f"; weights are read under the name {WEIGHTS}: rename the variant that is to be merged"
        elif any(name.endswith("/") for name in names):
            how = "that folder" if self.ref.is_local else f"it, too: {self.ref.location}:FOLDER"
            remedy = f"; if the checkpoint lies in a subfolder, name {how}"
        else:
            remedy = ""
        return f"there is {shown or 'nothing'}{remedy}"

    @property
    def weight_bytes(self) -> int:
        """Of its weight files, as far as their sizes are known."""
        return sum(self.sizes.get(name, 0) for name in self.weight_files)

    @cached_property
    def architecture(self) -> Architecture:
        """The family of a full checkpoint, or what can be said of one of none; an adapter's is that of its base.

        Raises:
            CheckpointError: it is an adapter, or has no config.
        """
        if self.is_adapter:
            raise CheckpointError(f"{self}: it is an adapter, and a full checkpoint is needed: there is no {CONFIG}")
        return architecture_of(self.config)

    @cached_property
    def vision_config(self) -> dict[str, Any]:
        """The fields of a full checkpoint's config that decide with what it can be merged."""
        if self.architecture.data_free:
            return {"model_type": self.architecture.tag}
        return self.architecture.vision_config(self.config, str(self))

    @property
    def is_classification_class(self) -> bool:
        """Whether transformers loads it as its family's classifier, which has a vision tower and no text tower."""
        kind = self.architecture.classification
        return kind is not None and kind.trained_class in (self.config.get("architectures") or [])

    @property
    def has_text_tower(self) -> bool:
        """Whether it is a full model that a zero-shot head can be made from."""
        zero_shot = self.architecture.zero_shot
        return (
            zero_shot is not None
            and self.config.get("model_type") in zero_shot.model_types
            and not self.is_classification_class
        )

    @cached_property
    def tensors(self) -> Stored:
        """Type and shape of all that its weight files hold, by name, from their headers: no weight is fetched.

        Raises:
            CheckpointError: a file is damaged, or two hold tensors of one name.
        """
        if self.is_here:
            checkpoint = Checkpoint(self.label, [self.fetch(name) for name in self.weight_files])
            found = {name: (checkpoint.dtypes[name], shape) for name, shape in checkpoint.shapes.items()}
        else:
            found = {}
            for file in self.weight_files:
                found |= self.header(file)
        return dict(sorted(found.items()))

    @cached_property
    def content_sha(self) -> str:
        """What pins its weights: its commit on the Hub, or the sha256 of a local folder's weight files."""
        if not self.ref.is_local:
            return f"{self.ref.revision}:{self.ref.subfolder}" if self.ref.subfolder else str(self.ref.revision)
        digest = hashlib.sha256()
        for name in self.weight_files:
            with open(self.fetch(name), "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def has_tokenizer(self) -> bool:
        """Whether all files of a tokenizer are there."""
        zero_shot = self.architecture.zero_shot
        return zero_shot is not None and any(needed <= self.files for needed in zero_shot.tokenizers)

    def processor_config(self) -> dict[str, Any] | None:
        """The settings of its image processor; None without one.

        Raises:
            CheckpointError: they are no JSON object, too large, or a link to a file elsewhere.
        """
        for name in PROCESSOR_FILES:
            if name not in self.files:
                continue
            path = self.fetch(name)
            if self.ref.is_local and leads_elsewhere(path):
                raise CheckpointError(
                    f"{self}: {name} is a link out of the folder, to {path.resolve()}: put the file there"
                )
            found = read_json(path, str(self), LARGEST_PROCESSOR)
            found = found.get("image_processor", {}) if name != PROCESSOR_FILES[0] else found
            if isinstance(found, dict) and found:
                return found
        return None

    @property
    def positions(self) -> int:
        """Length of the sequence of hidden states, for pictures as its image processor makes them."""
        config = dict(self.vision_config)
        if self.architecture.stretches:
            settings = self.processor_config() or {}
            size = settings.get("crop_size") or settings.get("size")
            side = size.get("height") if isinstance(size, dict) else size
            config["image_size"] = side if isinstance(side, int) else config["image_size"]
        return self.architecture.positions(config)

    def folder(self) -> Path:
        """A folder with its config and weights, fetched."""
        paths = [self.fetch(name) for name in self.weight_files]
        return paths[0].parent if self.is_adapter else self.fetch(CONFIG).parent

    def folder_with_tokenizer(self) -> Path:
        """A folder with its config, weights, tokenizer and image processor, fetched."""
        zero_shot = self.architecture.zero_shot
        for name in {*PROCESSOR_FILES, *(zero_shot.files if zero_shot else ())} & self.files:
            self.fetch(name)
        return self.folder()

    def folder_with_processor(self) -> Path:
        """A folder with its config and image processor, fetched, and no weights."""
        for name in {*PROCESSOR_FILES} & self.files:
            self.fetch(name)
        return self.fetch(CONFIG).parent

    def open(self, shapes: Mapping[str, Shape]) -> Checkpoint:
        """The weights of a full checkpoint, fetched, with names, shapes and types compared with those of its base.

        Args:
            shapes: what the base's config promises, canonical name -> shape.

        Raises:
            MismatchError: something is missing, extra or shaped differently.
            CheckpointError: it is quantised, truncated or corrupt.
        """
        paths = [self.fetch(name) for name in self.weight_files]
        checkpoint = Checkpoint(self.label, paths, self.architecture.canonical)
        strange = {dtype for name, dtype in checkpoint.dtypes.items() if name in shapes} - set(FORMATS.values())
        if strange:  # looked at first: quantised weights have other shapes, and tensors beside them
            raise CheckpointError(
                f"{self.label}: its weights are stored as {', '.join(sorted(strange))}, quantised or no real numbers; "
                "only float32, float16 and bfloat16 can be merged (dequantise it first)"
            )
        check_shapes(shapes, checkpoint, "the checkpoint")
        return checkpoint


def check_not_quantised(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model that says in its config that its weights are quantised.

    Raises:
        CheckpointError: naming the way in which they are.
    """
    if how := config.get("quantization_config"):
        method = str(how.get("quant_method") or "")[:40] if isinstance(how, dict) else ""
        raise CheckpointError(
            f"{where}: its weights are quantised{f' ({method})' if method else ''}; merge "
            "the checkpoint from before, or dequantise it (model.dequantize(), model.save_pretrained(folder))"
        )
