"""The page's parts without a browser or a server: work in its own process, inputs, limits, folders."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

import hf_epimer
from hf_epimer import METHODS, ZOO_TASKS, EpimerError, ModelRef
from hf_epimer.demo.captions import FAMILIES
from hf_epimer.demo.zoo import ZooSize, make_zoo

pytest.importorskip("gradio")
import jobs
import options
import selection
import sweep_tab
import workspace
from settings import Settings

SPACE = Path(selection.__file__).parent
ZERO_GPU_PYTHONS = ("3.10.13", "3.12.12")
ZERO_GPU_TORCHES = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")
"""What a Space on ZeroGPU can have (https://huggingface.co/docs/hub/spaces-zerogpu)."""


@pytest.mark.slow
def test_work_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    ticket = jobs.Ticket()
    for event in jobs.run("build_zoo", str(tmp_path / "zoo"), ticket=ticket):
        if isinstance(event, jobs.Progress) and event.share > 0:
            assert list(tmp_path.iterdir())  # the unfinished zoo
            ticket.cancelled.set()
    assert event == jobs.Failed("Cancelled. Nothing was left behind.")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_work_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    started = time.monotonic()
    *_, last = jobs.run("build_zoo", str(tmp_path / "zoo"), seconds=1)
    assert last == jobs.Failed("This took longer than the 1 seconds allowed here, and was stopped.")
    assert time.monotonic() - started < 10
    assert not list(tmp_path.iterdir())


def test_a_bug_is_a_sentence_too() -> None:
    *_, last = jobs.run("build_zoo", None)  # no folder
    assert isinstance(last, jobs.Failed)
    assert "nobody foresaw" in last.message and "Traceback" not in last.message


def test_every_method_has_its_options_as_inputs() -> None:
    known = options.all_options()
    for name, method in METHODS.items():
        own = method.options
        chosen = options.chosen_options(name, {key: option.default for key, option in known.items()} | {
            key: option.default for key, option in own.items()
        })  # fmt: skip
        assert method.config(**chosen) == method.config()
        assert all(option.help for option in own.values())
        assert len(options.shown_for(name)) == len(known) + 1


def test_zoo_tasks_are_those_that_are_drawn() -> None:
    assert tuple(FAMILIES) == ZOO_TASKS


def test_references_from_strangers_never_look_at_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelRef.parse("org/name").is_local
    assert not ModelRef.parse("org/name", local=False).is_local
    assert ModelRef.parse("a=org/name@v1", local=False) == ModelRef("org/name", "v1", "a")
    for text in ("./org/name", "/etc", "~", "org/name/../..", "../x", f"{tmp_path}/org"):
        with pytest.raises(EpimerError, match="not a Hub id"):
            ModelRef.parse(text, local=False)


def test_a_space_is_limited_and_a_home_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert Settings.from_environment() == Settings(False, None, None, None)
    monkeypatch.setenv("SPACE_ID", "org/space")
    assert Settings.from_environment() == Settings(True, 900, 8, 8)
    monkeypatch.setenv("EPIMER_SECONDS", "60")
    assert Settings.from_environment().seconds == 60


def test_the_slider_shows_the_row_of_its_alpha_and_rank() -> None:
    def row(method: str, rank: int | None, alpha: float | None, hits: float) -> dict[str, Any]:
        task = {"one": {"accuracy": hits}}
        return {"method": method, "rank": rank, "alpha": alpha, "tasks": task, "average": hits}

    rows = [row("epimer", rank, alpha, (rank + alpha) / 100) for rank in (8, 16) for alpha in (0.5, 1.0)]
    found = {"alphas": [0.5, 1.0], "results": [*rows, row("mean", None, None, 0.77)]}
    for rank, alpha in ((8, 0.5), (16, 1.0)):
        table = sweep_tab.table_at(found, alpha, rank)
        assert all((f">{own['average'] * 100:.1f}<" in table) == (own == row("epimer", rank, alpha, own["average"]))
                   for own in rows)  # fmt: skip
        assert "<b>77.0</b>" in table


def test_caches_make_room_and_the_zoo_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    for name in ("hub", "datasets", "hf-epimer"):
        (tmp_path / name / "x").mkdir(parents=True)
    workspace.make_room(1)
    assert (tmp_path / "hub" / "x").is_dir()
    workspace.make_room(1e18)
    assert [path.name for path in tmp_path.iterdir()] == ["hf-epimer"]


def test_folders_of_visitors_come_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(workspace.tempfile, "tempdir", str(tmp_path))
    own = workspace.Workspace()
    first, second = own.fresh("ann", "merge"), own.fresh("ann", "merge")
    own.keep(second)
    assert not first.exists() and second.exists()
    own.discard(second)
    assert not list(own.root.iterdir())
    late = own.fresh("bob", "merge")
    monkeypatch.setattr(workspace, "KEEP_SECONDS", -1)
    own.fresh("ann", "merge")
    assert not late.parent.exists()
    own.leave("ann")
    assert not list(own.root.iterdir())
    own.remove()
    assert not list(tmp_path.iterdir())


def test_the_header_and_requirements_of_the_space() -> None:
    _, header, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    content = yaml.safe_load(header)
    assert content["sdk"] == "gradio" and content["app_file"] == "app.py" and content["hf_oauth"] is True
    assert content["hf_oauth_scopes"] == ["contribute-repos"]  # what it makes itself, and no other repo of the visitor
    assert len(content["short_description"]) <= 60
    assert content["python_version"] in ZERO_GPU_PYTHONS
    pins = dict(line.split("==") for line in (SPACE / "requirements.txt").read_text().splitlines() if "==" in line)
    tested = dict(
        line.split("==") for line in (SPACE.parent / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert content["sdk_version"] == tested["gradio"]
    for name, version in pins.items():
        plain = name.split("[")[0]
        if plain == "torch":
            assert version in ZERO_GPU_TORCHES
        else:
            assert version == (hf_epimer.__version__ if plain == "hf-epimer" else tested[plain]), name


def test_every_endpoint_tells_an_agent_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradio makes tools of them and takes the words from the docstrings."""
    from page import build_page
    from session import Session
    from zoo_maker import ZooMaker

    monkeypatch.setattr(workspace.tempfile, "tempdir", str(tmp_path))
    zoo = selection.Zoo(tmp_path)
    page = build_page(Session(Settings(False, None, None, None), workspace.Workspace(), zoo), ZooMaker(zoo))
    endpoints = {f.api_name: f.fn for f in page.fns.values() if f.api_visibility == "public" and f.api_name}
    assert {"merge", "classify", "diagnose", "sweep", "look_up", "push", "cancel_merge"} <= set(endpoints)
    for name, function in endpoints.items():
        words = inspect.getdoc(function) or ""
        assert function.__name__ == name  # gradio's name of the tool
        assert words.split("\n")[0].endswith((".", "?")), name
        for parameter in set(inspect.signature(function).parameters) - {"request", "merged", "truth", "swept", "token"}:
            assert f"    {parameter}: " in words, (name, parameter)


def test_a_page_uses_public_names_only() -> None:
    for file in SPACE.glob("*.py"):
        for line in file.read_text().splitlines():
            assert not line.strip().startswith(("import hf_epimer", "from hf_epimer.")), f"{file.name}: {line}"


@pytest.mark.slow
def test_the_zoo_is_made_where_it_is_missing_and_is_seen_to_be_made(tmp_path: Path) -> None:
    from zoo_maker import ZooMaker

    maker = ZooMaker(selection.Zoo(tmp_path / "zoo"))
    maker.event = jobs.Progress(0.42, "fine-tuning on signs")
    assert "42%" in maker.banner() and "Fine-tuning on signs" in maker.banner()
    with pytest.raises(EpimerError, match="still being made"):
        selection.selection_of(Settings(False, None, None, None), maker.zoo, selection.ZOO, list(ZOO_TASKS), "", "")
    make_zoo(maker.zoo.folder, size=ZooSize(60, 2, 16, 24, 12, 2, 8, 2))
    assert maker.banner() == ""


def test_without_gradio_the_command_says_how_to_get_it(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_epimer.demo.web.find_spec", lambda name: None)
    assert run("demo", "--web") == (2, "", "error: the page needs gradio: pip install 'hf-epimer[space]'\n")
