"""The options of a method: fields of its config dataclass, read here for the check, the flags and the page alike.

A field is an `int`, a `float` (either may be `| None`, which leaves it to the method) or a `Literal` of names; `option`
gives it its help and its range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_epimer.errors import UsageError


def option(default: Any, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that is also a command-line flag: `text` is its help, `low` and `high` its closed range."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Option:
    """One option of one method.

    Attributes:
        name: of the field.
        kind: of its values: int, float or str.
        choices: the names there are; empty for numbers.
        optional: whether it may be None, which leaves it to the method.
        default: its value where none is given.
        help: one line.
        low, high: its closed range.
    """

    name: str
    kind: type[int] | type[float] | type[str]
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    low: float | None
    high: float | None

    @property
    def flag(self) -> str:
        """What it is on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> None:
        """Refuse what it cannot be.

        Raises:
            UsageError: the value is of the wrong type, out of range or not among the choices.
        """
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"{self.flag} {value!r} is not one of {', '.join(self.choices)}")
            return
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise UsageError(f"{self.flag} must be a finite number, not {value!r}")
        if self.kind is int and not isinstance(value, Integral):
            raise UsageError(f"{self.flag} must be a whole number, not {value!r}")
        if self.low is not None and float(value) < self.low:
            raise UsageError(f"{self.flag} must be at least {self.low}, not {value}")
        if self.high is not None and float(value) > self.high:
            raise UsageError(f"{self.flag} must be at most {self.high}, not {value}")


def options_of(config: type[Any]) -> dict[str, Option]:
    """A config's options by name, in the order of its fields."""
    hints = get_type_hints(config)
    return {item.name: _option(item.name, hints[item.name], item.default, item.metadata) for item in fields(config)}


def _option(name: str, hint: Any, default: Any, metadata: Any) -> Option:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kinds = {hint, *get_args(hint)}
    kind = str if choices else int if int in kinds else float
    return Option(
        name,
        kind,
        choices,
        type(None) in kinds,
        default,
        metadata["help"],
        metadata["low"],
        metadata["high"],
    )
