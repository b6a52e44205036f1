"""Everything that can go wrong, as one tree. The command prints the message after `error:` and exits with `exit_code`.

    EpimerError
    ├── UsageError            wrong flags or values (exit code 2)
    ├── HubError              the Hub said no or could not be reached
    │   ├── NotFoundError     unknown repo, revision or file; a local folder that is not there
    │   ├── AccessError       private or gated without a token that may read it, or a token that may not write
    │   └── PushError         the merge is on disk, the push failed
    ├── CheckpointError       a checkpoint that cannot be read: pickled, truncated, corrupt, NaN
    │   └── MismatchError     checkpoints that do not fit together: shapes, tensors, configs
    ├── StatisticsError       curvature or Gram matrices missing or unusable
    ├── TaskError             a task, task file or set of class names that makes no sense
    ├── DataError             images or labels that cannot be read
    ├── NumericalError        merged values that are NaN or Inf, or do not fit into the type they are written in
    └── OutputError           the result cannot be written

A message names what is at fault (reference, file, tensor or flag) and what to do about it, in one line.
"""

from __future__ import annotations


class EpimerError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(EpimerError, ValueError):
    """A flag, option or argument that cannot be used as given."""

    exit_code = 2


class HubError(EpimerError):
    """The Hub refused a request or could not be reached."""


class NotFoundError(HubError):
    """A repo, revision, file or local folder does not exist (or is not visible)."""


class AccessError(HubError):
    """The token (or its absence) does not allow what was asked."""


class PushError(HubError):
    """The push failed; the merged folder is complete on disk."""


class CheckpointError(EpimerError):
    """A checkpoint cannot be read."""


class MismatchError(CheckpointError):
    """Checkpoints cannot be merged with each other."""


class StatisticsError(EpimerError):
    """Statistics (Fisher information, Gram matrices) are missing or unusable."""


class TaskError(EpimerError):
    """A task or task file is not usable."""


class DataError(EpimerError):
    """A data set cannot be read."""


class NumericalError(EpimerError, ArithmeticError):
    """The result is not finite."""


class OutputError(EpimerError):
    """The result cannot be written."""
