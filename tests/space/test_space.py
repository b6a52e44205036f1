"""The page, driven through its API: a page at home with the demo zoo, and one as on a Space, before a stand-in Hub."""

from __future__ import annotations

import json
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel

import hf_epimer
from helpers.checkpoints import write_checkpoint
from helpers.hub_server import StandInHub
from helpers.space_app import AS_ON_A_SPACE, SpaceApp, signed_in
from hf_epimer import ZOO_TASKS, predict

pytest.importorskip("gradio")
import jobs
import selection
import work
from gradio_client import Client, handle_file

pytestmark = pytest.mark.slow
OWNER, VISITOR = "hf_owner_secret_token", "hf_visitor_secret_token"


@pytest.fixture(scope="module")
def home(page_at_home: SpaceApp, space: SpaceApp) -> SpaceApp:
    """The page at home; the other one starts beside it."""
    jobs.warm_up()
    return page_at_home


@pytest.fixture
def client(home: SpaceApp) -> Client:
    return Client(home.url, verbose=False)


def merge(client: Client, **choices: Any) -> tuple[str, str, str, str, dict[str, Any]]:
    """(bar, result, archive, card, numbers) of a merge of the zoo with a few images."""
    return client.predict(**{"images": 12, **choices}, api_name="/merge")


# --- at home, on the zoo -----------------------------------------------------------------------------------------


def test_a_merge_of_the_zoo_with_table_bars_card_and_download(home: SpaceApp, client: Client, tmp_path: Path) -> None:
    bar, result, archive, card, numbers = merge(client, rank=8)
    assert bar == ""
    assert [row["name"] for row in numbers["rows"]] == ["base", "fine-tuned", "mean", "tsv-m", "epimer"]
    assert all(set(row["tasks"]) == set(ZOO_TASKS) for row in numbers["rows"])
    assert numbers["options"]["rank"] == 8
    assert "on the first 12 test images" in result
    assert result.count("ep-bar ") == 4 * 5  # four models, four tasks and their average
    for text in ("base_model_relation: merge", "| shapes |", "on its first 12 images only", "## Citation"):
        assert text in card
    assert "model-index" not in card  # accuracies on a few images are not what the Hub should list
    zipfile.ZipFile(archive).extractall(tmp_path)
    _, report = CLIPVisionModel.from_pretrained(tmp_path / "merged-epimer", output_loading_info=True)
    assert not report["missing_keys"]
    assert home.leftovers()[0].startswith("merge-")


def test_the_bar_names_the_stages_of_a_merge_and_never_goes_back() -> None:
    seen: list[tuple[float, str]] = []
    told = work._on_scale(lambda share, text: seen.append((share, text)), 0.1, 0.9)
    stages = ("fetching", "estimating curvature", "surveying", "merging", "calibrating", "evaluating")
    for stage in stages:
        told(stage, 0, 2)
        told(stage, 2, 2)
    shares = [share for share, _ in seen]
    assert len(seen) == 2 * len(stages) and shares == sorted(shares) and shares[0] >= 0.1 and shares[-1] <= 0.9
    assert "Calibrating layers: 2 of 2" in seen[9][1]


def test_a_calibrated_merge_stands_beside_the_plain_one(client: Client) -> None:
    _, result, _, card, numbers = merge(client, method="tsv-m", calibrate=True, images=17)  # measured here first
    rows = {row["name"]: row["tasks"] for row in numbers["rows"]}
    assert list(rows) == ["base", "fine-tuned", "mean", "tsv-m", "tsv-m, calibrated"]
    *_, plain = merge(client, method="tsv-m", images=17)
    assert {row["name"]: row["tasks"] for row in plain["rows"]}["tsv-m"] == rows["tsv-m"]
    assert rows["tsv-m"] != rows["tsv-m, calibrated"]
    assert "TSV-M, calibrated" in result and "--calibrate" in result and "Then calibrated" in card


def test_the_page_shows_the_accuracies_that_the_package_measures(client: Client, space_home: Path) -> None:
    *_, numbers = merge(client, method="mean")
    zoo = space_home / "hf-epimer" / "demo-zoo-1"
    rows = {row["name"]: row["tasks"] for row in numbers["rows"]}
    assert list(rows) == ["base", "fine-tuned", "tsv-m", "mean"]  # the chosen method is not its own baseline
    for row, model in (("base", zoo / "base"), ("fine-tuned", zoo / "signs")):
        measured = hf_epimer.evaluate(str(model), [str(zoo / "tasks" / "signs.yaml")], str(zoo / "base"), limit=12)
        assert rows[row]["signs"] == measured.tasks["signs"].accuracy


def test_a_picture_is_seen_by_base_models_and_merge(client: Client, space_home: Path, tmp_path: Path) -> None:
    zoo = space_home / "hf-epimer" / "demo-zoo-1"
    (tmp_path / "digit.png").write_bytes(selection.Zoo(zoo).pictures("digits")[0][0])
    ask = {"image": handle_file(tmp_path / "digit.png"), "api_name": "/classify"}
    html, found = client.predict(task="digits", **ask)
    shown = {row["name"]: row["classes"] for row in found["rows"]}
    assert list(shown) == ["base", *ZOO_TASKS, "merged"]
    task, picture = str(zoo / "tasks" / "digits.yaml"), Image.open(tmp_path / "digit.png")
    expected = predict(str(zoo / "digits"), [picture], task, str(zoo / "base"))
    assert shown["digits"] == pytest.approx(expected[0], abs=1e-4)
    assert next(iter(shown["digits"])) in html
    _, own = client.predict(task="my own classes", classes="one, two, three", **ask)
    assert set(own["rows"][0]["classes"]) == {"one", "two", "three"}
    assert "two class names" in client.predict(task="my own classes", classes="one", **ask)[1]["error"]


def test_the_picture_is_tried_on_the_merge_of_this_visitor(client: Client, tmp_path: Path) -> None:
    Image.effect_noise((32, 32), 90).save(tmp_path / "noise.png")
    ask = {"image": handle_file(tmp_path / "noise.png"), "task": "shapes", "api_name": "/classify"}
    _, before = client.predict(**ask)
    merge(client, method="task-arithmetic", alpha=0, images=0)  # alpha 0: the merge is the base
    _, after = client.predict(**ask)
    assert after["rows"][-1]["classes"] == pytest.approx(after["rows"][0]["classes"], abs=1e-4)
    assert before["rows"][-1]["classes"] != pytest.approx(after["rows"][-1]["classes"], abs=1e-4)


def test_diagnosis_and_sweep(home: SpaceApp, client: Client) -> None:
    _, html, report = client.predict(api_name="/diagnose")
    assert report["labels"] == list(ZOO_TASKS)
    for text in ("Verdict", "Cosines", "What a rank keeps", "Where curvature acts"):
        assert text in html
    _, html, _, _, report = client.predict(methods=["epimer", "ties"], ranks=[4, 8], images=20, api_name="/sweep")
    assert len(report["results"]) == 6 * (2 + 1)
    assert "Best on average" in html
    started = time.monotonic()
    tables = [client.predict(alpha=alpha, rank=8, api_name="/sweep_at") for alpha in (0.5, 1.5)]
    assert time.monotonic() - started < 2
    for alpha, table in zip((0.5, 1.5), tables):
        rows = [row for row in report["results"] if row["alpha"] == alpha and row["rank"] in (None, 8)]
        assert len(rows) == 2
        assert all(f"{100 * row['average']:.1f}" in table for row in rows)
        assert f"alpha {alpha:g}, rank 8" in table
    assert not any(name.startswith(("diagnose-", "sweep-")) for name in home.leftovers())


def test_cancel_ends_a_merge_and_leaves_nothing(home: SpaceApp, client: Client) -> None:
    before = home.leftovers()
    job = client.submit(images=350, method="ties", density=0.31, api_name="/merge")
    while not any("%" in str(output) for output in job.outputs()):
        time.sleep(0.02)
    client.predict(api_name="/cancel_merge")
    *_, numbers = job.result(timeout=20)
    assert numbers == {"error": "Cancelled. Nothing was left behind."}
    assert home.leftovers() == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"zoo_models": ["shapes"]}, "at least two models"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"rank": 2.5}, "whole number"),
        ({"method": "tsv-m", "rank": None, "alpha": None}, "Alpha is empty"),
        ({"shrinkage": "half"}, "'half' is not a number"),
        ({"source": "Hugging Face Hub", "typed": "org/a"}, "at least two checkpoints"),
        ({"source": "Hugging Face Hub", "typed": "org/a\nno folder"}, "neither a folder nor a Hub id"),
        ({"source": "Hugging Face Hub", "typed": "org/a\norg/b"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_is_wrong_is_a_sentence_in_the_page(client: Client, choice: dict[str, Any], message: str) -> None:
    bar, *_, numbers = merge(client, **choice)
    assert message in numbers["error"]
    assert "role='alert'" in bar
    assert "Traceback" not in bar


def test_a_folder_may_be_named_at_home(client: Client, space_home: Path) -> None:
    zoo = space_home / "hf-epimer" / "demo-zoo-1"
    typed = f"{zoo / 'shapes'}\nmine={zoo / 'signs'}"
    table = client.predict(source="Hugging Face Hub", typed=typed, base=str(zoo / "base"), api_name="/look_up")
    assert "mine" in table and "Base: base" in table


# --- as on a Space ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(clip_base: Path, clip_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    """Public, private, pickled, unlike and large checkpoints."""
    folder = tmp_path_factory.mktemp("repos")
    with StandInHub() as hub:
        hub.add_user(OWNER, "owner", orgs=["org"])
        hub.add_user(VISITOR, "ann")
        hub.add_repo("org/base", clip_base)
        card = b"---\nbase_model: org/base\n---\n"
        files = {path.name: path for path in (clip_zoo / "a").iterdir()}
        for name in "ab":
            own = {path.name: path for path in (clip_zoo / name).iterdir()}
            hub.add_repo(f"org/{name}", {**own, "README.md": card})
        hub.add_repo("org/private", {**files, "README.md": card}, private=True)
        hub.add_repo("org/pickled", {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
        unlike = write_checkpoint(folder / "unlike", {"x": torch.zeros(1)}, card="---\nbase_model: org/base\n---\n")
        hub.add_repo("org/unlike", unlike)
        hub.add_repo("org/large", {**files, "README.md": card, "model.safetensors": bytes(3_000_000)})
        yield hub


@pytest.fixture(scope="module")
def space(hub: StandInHub, space_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceApp]:
    """The page with the environment of a Space whose owner has set a token and a limit of 2 MB."""
    environment = {**AS_ON_A_SPACE, "OPENID_PROVIDER_URL": hub.url, "HF_TOKEN": OWNER, "EPIMER_GIGABYTES": "0.002"}
    home = tmp_path_factory.mktemp("space-home")
    (home / "hf-epimer").symlink_to(space_home / "hf-epimer")
    with SpaceApp(home, tmp_path_factory.mktemp("space"), hub.url, **environment) as app:
        yield app


def test_the_example_of_the_readme(space: SpaceApp, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(selection.__file__).parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    for named, served in (("OWNER/epimer", space.url), ("org/vit-b32-dtd", "org/a"), ("org/vit-b32-svhn", "org/b")):
        assert named in example
        example = example.replace(named, served)
    names: dict[str, Any] = {}
    exec(example.replace("Client(", "Client(verbose=False, src="), names)
    assert [model["name"] for model in names["numbers"]["models"]] == ["org/a", "org/b"]
    assert "model.safetensors" in " ".join(zipfile.ZipFile(names["archive"]).namelist())
    assert names["card"].startswith("# merged-tsv-m") and names["archive"] in capsys.readouterr().out


FROM_HUB = {"source": "Hugging Face Hub", "method": "mean", "images": 0}


def test_looking_up_and_merging_from_the_hub(space: SpaceApp, hub: StandInHub) -> None:
    client = Client(space.url, verbose=False)
    table = client.predict("Hugging Face Hub", [], "one=org/a\norg/b@main", "", api_name="/look_up")
    commit = hub.commits("org/a")[0].oid
    assert "org/base" in table and commit[:12] in table and ">one<" in table
    _, result, archive, card, numbers = merge(client, typed="one=org/a\norg/b@main", **FROM_HUB)
    assert [model["commit"] for model in numbers["models"]] == [commit, hub.commits("org/b")[0].oid]
    assert "hf-epimer merge" in result
    assert "base_model:\n- org/a\n- org/b" in card
    assert "model.safetensors" in " ".join(zipfile.ZipFile(archive).namelist())


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("nope\norg/a", "not a Hub id"),
        ("org/missing\norg/a", "no such repo"),
        ("org/pickled\norg/a", "pickle"),
        ("org/unlike\norg/a", "another architecture"),
        ("org/private\norg/a", "private"),
        ("org/large\norg/a", "at most 0.002 GB are allowed here"),
        ("{zoo}/shapes\n{zoo}/signs", "not a Hub id"),
        ("tmp/x\norg/a", "no such repo"),
        ("\n".join(f"org/m{number}" for number in range(9)), "most 8 checkpoints"),
    ],
)
def test_what_is_not_possible_on_a_space_is_a_sentence(
    space: SpaceApp, hub: StandInHub, space_home: Path, typed: str, message: str
) -> None:
    (space.temp / "tmp" / "x").mkdir(parents=True, exist_ok=True)  # a folder of the machine is not what org/name means
    hub.clear_log()
    client = Client(space.url, verbose=False)
    typed = typed.format(zoo=space_home / "hf-epimer" / "demo-zoo-1")
    bar, *_, numbers = merge(client, typed=typed, **FROM_HUB)
    assert message in numbers["error"]
    assert numbers["error"].endswith(".")
    assert "role='alert'" in bar
    assert not any(request.has_token for request in hub.requests)  # the owner's token opens nothing to visitors
    assert not any("large/resolve" in r.path and "safetensors" in r.path for r in hub.requests)  # size before download


def test_a_push_needs_a_sign_in_and_its_token_stays_nowhere(space: SpaceApp, hub: StandInHub) -> None:
    choice = {**FROM_HUB, "typed": "org/a\norg/b"}
    stranger = Client(space.url, verbose=False)
    merge(stranger, **choice)
    assert "Sign in with Hugging Face first" in stranger.predict(repo="ann/merged", api_name="/push")
    assert not hub.exists("ann/merged")
    visitor = Client(space.url, verbose=False, headers=signed_in("ann", VISITOR))
    outputs = [*merge(visitor, **choice)]
    outputs.append(visitor.predict(repo="owner/merged", api_name="/push"))
    assert "may not create a repo under owner" in outputs[-1]
    outputs.append(visitor.predict(repo="ann/merged", private=True, api_name="/push"))
    assert "Pushed to ann/merged" in outputs[-1]
    assert len(hub.commits("ann/merged")) == 2  # created, and one commit
    assert hub.commits("ann/merged")[0].author == "ann"
    pushed = {name: hub.read("ann/merged", name) for name in hub.commits("ann/merged")[0].files}
    assert {"model.safetensors", "README.md", "merge_config.json"} <= set(pushed)
    merge(visitor, **choice)  # what comes after a push is anonymous again
    written = [space.log.encode(), *(file.read_bytes() for file in space.files()), *pushed.values()]
    for token in (VISITOR, OWNER):
        assert not any(token.encode() in content for content in written)
        assert token not in json.dumps(outputs)
    assert "spaces_app" not in space.log  # no traceback of ours
