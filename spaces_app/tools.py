"""What agents read of the endpoints, each of which is a tool to them: its docstring, with what several share put in."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import indent
from typing import Any, TypeVar

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def described(**shared: str) -> Callable[[Endpoint], Endpoint]:
    """Put each of these texts where the endpoint's docstring has its name by itself in a line."""

    def filled(endpoint: Endpoint) -> Endpoint:
        text = endpoint.__doc__ or ""
        for name, lines in shared.items():
            place = re.compile(rf"^( *){name}\n", re.M)
            text = place.sub(lambda line, lines=lines: indent(lines, line[1]), text)  # type: ignore[misc]
        endpoint.__doc__ = text
        return endpoint

    return filled
