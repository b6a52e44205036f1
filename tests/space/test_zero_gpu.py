"""The page on a ZeroGPU Space, which a stand-in for `spaces` plays: pickled both ways, no CUDA outside, Cancel."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.hub_server import StandInHub
from helpers.space_app import AS_ON_A_SPACE, SpaceApp

pytest.importorskip("gradio")
import gradio as gr
from gradio_client import Client
from jobs import Done, Failed, Progress

from hf_epimer import ZOO_TASKS

FAKE = Path(__file__).parents[1] / "helpers" / "zero_gpu"


@pytest.fixture(scope="module")
def zero_gpu_space(space_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path]]:
    """A client of such a page, and what the stand-in has noted."""
    folder = tmp_path_factory.mktemp("zero-gpu")
    path = os.pathsep.join([str(FAKE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **AS_ON_A_SPACE,
        "SPACES_ZERO_GPU": "true",
        "PYTHONPATH": path,
        "FAKE_SPACES_LOG": str(folder / "noted"),
        "HF_HUB_OFFLINE": "1",
    }
    with StandInHub() as hub, SpaceApp(space_home, folder, hub.url, OPENID_PROVIDER_URL=hub.url, **environment) as app:
        yield Client(app.url, verbose=False), folder / "noted"
    assert app.process.returncode == 0, app.log  # 86 for CUDA outside of the decorated function


@pytest.mark.slow
def test_heavy_work_goes_through_the_gpu_and_light_work_does_not(zero_gpu_space: tuple[Client, Path]) -> None:
    client, noted = zero_gpu_space
    _, result, _, _, numbers = client.predict(images=12, method="mean", api_name="/merge")
    assert set(numbers["rows"][-1]["tasks"]) == set(ZOO_TASKS), numbers
    assert "on the first 12 test images" in result
    assert "digits" in client.predict("Demo zoo", list(ZOO_TASKS), "", "", api_name="/look_up")
    assert noted.read_text().splitlines() == ["merge_and_measure 20", "merge_and_measure ended"]
    *_, refused = client.predict(images=0, method="tsv-m", rank=0, api_name="/merge")
    assert "--rank must be at least 1" in refused["error"]


@pytest.mark.slow
def test_cancel_closes_what_the_worker_does(zero_gpu_space: tuple[Client, Path]) -> None:
    client, noted = zero_gpu_space
    job = client.submit(images=350, method="ties", density=0.31, api_name="/merge")
    while not any("%" in str(output) for output in job.outputs()):
        time.sleep(0.02)
    client.predict(api_name="/cancel_merge")
    *_, numbers = job.result(timeout=30)
    assert numbers == {"error": "Cancelled. Nothing was left behind."}
    assert noted.read_text().splitlines()[-1] in ("merge_and_measure closed", "merge_and_measure ended")


@pytest.fixture
def zero_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a `spaces` that gives functions back, as away from ZeroGPU."""
    spaces = ModuleType("spaces")
    spaces.GPU = lambda duration: lambda function: function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    monkeypatch.delitem(sys.modules, "zero_gpu", raising=False)
    import zero_gpu

    monkeypatch.delitem(sys.modules, "zero_gpu")
    return zero_gpu


def work_with(monkeypatch: pytest.MonkeyPatch, zero_gpu: ModuleType, function: Any) -> None:
    monkeypatch.setattr(zero_gpu.work, "merge_and_measure", function)


ARGUMENTS = (None, "mean", {}, False, None, "shared", "home")


def test_the_seconds_asked_for_grow_with_the_work_and_have_an_end(zero_gpu: ModuleType) -> None:
    def seconds(size: dict[str, int], calibrate: bool = False, images: int | None = None) -> float:
        return zero_gpu.gpu_seconds("merge_and_measure", (None, "mean", {}, calibrate, images, "", ""), size)

    small, large = {"models": 2, "bytes": 10**9}, {"models": 8, "bytes": 4 * 10**9}
    assert zero_gpu.SHORTEST <= seconds(small) < seconds(large) < seconds(large, calibrate=True)
    assert seconds(small) < seconds(small, images=500)
    assert seconds({"models": 8, "bytes": 10**11}) == zero_gpu.LONGEST
    few, many = ((None, ["epimer"], [8], (1.0,), images, "") for images in (20, 2000))
    assert zero_gpu.gpu_seconds("swept", few, small) < zero_gpu.gpu_seconds("swept", many, small)
    assert zero_gpu.gpu_seconds("classify", (), {"models": 2, "bytes": 0}) == zero_gpu.SHORTEST


def test_events_come_while_it_works_and_closing_unwinds_it(
    zero_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwound = []

    def endless(report: Any, *arguments: Any) -> None:
        try:
            while True:
                report(0.5, "Merging")
                time.sleep(0.01)
        except KeyboardInterrupt:
            unwound.append(True)
            raise

    work_with(monkeypatch, zero_gpu, endless)
    events = zero_gpu.on_gpu("merge_and_measure", ARGUMENTS, {"models": 2, "bytes": 0})
    assert next(events) == Progress(0.5, "Merging")
    events.close()
    assert unwound


def test_more_than_was_asked_for_is_stopped(zero_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_gpu, "gpu_seconds", lambda *arguments: 0.2)

    def slow(report: Any, *arguments: Any) -> None:
        while True:
            report(0.1, "Merging")
            time.sleep(0.02)

    work_with(monkeypatch, zero_gpu, slow)
    *_, last = zero_gpu.on_gpu("merge_and_measure", ARGUMENTS, {"models": 2, "bytes": 0})
    assert last == Failed("This took longer than the 0.2 seconds of GPU time asked for, and was stopped.")


def test_what_the_hub_says_is_a_sentence(zero_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Iterator[Any]:
        raise gr.Error("You have exceeded your GPU quota (<a href='https://x'>60s</a> requested)")
        yield

    monkeypatch.setattr(zero_gpu, "in_worker", refused)
    (last,) = zero_gpu.on_gpu("classify", (), {"models": 2, "bytes": 0})
    assert last == Failed("You have exceeded your GPU quota (60s requested).")


def test_a_result_is_the_last_event(zero_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    work_with(monkeypatch, zero_gpu, lambda report, *arguments: {"arguments": len(arguments)})
    *_, last = zero_gpu.on_gpu("merge_and_measure", ARGUMENTS, {"models": 2, "bytes": 0})
    assert last == Done({"arguments": 7})
