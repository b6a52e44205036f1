"""Samples from `datasets`: choosing, decoding, and what is said about data that are not as they should be."""

from __future__ import annotations

import io
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.data import CLASSES, write_benchmark, write_data
from helpers.hub_server import StandInHub
from hf_epimer.errors import DataError
from hf_epimer.tasks import images
from hf_epimer.tasks.dataset import data_revision
from hf_epimer.tasks.decode import as_rgb, decode
from hf_epimer.tasks.images import ImageBatches, Samples, read_samples
from hf_epimer.tasks.task import Task, benchmark_tasks


def task(folder: Path, **changes: Any) -> Task:
    return Task("tiny", str(folder), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), rows=30)


def mean_colour(images: list[Image.Image]) -> Tensor:
    return torch.tensor([float(np.asarray(image).mean()) for image in images])


def rows(samples: Samples, size: int = 7, share: tuple[int, int] = (0, 1)) -> dict[int, tuple[float, int]]:
    """Index -> (mean colour, label)."""
    found = {}
    for batch in ImageBatches(samples, mean_colour, size, share):
        assert len(batch.inputs) == len(batch.labels) == len(batch.indices) <= size
        for index, colour, label in zip(batch.indices, batch.inputs.tolist(), batch.labels.tolist(), strict=True):
            assert index not in found
            found[index] = (colour, label)
    return found


def test_some_of_the_samples_are_read_alone(folder: Path) -> None:
    plain = read_samples(task(folder), "train")
    parts = [ImageBatches(plain, mean_colour, 7, only=part) for part in (range(25), range(25, 30))]
    indices = [[index for batch in part for index in batch.indices] for part in parts]
    assert indices == [list(range(25)), list(range(25, 30))]
    shares = [ImageBatches(plain, mean_colour, 7, (rank, 2), range(25, 30)) for rank in (0, 1)]
    assert [[index for batch in share for index in batch.indices] for share in shares] == [[25, 27, 29], [26, 28]]


def test_rows_come_in_order_or_shuffled_by_seed(folder: Path) -> None:
    plain = read_samples(task(folder), "train")
    assert len(plain) == 30
    assert plain.class_names == CLASSES
    assert list(plain.numbers) == list(range(30))
    shuffled = read_samples(task(folder), "train", limit=9, seed=4)
    assert len(shuffled) == 9
    assert list(shuffled.numbers) == list(read_samples(task(folder), "train", limit=9, seed=4).numbers)
    assert list(shuffled.numbers) != list(read_samples(task(folder), "train", limit=9, seed=5).numbers)
    everything, some = rows(plain), rows(shuffled)
    assert all(some[place] == everything[number] for place, number in enumerate(shuffled.numbers))
    assert len(read_samples(task(folder), "train", fraction=0.1)) == 3
    assert len(read_samples(task(folder), "train", fraction=1.0)) == 30
    assert len(read_samples(task(folder), "train", limit=1000)) == 30


def test_pictures_come_in_order_whatever_a_thread_takes_for_one(folder: Path) -> None:
    samples = read_samples(task(folder), "train")

    def slow(images: list[Image.Image]) -> Tensor:
        colour = mean_colour(images)
        time.sleep(float(colour) % 0.01)
        return colour

    found, expected = (list(ImageBatches(samples, pixels, 7)) for pixels in (slow, mean_colour))
    assert [batch.indices for batch in found] == [batch.indices for batch in expected]
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(found, expected, strict=True))


def test_threads_prepare_one_batch_more_and_end_with_the_reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.os, "cpu_count", lambda: 2)
    samples = read_samples(task(folder), "train")
    seen: list[int] = []
    batches = iter(ImageBatches(samples, lambda pictures: seen.append(1) or mean_colour(pictures), 4))
    for count in (8, 12):
        next(batches)
        deadline = time.monotonic() + 10
        while len(seen) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(seen) == count
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("picture")]


def test_processes_share_the_samples_exactly(folder: Path) -> None:
    samples = read_samples(task(folder), "train", limit=11, seed=0)
    whole = rows(samples)
    parts = [rows(samples, 2, (rank, 3)) for rank in range(3)]
    assert sum(map(len, parts)) == 11
    assert parts[0] | parts[1] | parts[2] == whole


def test_a_stream_gives_the_same_rows_every_time(folder: Path) -> None:
    first, second = (read_samples(task(folder), "train", limit=8, seed=1, streaming=True) for _ in range(2))
    assert rows(first) == rows(second)
    assert len(first) == 8
    assert rows(first) != rows(read_samples(task(folder), "train", limit=8, seed=2, streaming=True))
    whole = read_samples(task(folder), "train")
    assert sorted(rows(read_samples(task(folder), "train", limit=30, streaming=True)).values()) == sorted(
        rows(whole).values()
    )
    with pytest.raises(DataError, match="--samples"):
        read_samples(task(folder), "train", fraction=0.5, streaming=True)


def test_all_modes_become_rgb() -> None:
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        stream = io.BytesIO()
        Image.new(mode, (4, 4)).save(stream, "TIFF")
        assert decode({"bytes": stream.getvalue(), "path": None}).mode == "RGB"


GREY = np.random.default_rng(1).integers(0, 256, (16, 16), dtype=np.uint8)
GREY[0, 0] = 255


def encoded(image: Image.Image, form: str) -> dict[str, object]:
    stream = io.BytesIO()
    image.save(stream, form)
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("levels", "form"),
    [
        (GREY.astype(np.uint16) * 257, "PNG"),
        (GREY.astype(np.uint16) * 257, "TIFF"),
        ((GREY.astype(np.uint16) * 257).astype(">u2"), "TIFF"),
        (GREY.astype(np.int32) * 257, "TIFF"),
        (GREY.astype(np.uint16), "PNG"),
        (GREY.astype(np.int32), "TIFF"),
        (GREY.astype(np.float32) / 255, "TIFF"),
        (GREY.astype(np.float32), "TIFF"),
    ],
)
def test_grey_levels_of_more_than_eight_bits_are_scaled(levels: np.ndarray, form: str) -> None:
    decoded = decode(encoded(Image.fromarray(levels), form))
    assert decoded.mode == "RGB"
    for channel in np.asarray(decoded).transpose(2, 0, 1):
        assert np.array_equal(channel, GREY)
    assert np.array_equal(np.asarray(as_rgb(Image.fromarray(levels))), np.asarray(decoded))


@pytest.mark.parametrize(
    "levels",
    [
        np.full((4, 4), 256.0, np.float32),
        np.full((4, 4), -0.1, np.float32),
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), 65536, np.int32),
        np.full((4, 4), -1, np.int32),
    ],
)
def test_grey_levels_on_no_known_scale_are_counted_as_broken(levels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="grey levels"):
        decode(encoded(Image.fromarray(levels), "TIFF"))


def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import struct

    samples = read_samples(broken_data(tmp_path, 0), "train", limit=100)
    for error in (struct.error("unpack requires"), IndexError(), AssertionError("x"), NotImplementedError()):

        def fails_at_first(value: dict[str, Any], error: Exception = error) -> Image.Image:
            if value["path"] == "0.png":
                raise error
            return decode(value)

        monkeypatch.setattr(images, "decode", fails_at_first)
        batches = ImageBatches(samples, mean_colour, 16)
        assert sum(len(batch.labels) for batch in batches) == 99
        assert batches.broken == [f"row 0 ({str(error) or type(error).__name__})"]


def broken_data(folder: Path, broken: int, total: int = 200, bytes_of_broken: bytes = b"") -> Task:
    """`broken` of `total` images are cut off, or `bytes_of_broken`."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
    good = stream.getvalue()
    bad = bytes_of_broken or good[:60]
    values = [{"bytes": bad if i < broken else good, "path": f"{i}.png"} for i in range(total)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    data = datasets.Dataset.from_dict(
        {"image": values, "label": [0] * total}, features=datasets.Features({**features, "image": _RAW})
    )
    (folder / "data").mkdir(parents=True)
    data.cast(features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return task(folder)


_RAW = datasets.Features({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})


def test_up_to_one_percent_of_broken_images_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = ImageBatches(read_samples(broken_data(tmp_path, 2), "train"), mean_colour, 16)
    for _ in range(2):  # a second reading does not count them twice
        assert sum(len(batch.labels) for batch in batches) == 198
        assert len(batches.broken) == 2
    with caplog.at_level(logging.WARNING, "hf_epimer"):
        batches.report_broken()
    assert "2 images of task 'tiny' cannot be decoded and were left out: row 0 (" in caplog.text


def test_a_broken_picture_is_not_named_by_an_address(tmp_path: Path) -> None:
    data = broken_data(tmp_path, 1, bytes_of_broken=b"no picture")
    batches = ImageBatches(read_samples(data, "train"), mean_colour, 16)
    list(batches)
    assert batches.broken == ["row 0 (cannot identify image file)"]


def test_more_broken_images_are_an_error(tmp_path: Path) -> None:
    batches = ImageBatches(read_samples(broken_data(tmp_path, 3), "train"), mean_colour, 16)
    with pytest.raises(DataError, match=r"3 of 200 images of task 'tiny' cannot be decoded, more than 1%: row 0 "):
        list(batches)


def test_labels_out_of_range_name_the_row(tmp_path: Path) -> None:
    folder = write_data(tmp_path, rows=4)
    data = datasets.load_dataset(str(folder), split="train").cast_column("label", datasets.Value("int64"))
    data = data.map(lambda row, index: {"label": 9 if index == 2 else 0}, with_indices=True)
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"row 2 has the label 9, but task 'tiny' has 3 classes"):
        rows(read_samples(task(folder, class_names=CLASSES), "train"))
    with pytest.raises(DataError, match="the labels carry no names; give class_names"):
        read_samples(task(folder), "train")


def test_labels_that_say_no_and_yes_are_numbers(tmp_path: Path) -> None:
    pcam = benchmark_tasks()["pcam"]
    stored = replace(pcam, dataset=str(write_benchmark(tmp_path, pcam)))
    samples = read_samples(stored, "test")
    assert {type(label) for label in samples.rows[stored.label_column]} == {bool}
    (batch,) = ImageBatches(samples, mean_colour, 12)
    assert batch.labels.dtype == torch.int64 and set(batch.labels.tolist()) == {0, 1}


def test_text_labels_are_refused(tmp_path: Path) -> None:
    folder = write_data(tmp_path, rows=4)
    data = datasets.load_dataset(str(folder), split="train").cast_column("label", datasets.Value("string"))
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="must hold class numbers"):
        rows(read_samples(task(folder, class_names=CLASSES), "train"))


@pytest.mark.parametrize(
    ("changes", "split", "pattern"),
    [
        ({"image_column": "picture"}, "train", r"no column 'picture' for task 'tiny'; it has \['image', 'label'\]"),
        ({"label_column": "class"}, "train", "no column 'class'"),
        ({}, "validation", "split 'validation' of task 'tiny'.*validation"),
        ({"config": "other"}, "train", "other"),
        ({"class_names": ("a", "b")}, "train", "names 2 classes, the labels of .* 3"),
        ({"class_names": ("b", "A", "ab")}, "train", "another order: label 0 is 'b' in the task and 'a' in the data"),
    ],
)
def test_what_does_not_fit_is_said(folder: Path, changes: dict[str, Any], split: str, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        read_samples(task(folder, **changes), split)


def test_class_names_may_be_worded_otherwise(folder: Path) -> None:
    names = ("the letter a", "the letter b", "both")
    assert read_samples(task(folder, class_names=names), "train").class_names == names


def test_unreadable_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        read_samples(task(tmp_path / "nowhere"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        read_samples(task(tmp_path / "empty"), "train")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match="a loading script, which `datasets` no longer runs; convert it to parquet"):
        read_samples(task(tmp_path / "script"), "train")
    folder = write_data(tmp_path / "damaged", rows=4)
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match=r"damaged.*task 'tiny'"):
        read_samples(task(folder), "train")


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_data(tmp_path / "data", rows=4)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(DataError, match=r"data, split 'train' of task 'tiny': .*cache.*; set HF_HOME to a folder"):
        read_samples(task(folder), "train")


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    folder = write_data(tmp_path, rows=4)
    data = datasets.load_dataset(str(folder), split="train")
    data.select([]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"split 'train' of task 'tiny'"):
        read_samples(task(folder), "train")


def test_a_folders_revision_follows_its_files(tmp_path: Path) -> None:
    folder = write_data(tmp_path, rows=4)
    before = data_revision(task(folder))
    assert data_revision(task(folder)) == before
    write_data(tmp_path, rows=5)
    assert data_revision(task(folder)) != before


def test_a_misspelt_data_set_is_neither_on_the_hub_nor_a_folder(
    empty_hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    with pytest.raises(DataError, match=r"daat/a, split 'train' of task 'q': .*nor is there such a folder beside"):
        read_samples(Task("q", "daat/a", templates=("a {}",)), "train")
