"""`hf-epimer convert`: an OpenCLIP checkpoint as a CLIPModel of transformers."""

from __future__ import annotations

import argparse
import json

from hf_epimer.cli.arguments import add_output_arguments, path
from hf_epimer.cli.terminal import Command
from hf_epimer.hub.refs import ModelRef


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "with open_clip_config.json and safetensors: a folder or org/name[@revision]"
    parser.add_argument("model", metavar="REF", help=what)
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder to write")
    add_output_arguments(parser)


def _run(namespace: argparse.Namespace) -> None:
    model = ModelRef.parse(namespace.model)
    from hf_epimer.pipeline.convert import convert

    out = convert(model, namespace.out)
    print(json.dumps({"out": str(out)}) if namespace.json else f"folder  {out}")


CONVERT = Command("an OpenCLIP checkpoint as a CLIPModel of transformers", _add_arguments, _run)
