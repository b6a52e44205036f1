"""`hf-epimer push`: a merged folder to the Hub, also after a push that failed."""

from __future__ import annotations

import argparse
import json

from hf_epimer.cli.arguments import add_output_arguments, path
from hf_epimer.cli.terminal import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="DIR", help="a merged folder")
    parser.add_argument("repo", metavar="ORG/NAME", help="where to push it")
    parser.add_argument("--private", action="store_true", help="create the repo private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    add_output_arguments(parser)


def _run(namespace: argparse.Namespace) -> None:
    from hf_epimer.pipeline.folder import push_merged

    url = push_merged(namespace.folder, namespace.repo, private=namespace.private, create_pr=namespace.create_pr)
    print(json.dumps({"url": url}) if namespace.json else f"pushed  {url}")


PUSH = Command("push a merged folder to the Hub", _add_arguments, _run)
