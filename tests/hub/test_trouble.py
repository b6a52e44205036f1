"""A Hub in trouble, or no Hub at all: waited out, or one line that says what was asked and what came back."""

from __future__ import annotations

import email.utils
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from helpers.command import Run
from helpers.hub_cases import MISSION, fails
from helpers.hub_server import WRITER, Fault, StandInHub
from hf_epimer.hub import retry

MERGE = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out", "o")
WEIGHTS = r"vit-b32-dtd/resolve/.*/model\.safetensors"


@pytest.mark.parametrize("where", ["/api/models/org/base", "/api/models/org/vit-b32-dtd", "base/resolve/.*config.json"])
def test_one_429_anywhere_ends_no_merge(where: str, hub: StandInHub, run: Run, patient: None) -> None:
    fault = hub.inject(Fault(method="*", path=where, status=429, headers={"Retry-After": "0"}, times=1))
    code, _, complaint = run(*MERGE)
    assert (code, fault.hits) == (0, 1), complaint


def test_retry_after_may_be_a_date(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    date = email.utils.formatdate(time.time() + 40, usegmt=True)
    hub.inject(Fault(method="GET", path="/api/models/org/base", status=429, headers={"Retry-After": date}))
    code, _, complaint = run(*MERGE)
    assert code == 0
    assert any(35 < seconds <= 40 for seconds in waited)
    assert "org/base" in complaint  # somebody who waits that long is told for what
    assert "trying again in" in complaint


def test_a_hub_that_asks_for_a_day_is_not_waited_for(hub: StandInHub, run: Run) -> None:
    hub.inject(Fault(path="/api/models/org/base", status=429, headers={"Retry-After": "86400"}, times=None))
    fails(run(*MERGE), r"org/base: the Hub asks for fewer requests \(429\), for 86400 s; asked for its list of files")


def test_a_client_closed_under_a_download_is_no_end(hub: StandInHub, run: Run) -> None:
    """As huggingface_hub does where another download meets a broken connection."""
    hub.inject(Fault(method="GET", path=WEIGHTS, delay=1.0))
    closing = threading.Timer(0.0, lambda: None)

    def close_when_asked() -> None:
        deadline = time.monotonic() + 30
        while not any(re.search(WEIGHTS, r.path) for r in hub.requests) and time.monotonic() < deadline:
            time.sleep(0.01)
        close_session()

    closing = threading.Thread(target=close_when_asked)
    closing.start()
    code, _, complaint = run(*MERGE)
    closing.join()
    assert code == 0, complaint


@pytest.mark.parametrize("times", [1, None])
def test_a_connection_that_breaks_in_a_parallel_download(
    times: int | None, hub: StandInHub, run: Run, patient: None
) -> None:
    hub.inject(Fault(method="*", path=WEIGHTS, reset=True, times=times))
    result = run(*MERGE)
    if times:
        assert result[0] == 0, result[2]
    else:
        fails(result, "vit-b32-dtd@[0-9a-f]{40}: the connection to the Hub .* broke.*asked for model.safetensors")
        assert not Path("o").exists()


@pytest.mark.parametrize("path", ["/api/models/org/base", "base/resolve/.*/model.safetensors", "base/resolve/.*config"])
@pytest.mark.parametrize("status", [403, 404, 429, 500])
def test_lasting_refusals_are_called_what_they_are(
    status: int, path: str, hub: StandInHub, run: Run, patient: None
) -> None:
    hub.inject(Fault(path=path, status=status, times=None))
    said = {403: "no permission for", 404: "404", 429: "429", 500: "the Hub answered 500 to the request for"}[status]
    result = run(*MERGE)
    fails(result, f"org/base.*{said}")
    assert "cannot be reached" not in result[2]
    assert re.search(r"its list of files|model\.safetensors|config\.json", result[2])


def test_requests_have_a_time_out(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "TIME_OUTS", {"GET": 0.3})
    fault = hub.inject(Fault(path="/api/models/org/base", delay=5, times=None))
    started = time.monotonic()
    fails(run(*MERGE), "org/base: the Hub at http.* does not answer .*asked for its list of files")
    assert time.monotonic() - started < 4
    assert fault.hits == 2


def test_a_push_has_a_time_out(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "OTHER_TIME_OUT", 0.3)
    hub.inject(Fault(method="POST", path="/commit/", delay=3, times=None))
    fails(run(*MISSION), "org/merged: the Hub at http.* does not answer .*asked for the commit")


PAGE = b"<!doctype html><title>Sign in to the network</title>"


class _LoginPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(PAGE)

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_login_page_is_no_hub(hub: StandInHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _LoginPage) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{page.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        said = f"the endpoint {address} did not answer like a Hub.*HF_ENDPOINT"
        fails(run(*MERGE), f"org/vit-b32-dtd: {said}")
        fails(run(*MISSION), f"pushing to org/merged: {said}")
        page.shutdown()


@pytest.mark.parametrize("answer", [b"[]", b"{}", b"null", b'{"id": 3}', b"\xff\xfe", b""])
def test_an_answer_that_is_no_hubs_is_one_line(answer: bytes, hub: StandInHub, run: Run) -> None:
    hub.inject(Fault(path="/api/models/org/base", status=200, body=answer, times=None))
    fails(run(*MERGE), "org/base: the endpoint http.* did not answer like a Hub")


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"null", b'{"name": "ann", "auth": null}'])
def test_who_asks_is_not_told_by_an_answer_that_is_no_hubs(answer: bytes, hub: StandInHub, run: Run) -> None:
    hub.inject(Fault(path="/whoami-v2", status=200, body=answer, times=None))
    result = run(*MERGE, "--push-to", "org/new")
    fails(
        result, "did not answer like a Hub to the request for whose token" if b"ann" not in answer else "may not create"
    )


def test_a_page_instead_of_a_file(hub: StandInHub, run: Run, patient: None) -> None:
    hub.inject(Fault(path=WEIGHTS, status=200, body=PAGE, times=None))
    fails(run(*MERGE), "vit-b32-dtd.*the endpoint .* did not answer like a Hub to the request for model.safetensors")


@pytest.mark.slow
def test_what_huggingface_hub_says_is_labelled(hub: StandInHub, tmp_path: Path) -> None:
    hub.inject(Fault(method="GET", path=WEIGHTS + r"(\?|$)", cut_after=100, times=1))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    done = subprocess.run(
        [sys.executable, "-m", "hf_epimer", *MERGE], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert any("model.safetensors" in line for line in said)
    assert all(line.startswith("warning: ") for line in said), done.stderr
