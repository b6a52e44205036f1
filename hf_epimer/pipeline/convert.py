"""`hf-epimer convert`: an OpenCLIP checkpoint in safetensors as a folder that transformers loads as a CLIPModel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from hf_epimer.checkpoints.folders import atomic_folder, check_target
from hf_epimer.checkpoints.reader import Checkpoint, read_json
from hf_epimer.checkpoints.writer import write_json, write_tensors
from hf_epimer.errors import CheckpointError
from hf_epimer.hub.refs import ModelRef
from hf_epimer.merging.finite import check_weights
from hf_epimer.models.clip import CLIP
from hf_epimer.models.open_clip import converted, converted_config, converted_processor, converted_shapes
from hf_epimer.models.source import CONFIG, resolve_model
from hf_epimer.pipeline.any_architecture import copy_file

OPEN_CLIP_CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""The names under which the Hub has such weights; pickled ones are never opened."""

RECORD = "conversion.json"


def convert(ref: ModelRef, out: Path) -> Path:
    """Write config.json, weights, image processor and, where they are there, the tokenizer's files.

    Args:
        ref: a folder or repo with open_clip_config.json and the weights.
        out: a folder that is not there, or empty.

    Raises:
        CheckpointError: the files are not there, damaged, or of a model that is no CLIPModel.
        OutputError: `out` cannot be written.
    """
    check_target(out, overwrite=False, inputs=[Path(ref.location)] if ref.is_local else [])
    source = resolve_model(ref)
    weights = next((name for name in WEIGHTS if name in source.files), None)
    for name, needed in ((OPEN_CLIP_CONFIG, OPEN_CLIP_CONFIG), (weights, " or ".join(WEIGHTS))):
        if name not in source.files:
            raise CheckpointError(f"{source}: there is no {needed}")
    described = read_json(source.fetch(OPEN_CLIP_CONFIG), str(source))
    config = converted_config(described, str(source))
    stored = Checkpoint(str(source), [source.fetch(str(weights))])
    shapes = {
        new: shape for name in stored.shapes for new, shape in converted_shapes(name, stored.shapes[name]).items()
    }
    dtype = stored.tensor(next(name for name in stored.shapes if converted_shapes(name, stored.shapes[name]))).dtype
    zero_shot = CLIP.zero_shot
    assert zero_shot

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in stored.shapes:
            for new, values in converted(name, stored.tensor(name)).items():
                check_weights(values, str(source), name)
                yield new, values.to(dtype)

    with atomic_folder(out, RECORD) as folder:
        write_tensors(folder, shapes, dtype, tensors())
        write_json(folder / CONFIG, config | {"dtype": str(dtype).removeprefix("torch.")})
        write_json(folder / "preprocessor_config.json", converted_processor(described))
        for name in sorted(zero_shot.files & source.files):
            copy_file(source, name, folder)
        write_json(
            folder / RECORD, {"format": "hf-epimer.conversion/1", "source": source.title, "commit": source.ref.revision}
        )
    return out
