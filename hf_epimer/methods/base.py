"""What a merge method is: a pure function of one layer, with a frozen dataclass as its only configuration.

    merged task vector = merge(layer, config, survey)

A method knows no files, no Hub, no model class and no device count. Most look at one layer at a time; one that needs a
number from the whole model first (TIES' threshold, NAN's norms) declares a `survey` that reads all layers once or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hf_epimer.errors import StatisticsError
from hf_epimer.methods.options import Option, options_of
from hf_epimer.methods.report import RankReport, SolveReport
from hf_epimer.methods.statistic import StatisticKind

if TYPE_CHECKING:
    from torch import Tensor

    from hf_epimer.numerics.lowrank.factors import LowRank
    from hf_epimer.numerics.subspace import TaggedBasis


@dataclass(frozen=True)
class Layer:
    """One parameter of all models.

    Attributes:
        name: canonical name, for seeds and messages.
        base: W_0, any shape.
        task_vectors: D_t = W_t - W_0, T x the shape of W_0.
        weights: l_t, length T, summing to 1.
        is_matrix: whether spectral methods treat it as a matrix; then W_0 is m x n.
        labels: one name per task, unique: keys for random masks, so that the order of tasks does not matter.
        statistics: part's name -> one tensor per task, T x ...; without those that were not asked for or are
            not available for this parameter.
        basis: the tagged basis, where statistics were taken in one; None to compute it.
        factors: the task vectors by their thin SVDs, where they are known (adapters); None to compute them.
        seed: of everything random in this merge.
        exact: full decompositions and dense solves.
    """

    name: str
    base: Tensor
    task_vectors: Tensor
    weights: Tensor
    is_matrix: bool
    labels: tuple[str, ...]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    basis: TaggedBasis | None = None
    factors: tuple[LowRank, ...] | None = None
    seed: int = 0
    exact: bool = False

    @property
    def tasks(self) -> int:
        """T."""
        return int(self.task_vectors.shape[0])

    @cached_property
    def norms(self) -> Tensor:
        """|D_t|, length T."""
        import torch

        return torch.linalg.vector_norm(self.task_vectors.reshape(self.tasks, -1), dim=1)

    def measured(self, part: str) -> Tensor:
        """One part of the statistics, for a method that cannot do without it.

        Raises:
            StatisticsError: it is not there for this parameter.
        """
        if part not in self.statistics:
            raise StatisticsError(f"{self.name}: there are no statistics for this parameter ({part} is missing)")
        return self.statistics[part]

    def mean(self) -> Tensor:
        """sum l_t D_t, shaped like W_0."""
        return weighted_sum(self.weights, self.task_vectors)


def weighted_sum(weights: Tensor, tensors: Tensor) -> Tensor:
    """sum w_t X_t over the first dimension of T x ..., one pass over memory."""
    return (weights @ tensors.reshape(len(tensors), -1)).view(tensors.shape[1:])


@dataclass(frozen=True)
class LayerMerge:
    """The merged task vector (shaped like W_0) and what the method has to say about the layer."""

    task_vector: Tensor
    rank: RankReport | None = None
    solve: SolveReport | None = None


@dataclass(frozen=True)
class MethodConfig:
    """The options of a method: what its command-line flags, merge_config.json and Python callers have in common.

    Raises:
        UsageError: an option is of the wrong type, out of range or not among the choices.
    """

    def __post_init__(self) -> None:
        for name, option in options_of(type(self)).items():
            option.check(getattr(self, name))

    def merge(self, base: Any, tuned: Sequence[Any], statistics: Sequence[Any] | None = None) -> dict[str, Tensor]:
        """Merge models in memory with these options.

        Args:
            base: a module or its state dict.
            tuned: one module or state dict per task.
            statistics: one mapping or file per task, for methods that need it.

        Returns:
            Name -> merged tensor, named as in the base: `model.load_state_dict(...)` takes it.

        Raises:
            EpimerError: as in `merge_state_dicts`.
        """
        from hf_epimer.models.modules import merge_models

        return merge_models(base, tuned, self, statistics)


class OverLayers(Protocol):
    """Streams all layers once more."""

    def __call__(self, work: Callable[[Layer], Any], step: int = 1) -> Iterable[Any]:
        """work(layer) of all, in order, computed side by side.

        Args:
            work: it keeps no tensor of the layer. A method that looks at entries alone gets large layers in pieces.
            step: one entry in so many is enough; whoever cannot read them alone gives all.
        """


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
        key: for BibTeX.
        authors: as BibTeX has them, `Last, First and Last, First`; `others` for the rest.
        extension: what is added to the paper here, for a method that goes beyond it.
    """

    key: str
    authors: str
    title: str
    venue: str
    year: int
    url: str = ""
    extension: str = ""

    @property
    def names(self) -> str:
        """The authors in a sentence: `First Last, First Last and First Last`."""
        *most, last = (" ".join(reversed(name.split(", "))) for name in self.authors.split(" and "))
        return f"{', '.join(most)} and {last}" if most else last

    @property
    def cited(self) -> str:
        """In brackets: the first author's last name, the venue and the year."""
        return f"{self.authors.split(',')[0]}, {self.venue} {self.year}"

    def bibtex(self) -> str:
        """One BibTeX entry."""
        entries = {"title": self.title, "author": self.authors, "note": self.venue, "year": self.year, "url": self.url}
        lines = [f"  {name:6} = {{{value}}}" for name, value in entries.items() if value]
        return f"@misc{{{self.key},\n" + ",\n".join(lines) + "\n}"


@dataclass(frozen=True)
class Method:
    """One line of the METHODS table.

    Attributes:
        name: as on the command line.
        summary: one line for `hf-epimer methods`.
        formula: of the merged weight, plain text in the notation of `hf_epimer.numerics`.
        paper: the source.
        config: the frozen dataclass with the method's options.
        merge: (layer, config, survey result) -> LayerMerge.
        needs: the statistic it wants at its default options.
        needs_with: which one it needs with other options; None if that never changes.
        survey: (config, over_layers) -> anything; `over_layers(f)` streams all layers once more.
        entrywise: whether, with these options, every merged entry follows from that entry of the models and the survey
            alone: then large layers come in pieces, which are flat.
        does_without: whether it merges, if less well, where some or all tasks have no such statistic.
        calibrates: whether a merge by it is calibrated unless it is asked not to be, or there are no images.
        title: for the page and for people; the name itself where it is empty.
        core: which sides of a layer adapters may be merged on in the low-dimensional core that they span: it commutes
            with rotations of those sides, or gives something of use where it does not.
    """

    name: str
    summary: str
    formula: str
    paper: Paper
    config: type[Any]
    merge: Callable[[Layer, Any, Any], LayerMerge]
    needs: StatisticKind | None = None
    survey: Callable[[Any, OverLayers], Any] | None = None
    entrywise: Callable[[Any], bool] = lambda config: False
    needs_with: Callable[[Any], StatisticKind | None] | None = None
    does_without: bool = False
    calibrates: bool = False
    title: str = ""
    core: Literal["neither", "outputs", "both"] = "neither"

    @property
    def options(self) -> dict[str, Option]:
        """Its options by name, in the order of its config's fields."""
        return options_of(self.config)

    @property
    def takes_any_model(self) -> bool:
        """Whether checkpoints are enough: any architecture will do, and not only one whose forward pass is known."""
        return self.needs is None or self.does_without

    def statistic(self, config: Any) -> StatisticKind | None:
        """What it needs with these options."""
        return self.needs_with(config) if self.needs_with else self.needs
