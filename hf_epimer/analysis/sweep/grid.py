"""What a sweep tries, in words: methods x ranks x alphas. Nothing here reads or computes anything.

    candidate     (method, rank): one merged task vector tau, solved at alpha = 1
    setting       (candidate, alpha): the model theta_0 + alpha tau

Every method that has an `alpha` is linear in it, so one candidate serves all of them. A method without `rank` is one
candidate, one without `alpha` one setting of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_epimer.errors import UsageError
from hf_epimer.methods import METHODS, Method, find_method
from hf_epimer.methods.statistic import StatisticKind

RANKS = (8, 16, 32)
ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5)

Rank = int | Literal["max"]
"""`max` is the largest rank that changes anything: floor(min(m, n) / T) of the largest matrix."""


@dataclass(frozen=True)
class Candidate:
    """One merged task vector: a method with its options at alpha = 1."""

    method: Method
    config: Any

    @property
    def rank(self) -> int | None:
        """Directions per task; None where the method has no such thing."""
        rank: int | None = getattr(self.config, "rank", None)
        return rank

    @property
    def statistic(self) -> StatisticKind | None:
        """What it needs to know beside the weights."""
        return self.method.statistic(self.config)


@dataclass(frozen=True)
class Setting:
    """One merge of the grid; `alpha` is None where the method has none."""

    method: str
    rank: int | None
    alpha: float | None

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.method}{rank}" + ("" if self.alpha is None else f", alpha {self.alpha:g}")


@dataclass(frozen=True)
class Grid:
    """What is tried; duplicates are dropped, ranks and alphas ascend.

    Attributes:
        methods: names from METHODS.
        ranks: directions per task, for methods that have a rank.
        alphas: scales of the merged task vector, for methods that have one.
        options: further method options by name; each goes to the methods that have it.

    Raises:
        UsageError: an unknown method or option, a rank below 1, an alpha that is not finite, nothing to try.
    """

    methods: Sequence[str] = ("epimer",)
    ranks: Sequence[Rank] = RANKS
    alphas: Sequence[float] = ALPHAS
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods or not self.ranks or not self.alphas:
            raise UsageError("a sweep needs at least one --method, one --rank and one --alpha")
        for rank in self.ranks:
            if rank != "max" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
                raise UsageError(f"--rank must be whole numbers of at least 1, or max, not {rank!r}")
        for alpha in self.alphas:
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise UsageError(f"--alpha must be finite numbers, not {alpha!r}")
        chosen = [find_method(name) for name in dict.fromkeys(self.methods)]
        for name in self.options:
            flag = "--" + name.replace("_", "-")
            if name in ("rank", "alpha"):
                raise UsageError(f"{flag} belongs to the grid: give it as Grid({name}s=...)")
            if not any(name in method.options for method in chosen):
                users = ", ".join(method.name for method in METHODS.values() if name in method.options)
                raise UsageError(f"none of these methods has an option {flag}; {users or 'no method'} has it")
        object.__setattr__(self, "methods", tuple(method.name for method in chosen))
        ranks: list[Rank] = sorted({rank for rank in self.ranks if rank != "max"})
        object.__setattr__(self, "ranks", (*ranks, *(["max"] if "max" in self.ranks else [])))
        object.__setattr__(self, "alphas", tuple(sorted({float(alpha) for alpha in self.alphas})))
        self.candidates(1)  # every method checks its options

    def candidates(self, largest: int) -> list[Candidate]:
        """Every method at every rank.

        Args:
            largest: what `max` means.
        """
        numbers = dict.fromkeys(largest if rank == "max" else rank for rank in self.ranks)
        return [
            Candidate(method, self._config(method, rank))
            for method in map(find_method, self.methods)
            for rank in (sorted(numbers) if "rank" in method.options else [None])
        ]

    def settings(self, candidate: Candidate) -> list[Setting]:
        """One candidate at every alpha."""
        alphas = self.alphas if "alpha" in candidate.method.options else (None,)
        return [Setting(candidate.method.name, candidate.rank, alpha) for alpha in alphas]

    def _config(self, method: Method, rank: int | None) -> Any:
        options = {name: value for name, value in self.options.items() if name in method.options}
        if rank is not None:
            options["rank"] = rank
        if "alpha" in method.options:
            options["alpha"] = 1.0
        return method.config(**options)


def config_of(candidate: Candidate, setting: Setting) -> Any:
    """The method's options in a merge of its own at this setting."""
    return candidate.config if setting.alpha is None else replace(candidate.config, alpha=setting.alpha)
