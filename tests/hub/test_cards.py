"""Model cards as strangers write them, and the names in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from helpers.command import Run
from helpers.hub_cases import fails, recipe
from helpers.hub_server import StandInHub
from hf_epimer.evaluation.results import Results, Split, TaskResult
from hf_epimer.hub.card import card_metadata, names_in
from hf_epimer.hub.refs import same_repo
from hf_epimer.outside import Unreadable
from hf_epimer.pipeline.card import with_results

MERGE = ("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out", "o")


def test_only_the_block_at_the_top_is_metadata() -> None:
    assert card_metadata("---\nlicense: mit\n---\n# x\n---\nlicense: other\n---\n") == {"license": "mit"}
    assert card_metadata("\n---\r\nlicense: mit\r\n---\r\n") == {"license": "mit"}
    assert card_metadata("# x\n---\nlicense: mit\n---\n") == {}
    assert card_metadata("---\n- a\n---\n") == {}
    assert card_metadata("") == {}


def test_the_license_of_a_merge_is_that_of_all_it_is_made_of(hub: StandInHub, run: Run) -> None:
    def merged_from(*cards: str) -> tuple[str, str]:
        for name, card in zip(("base", "vit-b32-dtd", "vit-b32-svhn"), cards, strict=True):
            hub.commit(f"org/{name}", {"README.md": f"---\nbase_model: org/base\n{card}\n---\n".encode()})
        code, _, complaint = run(*MERGE, "--base", "org/base", "--overwrite")
        assert code == 0, complaint
        return Path("o/README.md").read_text(), complaint

    card, complaint = merged_from("license: MIT", "license: mit", "")
    assert card_metadata(card)["license"] == "mit" and complaint == ""
    assert "License mit (the base, dtd), as their cards say." in card
    named = "license: other\nlicense_name: ours\nlicense_link: LICENSE"
    card, _ = merged_from(named, named, named)
    assert [card_metadata(card)[key] for key in ("license", "license_name", "license_link")] == [
        "other",
        "ours",
        "LICENSE",
    ]
    card, complaint = merged_from("license: mit", "license: cc-by-nc-4.0", "license: [bad name, 7]")
    assert "license" not in card_metadata(card)
    assert "License mit (the base), cc-by-nc-4.0 (dtd), as their cards say." in card
    assert "different licenses (mit: the base; cc-by-nc-4.0: dtd): look whether these may be combined" in complaint
    assert "license" not in card_metadata(merged_from("", "", "")[0])


@pytest.mark.parametrize("block", ["a: [", "a: &x [1]\nb: [*x, *x]", "a: " + "[" * 5000, "a: " + "b" * 300_000])
def test_metadata_that_cannot_be_read(block: str) -> None:
    with pytest.raises(Unreadable):
        card_metadata(f"---\n{block}\n---\n")


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("org/a", ["org/a"]),
        ([" org/a ", "b"], ["org/a", "b"]),
        (["org/a", 3, None, {"name": "c"}, ["d"], ""], ["org/a"]),
        ({"name": "org/a"}, []),
        (7, []),
        (None, []),
    ],
)
def test_the_names_in_a_field(value: Any, names: list[str]) -> None:
    assert names_in(value) == names


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Org/Base", "org/base", True),
        ("mnist", "ylecun/mnist", True),
        ("ufldl-stanford/svhn", "SVHN", True),
        ("org/mnist", "ylecun/mnist", False),
        ("mnist", "ylecun/fashion_mnist", False),
    ],
)
def test_ids_that_mean_one_repo(one: str, other: str, same: bool) -> None:
    assert same_repo(one, other) == same


@pytest.mark.parametrize("datasets", ["[Tanganke/DTD]", "tanganke/dtd", "[{name: x}, 3, tanganke/dtd]", "dtd"])
def test_the_data_sets_of_a_card_tell_the_task(datasets: str, hub: StandInHub, run: Run) -> None:
    card = f"---\nbase_model: org/base\ndatasets: {datasets}\n---\n"
    hub.add_repo("org/x", {**_files(hub), "README.md": card.encode()})
    code, _, complaint = run("merge", "org/x", "--method", "mean", "--out", "o")
    assert (code, complaint) == (0, "")
    assert str(recipe("o")["models"]).startswith("['dtd=org/x@")


def test_former_ids_of_data_sets_tell_the_task(hub: StandInHub, run: Run) -> None:
    for name in ("mnist", "svhn"):
        card = f"---\nbase_model: org/base\ndatasets:\n- {name}\n---\n"
        hub.add_repo(f"org/x-{len(name)}", {**_files(hub), "README.md": card.encode()})
    assert run("merge", "org/x-5", "org/x-4", "--method", "mean", "--out", "o")[0] == 0
    assert re.findall(r"'(\w+)=org", str(recipe("o")["models"])) == ["mnist", "svhn"]


def test_bases_in_cards_agree_whatever_their_case(hub: StandInHub, run: Run) -> None:
    hub.commit("org/vit-b32-svhn", {"README.md": b"---\nbase_model: ORG/Base\n---\n"})
    code, _, complaint = run(*MERGE)
    assert (code, complaint) == (0, "")
    assert str(recipe("o")["base"]).startswith("org/base@")


@pytest.mark.parametrize("value", ["{name: org/base}", "[3]", "1.5", "[[org/base]]", "[{a: 1}]"])
def test_a_base_that_is_no_string_is_an_error_of_one_line(value: str, hub: StandInHub, run: Run) -> None:
    hub.commit("org/vit-b32-svhn", {"README.md": f"---\nbase_model: {value}\n---\n".encode()})
    fails(run(*MERGE), "org/vit-b32-svhn.*its card names base_model .*--base")
    assert run(*MERGE, "--base", "org/base")[0] == 0


def test_a_base_that_is_not_there_is_said_to_be_the_cards(hub: StandInHub, run: Run) -> None:
    for name in ("dtd", "svhn"):
        hub.commit(f"org/vit-b32-{name}", {"README.md": b"---\nbase_model: org/gone\n---\n"})
    said = "org/gone: there is no such repo.*; it is what the checkpoints name as their base: name another with --base"
    fails(run("merge", "org/vit-b32-dtd", "org/vit-b32-svhn", "--method", "mean", "--out", "o"), said)


def test_a_card_that_is_no_text_is_a_warning(hub: StandInHub, run: Run) -> None:
    hub.commit("org/vit-b32-svhn", {"README.md": b"---\nbase_model: \xff\xfe\n---\n"})
    code, _, complaint = run(*MERGE)
    assert code == 0
    assert "org/vit-b32-svhn" in complaint
    assert "no readable metadata" in complaint


def test_two_tasks_of_one_data_set_stay_two_entries(tmp_path: Path) -> None:
    row = TaskResult(5, 10)
    measured_on = {
        "fine": Split("org/data", None, "test"),
        "coarse": Split("org/data", None, "test"),
        "other-config": Split("org/data", "small", "test"),
        "other-split": Split("org/data", None, "validation"),
    }
    card = with_results("# x\n", Results("m", "b", dict.fromkeys(measured_on, row), measured_on), "m")
    again = with_results(card, Results("m", "b", {"fine": TaskResult(9, 10)}, {"fine": measured_on["fine"]}), "m")
    for text, fine in ((card, 0.5), (again, 0.9)):
        found = ModelCard(text).data.eval_results
        assert found is not None
        listed = {r.dataset_name: (r.dataset_config, r.dataset_split, r.metric_value) for r in found}
        assert listed == {
            "fine": (None, "test", fine),
            "coarse": (None, "test", 0.5),
            "other-config": ("small", "test", 0.5),
            "other-split": (None, "validation", 0.5),
        }


def _files(hub: StandInHub) -> dict[str, bytes]:
    names = ("config.json", "model.safetensors", "preprocessor_config.json")
    return {name: hub.read("org/vit-b32-dtd", name) for name in names}
