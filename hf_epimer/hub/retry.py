"""Requests to the Hub: each has a time-out, is made again where its failure may pass, and fails in plain words.

An error says which reference it is about, what was asked for and what came back. Addresses lose their query before they
are shown: that of a signed one is a key.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from hf_epimer.errors import AccessError, EpimerError, HubError, NotFoundError
from hf_epimer.hub.words import one_line

logger = logging.getLogger(__name__)

BACKOFF = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries of a request that may work the next time."""

LONGEST_WAIT = 900.0
"""Seconds that the Hub may ask to be waited for; beyond that the request fails and says so."""

TIME_OUTS = {"GET": 30.0, "HEAD": 30.0}
OTHER_TIME_OUT = 120.0
"""Seconds without a sign of the server, by the request's method; a commit of many files is long in the making."""

# the HTTP library of huggingface_hub changed twice between releases; its base error is in every release's own error
HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] in ("httpx", "httpx2", "requests")
)

_NOT_LIKE_A_HUB = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, FileMetadataError)

Result = TypeVar("Result")


def persist(request: Callable[[], Result], subject: str, what: str) -> Result:
    """Make a request, again where its failure may pass.

    Args:
        subject: the reference that it is about.
        what: is asked for, as a noun: "its list of files".

    Raises:
        HubError: one of its kinds, saying what went wrong in the end.
    """
    for attempt, wait in enumerate((*BACKOFF, None)):
        try:
            with _time_outs():
                return request()
        except (EpimerError, LocalTokenNotFoundError):
            raise
        except Exception as error:
            said = explained(error, subject, what)
            if said is None:
                raise
            pause = None if wait is None or not _may_pass(error, attempt) else _pause(error, wait)
            if pause is None:
                raise said from error
            log = logger.warning if pause > 10 else logger.info
            log("%s; trying again in %.0f s", said, pause)
            time.sleep(pause)
    raise AssertionError("the last try either returns or raises")


def explained(error: Exception, subject: str, what: str) -> HubError | None:
    """What a failed request comes to in our words; None for an error that has nothing to do with the Hub."""
    root = _root(error)
    response = getattr(root, "response", None)
    if upload := _UPLOAD.match(str(error)):
        what = f"the upload of {upload[1]}"
    if isinstance(root, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the Hub cannot be asked ({one_line(root)})"
        return HubError(f"{subject}: {what} is not in the cache, and {why}")
    if isinstance(root, GatedRepoError):
        return AccessError(
            f"{subject} is gated: accept its terms on its page and set HF_TOKEN to a token that may read it"
        )
    if isinstance(root, RepositoryNotFoundError):
        return NotFoundError(
            f"{subject}: there is no such repo, or it is private and the token in use (HF_TOKEN) may not see it"
        )
    if isinstance(root, RevisionNotFoundError):
        return NotFoundError(f"{subject}: the repo has no such revision")
    if isinstance(root, EntryNotFoundError):
        return NotFoundError(f"{subject}: the repo has no {what}")
    if isinstance(root, _NOT_LIKE_A_HUB):
        return HubError(
            f"{subject}: the endpoint {constants.ENDPOINT} did not answer like a Hub to the request for {what} "
            f"({type(root).__name__}: {one_line(root)}); look at HF_ENDPOINT, proxies and login pages of the network"
        )
    if response is not None:
        return _refused(root, response, subject, what)
    if isinstance(root, HTTP_ERRORS) or _is_closed_client(root):
        return HubError(f"{subject}: {_connection(root)} ({one_line(root)}), asked for {what}")
    if _is_cut(root):
        return HubError(f"{subject}: {what} arrives with another size than the Hub lists; try again later")
    if isinstance(root, (RuntimeError, ValueError)):
        return HubError(f"{subject}: {what}: {one_line(root)}")
    return None


_UPLOAD = re.compile(r"Error while uploading '(.+)' to the Hub")  # how huggingface_hub wraps a failed one


def _root(error: BaseException) -> BaseException:
    """The failure inside the errors that huggingface_hub wraps failed downloads and uploads in."""
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError, ValueError)) and error.__cause__ is not None:
        if isinstance(error, _NOT_LIKE_A_HUB) or getattr(error, "response", None) is not None:
            break
        error = error.__cause__
    return error


def _refused(error: BaseException, response: Any, subject: str, what: str) -> HubError:
    status = response.status_code
    if status == 401:
        return AccessError(f"{subject}: the Hub does not accept the token in use (HF_TOKEN, or `hf auth login` again)")
    if status == 403:
        return AccessError(f"{subject}: the token in use has no permission for {what} ({one_line(error)})")
    if status == 429:
        asked = _asked_to_wait(response)
        again = f"for {asked:.0f} s" if asked and asked > LONGEST_WAIT else "even after waiting; try again later"
        return HubError(f"{subject}: the Hub asks for fewer requests (429), {again}; asked for {what}")
    return HubError(f"{subject}: the Hub answered {status} to the request for {what} ({one_line(error)})")


def _connection(error: BaseException) -> str:
    where = f"the Hub at {constants.ENDPOINT}"
    if _is_time_out(error):
        return f"{where} does not answer"
    # requests, under releases of huggingface_hub before 1.0, has one error for both, with the cause inside
    names = {base.__name__ for cause in (error, *error.args) for base in type(cause).__mro__}
    cannot = names & {"ConnectError", "ConnectionError", "ProxyError"} and "ProtocolError" not in names
    return f"{where} cannot be reached" if cannot else f"the connection to {where} broke"


def _may_pass(error: BaseException, attempt: int) -> bool:
    """Whether another try has a point. Where the client wraps a failure, it has tried several times itself."""
    root = _root(error)
    response = getattr(root, "response", None)
    if isinstance(root, (OfflineModeIsEnabled, LocalEntryNotFoundError, *_NOT_LIKE_A_HUB)):
        return False
    if response is not None:
        asked = _asked_to_wait(response)
        if asked is not None and asked > LONGEST_WAIT:
            return False
        passing = response.status_code in (408, 429) or response.status_code >= 500
        return passing and (root is error or asked is not None)
    if _is_closed_client(root) or _is_cut(root):
        return True
    return root is error and isinstance(root, HTTP_ERRORS) and not (_is_time_out(root) and attempt > 0)


def _pause(error: BaseException, wait: float) -> float:
    response = getattr(_root(error), "response", None)
    asked = None if response is None else _asked_to_wait(response)
    return wait if asked is None else max(wait, asked)


def _asked_to_wait(response: Any) -> float | None:
    """Seconds by the answer's Retry-After, which is a number of seconds or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    zoned = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (zoned - datetime.now(UTC)).total_seconds())


def _is_time_out(error: BaseException) -> bool:
    return any(base.__name__ in ("TimeoutException", "Timeout") for base in type(error).__mro__)


def _is_closed_client(error: BaseException) -> bool:
    """One of two parallel downloads met a broken connection, and huggingface_hub closed the client of both."""
    return isinstance(error, RuntimeError) and "closed" in str(error)


def _is_cut(error: BaseException) -> bool:
    return isinstance(error, OSError) and str(error).startswith("Consistency check failed")


@contextlib.contextmanager
def _time_outs() -> Iterator[None]:
    """Give every request inside a time-out, where huggingface_hub gives it none; its releases before 1.0, which use
    another HTTP library, cannot be told."""
    hooks = getattr(get_session(), "event_hooks", {"request": []})["request"]
    hooks.append(_limit)
    try:
        yield
    finally:
        hooks.remove(_limit)


def _limit(request: Any) -> None:
    seconds = TIME_OUTS.get(request.method, OTHER_TIME_OUT)
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: seconds if given.get(kind) is None else given[kind] for kind in ("connect", "read", "write", "pool")
    }
