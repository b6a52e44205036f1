"""The streaming loop: as many layers in memory as there are cores to solve them, in one bounded set of buffers.

For every parameter of the base: subtract it from the fine-tuned weights into a reused buffer, hand the layer to the
method, add the merged task vector to the base, check that it is finite, pass it on. Layers are solved side by side, one
per worker, while the system brings the next layers from the disk. Memory is that of the largest layer times the workers
(fewer of them when layers are large), whatever the number of layers. A method that looks at entries alone gets large
layers in pieces, which stay in the processor's cache from the file to the merged entries.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hf_epimer.checkpoints.reader import PiecewiseSource
from hf_epimer.merging.finite import check_merged, stored_as
from hf_epimer.merging.inputs import Ingredients
from hf_epimer.merging.layer_reader import LayerReader, read_ahead
from hf_epimer.merging.pieces import PIECE, Pieces, in_pieces
from hf_epimer.merging.report import LayerReport, joined
from hf_epimer.methods import Layer, Method
from hf_epimer.methods.basis import layer_basis
from hf_epimer.methods.statistic import StatisticKind
from hf_epimer.numerics.subspace import TaggedBasis
from hf_epimer.types import Shape

Result = TypeVar("Result")


@dataclass(frozen=True)
class MergedLayer:
    """One merged parameter and its line in the report."""

    name: str
    tensor: Tensor
    report: LayerReport


class Team(Protocol):
    """Several who merge the same layers, each a part: this one is number `rank` of `count`."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def gather(self, value: Result) -> list[Result]:
        """The values of all, by rank; each has to ask."""


def merge_layers(
    ingredients: Ingredients,
    method: Method,
    config: Any,
    *,
    seed: int = 0,
    exact: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    only: Collection[str] | None = None,
    team: Team | None = None,
    on_layer: Callable[[str, int], None] = lambda stage, layers: None,
) -> Iterator[MergedLayer]:
    """Merge parameter by parameter, in the order of the base.

    Args:
        ingredients: checked to fit together.
        method: from METHODS.
        config: an instance of `method.config`.
        seed: of everything random.
        exact: float64, full decompositions, dense solves.
        device: where layers are solved; files are always read to the CPU. Apple's GPUs have no float64, without which
            many methods could not compute: there, layers are solved on the CPU.
        dtype: of the merged tensors; None for that of the base.
        only: the parameters to merge, where the others are merged by somebody else; a survey is of all of them.
        team: who the others are: they share a survey's work, each hearing of all results.
        on_layer: called with the stage ("survey" or "merge") and 1 after every layer.

    Raises:
        CheckpointError, StatisticsError: NaN or Inf in an input (tensor named), negative statistics.
        NumericalError: a merged tensor is not finite, or does not fit into `dtype`.
    """
    how: dict[str, Any] = {"seed": seed, "exact": exact, "device": device}
    survey = survey_layers(ingredients, method, config, on_layer, **how, team=team)
    shapes = ingredients.base.shapes
    dtypes = {name: dtype or ingredients.base.tensor(name).dtype for name in shapes}

    def merge(layer: Layer) -> MergedLayer:
        return _merge_layer(layer, method, config, survey, dtypes[layer.name])

    mine = {name: shape for name, shape in shapes.items() if only is None or name in only}
    layers = in_pieces(mine, _entries(ingredients, method, config, device))
    for parts in _stream(ingredients, layers, merge, needs=method.statistic(config), **how):
        yield _whole(parts, shapes)
        on_layer("merge", 1)


def survey_layers(
    ingredients: Ingredients,
    method: Method,
    config: Any,
    on_layer: Callable[[str, int], None],
    *,
    seed: int,
    exact: bool,
    device: str,
    team: Team | None = None,
) -> Any:
    """What a method needs to know of the whole model before it merges the first layer; None if nothing.

    Args and Raises: as of `merge_layers`.
    """
    if method.survey is None:
        return None
    needs, shapes = method.statistic(config), ingredients.base.shapes
    stream = partial(_stream, ingredients, needs=needs, seed=seed, exact=exact, device=device)
    entries = _entries(ingredients, method, config, device)

    def over_layers(work: Callable[[Layer], Result], step: int = 1) -> Iterator[Result]:
        layers = in_pieces(shapes, entries, step if entries else 1)
        found = stream(layers, work) if team is None else _shared(layers, partial(stream, work=work), team)
        for results in found:
            yield from results
            on_layer("survey", int(step == 1))

    return method.survey(config, over_layers)


def stream_layers(
    ingredients: Ingredients,
    work: Callable[[Layer], Result],
    needs: StatisticKind | None = None,
    *,
    seed: int = 0,
    exact: bool = False,
    device: str = "cpu",
) -> Iterator[Result]:
    """work(layer) for every parameter in the order of the base, several side by side.

    Args:
        ingredients: checked to fit together.
        work: a pure function; it must keep no tensor of the layer, whose buffers are used again.
        needs: the statistic to read.
        seed, exact, device: as in `merge_layers`.
    """
    layers = in_pieces(ingredients.base.shapes, None)
    for (result,) in _stream(ingredients, layers, work, needs=needs, seed=seed, exact=exact, device=device):
        yield result


def _stream(
    ingredients: Ingredients,
    layers: Sequence[Pieces],
    work: Callable[[Layer], Result],
    *,
    needs: StatisticKind | None,
    seed: int,
    exact: bool,
    device: str,
) -> Iterator[list[Result]]:
    """work(piece) of all pieces of every layer in order, several layers side by side."""
    device = _solved_on(device)
    largest = max((piece.entries for pieces in layers for piece in pieces), default=0)
    make_reader = partial(LayerReader, ingredients, needs, largest, seed=seed, exact=exact, device=device)
    workers = 1 if device != "cpu" else _workers(make_reader().nbytes())
    of_thread = threading.local()

    def one(index: int) -> list[Result]:
        if not hasattr(of_thread, "reader"):
            of_thread.reader = make_reader()
        if index + workers < len(layers):
            read_ahead(ingredients.sources(), layers[index + workers][0].name)
        return [work(of_thread.reader.read(piece)) for piece in layers[index]]

    with _pool(workers) as pool:
        pending: deque[tuple[Future[list[Result]], int]] = deque()
        waiting = 0
        for index, pieces in enumerate(layers):
            nbytes = 4 * sum(piece.entries for piece in pieces)
            pending.append((pool.submit(one, index), nbytes))
            waiting += nbytes
            # small layers are solved while a large one is: nobody waits for its turn
            while len(pending) > 2 * workers and waiting > MEMORY_FOR_RESULTS:
                future, nbytes = pending.popleft()
                waiting -= nbytes
                yield future.result()
        for future, _ in pending:
            yield future.result()


def _solved_on(device: str) -> str:
    """The device that layers of a merge on this one are solved on."""
    return "cpu" if torch.device(device).type == "mps" else device


def _entries(ingredients: Ingredients, method: Method, config: Any, device: str) -> int | None:
    """Of the pieces that layers come in; None where they come whole: a GPU gains nothing by pieces."""
    in_parts = all(isinstance(source, PiecewiseSource) for source in (ingredients.base, *ingredients.models))
    return PIECE if in_parts and method.entrywise(config) and _solved_on(device) == "cpu" else None


def _shared(
    layers: Sequence[Pieces], stream: Callable[[Sequence[Pieces]], Iterator[Result]], team: Team
) -> Iterator[Result]:
    """The results of all layers in order, each computed by one of the team."""
    results = stream(layers[team.rank :: team.count])
    for _ in range(0, len(layers), team.count):
        for part in team.gather(list(islice(results, 1))):
            yield from part


def _whole(parts: Sequence[MergedLayer], shapes: Mapping[str, Shape]) -> MergedLayer:
    """A layer as it is, or put together from pieces."""
    if len(parts) == 1:
        return parts[0]
    name = parts[0].name
    tensor = torch.cat([part.tensor for part in parts]).view(shapes[name])
    return MergedLayer(name, tensor, joined([part.report for part in parts], shapes[name]))


def tagged_bases(ingredients: Ingredients, rank: int, *, seed: int = 0, exact: bool = False) -> dict[str, TaggedBasis]:
    """The tagged basis (eq 10) of every matrix that has one: for statistics that are taken in it.

    Memory: p (m + n) numbers a matrix, p = rank times tasks.
    """

    def basis_of(layer: Layer) -> tuple[str, TaggedBasis | None]:
        return layer.name, layer_basis(layer, rank)[0]

    bases = stream_layers(ingredients, basis_of, seed=seed, exact=exact)
    return {name: basis for name, basis in bases if basis is not None}


MEMORY_FOR_BUFFERS = 10**9
"""Bytes that the layers under work may take together; a single layer may take more."""


MEMORY_FOR_RESULTS = 5 * 10**7
"""Bytes of merged layers that may wait for one before them, or be under work."""


def _workers(layer_bytes: int) -> int:
    return max(1, min(torch.get_num_threads(), MEMORY_FOR_BUFFERS // max(layer_bytes, 1)))


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Workers that share torch's threads between them, and leave the setting as it was.

    A layer is hundreds of small decompositions, on which several threads mostly wait for each other; one layer per
    thread keeps every core busy, and the work of others on the machine costs its share and no more. Whoever takes the
    results keeps to a share, too: threads of its own would wait on the cores that the workers need.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    pool = ThreadPoolExecutor(workers, "merge", torch.set_num_threads, (share,))
    torch.set_num_threads(share)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _merge_layer(layer: Layer, method: Method, config: Any, survey: Any, dtype: torch.dtype) -> MergedLayer:
    merged = method.merge(layer, config, survey)
    check_merged(merged.task_vector, layer.name, method.name)
    report = LayerReport(
        layer.name,
        tuple(layer.base.shape),
        merged_norm=float(torch.linalg.vector_norm(merged.task_vector)),
        task_vector_norms=tuple(layer.norms.tolist()),
        base_norm=float(torch.linalg.vector_norm(layer.base)),
        rank=merged.rank,
        solve=merged.solve,
    )
    stored = stored_as(layer.base + merged.task_vector, dtype, layer.name).cpu()
    return MergedLayer(layer.name, stored, report)
