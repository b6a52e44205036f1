"""`rank_pattern` and `alpha_pattern` of an adapter_config.json: which rank or alpha which modules have.

A key is a regular expression that PEFT matches with the end of a module's name, from its start or after a dot; the
first that fits counts. It comes from a stranger, and expressions exist that no machine finishes matching. Keys that are
names, as nearly all are, are looked up; of expressions only such are matched as need few steps:

    letters, digits, _ - .    \\. \\d \\w    [a-z0-9]    | ( | )    ^ $
    and after one of them, but no group:    * + ? {2} {1,3}
"""

from __future__ import annotations

import math
import re
from typing import Any

from hf_epimer.errors import CheckpointError

MOST_KEYS = 10_000
"""More modules than any model has."""

LONGEST_EXPRESSION = 300
MOST_STEPS = 10**5
"""That all expressions together may take with one module, at worst."""

_NAME = re.compile(r"(?:[\w-]|\\?\.)+")
_ATOM = r"(?:[\w\-.]|\\[.dw]|\[\^?[\w\-.]+\])(?:[*+?]|\{\d{1,3}(?:,\d{0,3})?\})?"
_EXPRESSION = re.compile(rf"\^?(?:{_ATOM}|\||\((?:\?:)?(?:{_ATOM}|\|)*\))*\$?")
_LETTERS = 40
"""Of a module's name, as they count for repeats, which are quicker than alternatives."""


class Patterns:
    """The values of one of both fields, by module.

    Args:
        field: its name.
        entries: its value, as it stands in the config.
        where: how messages name the config.

    Raises:
        CheckpointError: it is no object of expressions and numbers, or one that cannot be matched in few steps.
    """

    def __init__(self, field: str, entries: Any, where: str) -> None:
        entries = {} if entries is None else entries
        if not isinstance(entries, dict):
            raise CheckpointError(f"{where}: {field} is no object of patterns and numbers")
        if len(entries) > MOST_KEYS:
            raise CheckpointError(f"{where}: {field} has {len(entries)} entries, and no model has {MOST_KEYS} modules")
        steps = 0
        self._names: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], float]] = []
        for number, (key, value) in enumerate(entries.items()):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                raise CheckpointError(f"{where}: {field} of {_shown(key)} is {_shown(value)}, not a number")
            if _NAME.fullmatch(key):
                self._names.setdefault(key.replace("\\", ""), (number, value))
            else:
                expression = _compiled(key, f"{where}: {field}")
                self._expressions.append((number, expression, value))
                steps += _steps(key)
                if steps > MOST_STEPS:
                    raise CheckpointError(
                        f"{where}: the expressions in {field} take too long to be matched (the last one read is "
                        f"{_shown(key)}); write names of modules"
                    )

    def value(self, module: str, default: Any) -> Any:
        """That of the first key that fits the end of a module's name."""
        starts = [0, *(match.end() for match in re.finditer(r"\.", module))]
        fitting = [self._names[module[start:]] for start in starts if module[start:] in self._names]
        for number, expression, value in self._expressions:
            if any(expression.fullmatch(module, start) for start in starts):
                fitting.append((number, value))
                break
        return min(fitting)[1] if fitting else default


def _compiled(key: str, where: str) -> re.Pattern[str]:
    if len(key) > LONGEST_EXPRESSION or not _EXPRESSION.fullmatch(key):
        raise CheckpointError(
            f"{where} has the key {_shown(key)}, which is no name and no simple expression; write names of modules"
        )
    try:
        return re.compile(key)
    except re.error as error:
        raise CheckpointError(f"{where} has the key {_shown(key)}, which is no expression: {error}") from error


def _steps(key: str) -> int:
    """A bound on what a machine that tries every way takes to match an expression of the kind above with a name."""
    repeats = len(re.findall(r"[*+{]", key))
    alternatives = [group.count("|") + 1 for group in re.findall(r"\([^)]*\)", key)]
    outside = re.sub(r"\([^)]*\)", "", key).count("|") + 1
    return (
        _LETTERS**repeats
        // math.factorial(repeats)
        * math.prod(alternatives)
        * outside
        * 2 ** len(re.findall(r"(?<!\()\?", key))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
