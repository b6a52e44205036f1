"""`hf-epimer demo`: a zoo drawn and trained on the spot, merged in several ways; or the page that does it."""

from __future__ import annotations

import argparse

from hf_epimer.cli.arguments import add_output_arguments, path
from hf_epimer.cli.terminal import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=path, metavar="DIR", default="demo-merges", help="where the merged models go")
    parser.add_argument("--web", action="store_true", help="open the page instead, where it can be tried out")
    add_output_arguments(parser)


def _run(namespace: argparse.Namespace) -> None:
    if namespace.web:
        from hf_epimer.demo.web import serve

        serve()
        return
    from hf_epimer.demo.run import run_demo

    run_demo(namespace.out, quiet=namespace.quiet, as_json=namespace.json)


DEMO = Command("make a small zoo and merge it, offline", _add_arguments, _run)
