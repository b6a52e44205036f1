"""The command as a whole."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest

from helpers.command import Run
from hf_epimer.methods import METHODS


def test_the_traceback_is_there_for_those_who_ask(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_epimer.cli.main import main
    from hf_epimer.errors import NotFoundError

    monkeypatch.setenv("HF_EPIMER_DEBUG", "1")
    with pytest.raises(NotFoundError):
        main(["merge", str(tiny_zoo / "nowhere")])


def test_what_libraries_warn_of_is_one_line_like_our_own(
    run: Run, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from hf_epimer.cli import main

    def with_a_warning(words: list[str]) -> None:
        warnings.warn("a card\nwithout metadata https://hub/x?key=secret", UserWarning, stacklevel=1)

    monkeypatch.setattr(main, "_dispatch", with_a_warning)
    assert run("merge") == (0, "", "warning: a card without metadata https://hub/x\n")
    assert not recwarn.list


def test_what_was_said_is_not_said_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_epimer.cli import main

    def with_warnings(words: list[str]) -> None:
        for what in ("one", "two", "one"):
            logging.getLogger("hf_epimer.models").warning("%s", what)
            logging.getLogger("huggingface_hub.utils._http").warning("trying again")  # as often as it does

    monkeypatch.setattr(main, "_dispatch", with_warnings)
    said = "warning: one\nwarning: trying again\nwarning: two\nwarning: trying again\nwarning: trying again\n"
    assert run("merge") == run("merge") == (0, "", said)


def test_lists(run: Run) -> None:
    code, output, _ = run("methods", "--json")
    assert code == 0
    assert list(json.loads(output)) == list(METHODS)
    code, output, _ = run("tasks", "--json")
    assert json.loads(output)["dtd"]["dataset"] == "tanganke/dtd"
    assert run("methods")[0] == run("tasks")[0] == 0
