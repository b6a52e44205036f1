"""docs/training.md at its word: models trained by its script, merged by its commands; and its other example."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from helpers.data import write_benchmark
from helpers.docs_hub import BASE, write_base
from helpers.hub_server import WRITER, StandInHub
from hf_epimer import merge_state_dicts
from hf_epimer.methods.statistic import PUBLISHED_FILES
from hf_epimer.tasks.task import benchmark_tasks

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
TASKS = ("dtd", "eurosat", "mnist")

IN_TURN = """
import json, runpy, sys
from hf_epimer.cli.main import main
for words in json.load(sys.stdin):
    program, *sys.argv = words
    if program == "python":
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif code := main(sys.argv):
        sys.exit(f"failed: {words}")
"""
"""In one interpreter, for its imports take longer than the rest."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.slow
def test_models_of_the_script_merge_by_the_plain_command(empty_hub: StandInHub, tmp_path: Path) -> None:
    empty_hub.add_user(WRITER, "me")
    empty_hub.add_repo(BASE, write_base(tmp_path / "base"))
    for rows, name in zip((120, 130, 140), TASKS, strict=True):
        task = benchmark_tasks()[name]
        data = write_benchmark(tmp_path / "data" / name, task, rows)
        empty_hub.add_repo(task.dataset, data, repo_type="dataset")
    (tmp_path / "finetune.py").write_text(blocks("python")[0].replace("1e-4", "1e-2"))  # it begins at random weights
    commands = [shlex.split(line) for line in "".join(blocks("bash")).splitlines()]
    environment = os.environ | {
        "HF_ENDPOINT": empty_hub.url,
        "HF_TOKEN": WRITER,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(PAGE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    # these data sets' own names of classes are not the benchmark's: said once for each task by each of two commands
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert len(warned) == 2 * len(TASKS) and all("its first class is called" in line for line in warned), done.stderr
    for name in TASKS:
        published = empty_hub.commits(f"me/vit-b32-{name}")[0].files
        assert {"model.safetensors", *(file.name for file in PUBLISHED_FILES)} <= published.keys()
    assert not list((tmp_path / "home" / "hf-epimer").rglob("*gradient_gram*"))  # nothing was measured again
    merged = empty_hub.commits("me/merged")[0].files
    assert {f"heads/{name}.safetensors" for name in TASKS} < merged.keys()
    assert "made from | images of every task" in empty_hub.read("me/merged", "README.md").decode()
    rows = json.loads(empty_hub.read("me/merged", "results.json"))["tasks"]
    assert rows.keys() == set(TASKS)
    assert rows["mnist"]["fine_tuned"] > 2 * rows["mnist"]["base"] and rows["mnist"]["accuracy"] > rows["mnist"]["base"]
    # and the last command: the merge as the Hub has it, by its own classifiers
    _, _, measured = done.stdout.rpartition("me/merged")
    assert f"{rows['mnist']['accuracy']:.3f}" in measured, done.stdout


def test_other_encoders_merge_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's second block, on an encoder of transformers, and what it saves."""
    monkeypatch.chdir(tmp_path)
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    model = BertModel(config).eval()
    for name in ("encoder", "encoder-law", "encoder-medicine"):
        model.save_pretrained(f"org/{name}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    (block,) = (block for block in blocks("python") if "merge_state_dicts" in block)
    exec(compile(block, str(PAGE), "exec"), {})
    merged, report = BertModel.from_pretrained("encoder-merged", output_loading_info=True)
    assert not any(report.values())
    states = [BertModel.from_pretrained(f"org/encoder{name}").state_dict() for name in ("", "-law", "-medicine")]
    expected = merge_state_dicts(states[0], states[1:], "tsv-m")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        assert not torch.equal(value, states[0][name])
