"""Which pictures a step takes, in which view, and what is to be made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.towers import images
from hf_epimer.errors import DataError
from hf_epimer.pipeline.refinement.pictures import Pictures, read_pictures, write_pictures
from hf_epimer.pipeline.views import crops


def numbered(count: int, views: int, held_out: int = 2) -> Pictures:
    """Picture i is full of i, those that are held out come last; target v, i is (v, i)."""
    pixels = torch.arange(count + held_out).half().view(-1, 1, 1, 1).expand(count + held_out, 3, 4, 4)
    targets = torch.tensor([[[float(v), float(i)] for i in range(count + held_out)] for v in range(views)])
    return Pictures(pixels[:count], targets[:, :count], pixels[count:], targets[:1, count:])


def test_every_picture_has_its_turn_and_every_view_of_it() -> None:
    pictures = numbered(21, views=3)
    seen = [pictures.batch(step, 7, seed=0, share=(0, 1)) for step in range(3 * 3)]
    for turn in range(3):
        pixels, targets = (torch.cat(parts) for parts in zip(*seen[3 * turn : 3 * turn + 3]))
        assert sorted(targets[:, 1].tolist()) == list(range(21))
        assert torch.allclose(pixels[:, 0, 0, 0], targets[:, 1], atol=1e-5)
        assert {int(view) for view in targets[:, 0]} == {0, 1, 2}
    pairs = {tuple(row.tolist()) for _, targets in seen for row in targets}
    assert len(pairs) == 3 * 21
    other = pictures.batch(0, 7, seed=1, share=(0, 1))[1]
    assert set(other[:, 1].tolist()) != set(seen[0][1][:, 1].tolist())
    held_out = torch.cat([targets for _, targets in pictures.held_out((0, 1))])
    assert held_out.tolist() == [[0.0, 21.0], [0.0, 22.0]]


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_share_a_batch(processes: int) -> None:
    pictures = numbered(21, views=2)
    whole = pictures.batch(5, 7, seed=0, share=(0, 1))[1].tolist()
    shares = [pictures.batch(5, 7, seed=0, share=(rank, processes)) for rank in range(processes)]
    assert sorted(row for _, targets in shares for row in targets.tolist()) == sorted(whole)
    assert all(pixels.shape == (len(targets), 3, 4, 4) for pixels, targets in shares)
    held_out = [targets.tolist() for rank in range(processes) for _, targets in pictures.held_out((rank, processes))]
    assert sorted(row for part in held_out for row in part) == [[0.0, 21.0], [0.0, 22.0]]


def test_a_target_is_what_the_model_makes_of_that_very_view(tmp_path: Path) -> None:
    def embed(pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :5]

    write_pictures(tmp_path / "p", "a", images(1), images(2, 20), embed, views=3)
    pictures = read_pictures(tmp_path / "p")
    assert pictures.targets.shape == (3, 40, 5)
    for step in range(8):
        pixels, targets = pictures.batch(step, 16, seed=0, share=(0, 1))
        assert torch.allclose(embed(pixels), targets, atol=1e-6)
    whole = torch.cat([batch.inputs for batch in images(1)])
    assert torch.equal(pictures.targets[0], embed(whole))
    assert torch.allclose(pictures.targets[2], embed(crops(whole, range(40), 2)), atol=1e-6)
    held_out = torch.cat([batch.inputs for batch in images(2, 20)])
    found = [torch.cat(parts) for parts in zip(*pictures.held_out((0, 1)))]
    assert torch.equal(found[0], held_out) and torch.equal(found[1], embed(held_out))


@pytest.mark.parametrize("counts", [(0, 1), (1, 0)])
def test_too_few_images_are_an_error(counts: tuple[int, int], tmp_path: Path) -> None:
    learnt, held_out = (images(1, count) if count else [] for count in counts)
    with pytest.raises(DataError, match="a: a refinement needs at least 2 images of every task"):
        write_pictures(tmp_path / "p", "a", learnt, held_out, lambda pixels: pixels.flatten(1), 1)
    assert not list(tmp_path.iterdir())
