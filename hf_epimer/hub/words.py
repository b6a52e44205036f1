"""What went wrong, as one line that may be shown to anybody."""

from __future__ import annotations

import re

_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")


def one_line(error: BaseException) -> str:
    """An error's first line, with what the Hub said, and no address with its query."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    said = (getattr(error, "server_message", None) or "").strip().split("\n")[0][:300]
    return without_queries(text if said in text else f"{text}: {said}")


def without_queries(text: str) -> str:
    """A text whose addresses have lost their query: that of a signed address is a key."""
    return _QUERY.sub(r"\1", text)
