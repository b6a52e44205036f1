"""The processes of one `accelerate launch`: which share of the work is whose, and what they tell each other.

Without a launcher there is one process, and accelerate is not even imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_epimer.checkpoints.folders import atomic_folder
from hf_epimer.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among all of them: `rank` from 0, of `count`; `gpu` is its own where each has one."""

    rank: int = 0
    count: int = 1
    gpu: str | None = None

    def device(self, asked: str) -> str:
        """Where this process computes: on its own GPU, where any will do."""
        return self.gpu if asked == "cuda" and self.gpu else asked

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes what is written once, and speaks."""
        return self.rank == 0

    def share(self, sizes: Mapping[str, int]) -> set[str]:
        """The names that are this process's: largest first, each to the one that has least to do by then."""
        loads = [0] * self.count
        mine = set()
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[name]
            if rank == self.rank:
                mine.add(name)
        return mine

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank; all have to ask, and wait for each other."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[Value] = gather_object([value])
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, the same to the bit in each; all have to ask."""
        if self.count == 1:
            return values
        from accelerate.utils import reduce

        total: Tensor = reduce(values, "sum")
        return total

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """One process does what is inside before the others, who find it done."""
        if not self.is_main:
            self.gather(None)
        yield
        if self.is_main:
            self.gather(None)

    @contextmanager
    def said_once(self) -> Iterator[None]:
        """What all processes find out alike is said by the first: nobody reads a warning once for each."""
        package = logging.getLogger("hf_epimer")
        level = package.level
        if not self.is_main:
            package.setLevel(logging.ERROR)
        try:
            yield
        finally:
            package.setLevel(level)

    @contextmanager
    def atomic_folder(self, target: Path, record: str, overwrite: bool) -> Iterator[Path]:
        """`hf_epimer.checkpoints.folders.atomic_folder`, one for all processes, made and installed by the first.

        Raises:
            OutputError: as there.
        """
        if not self.is_main:
            yield Path(self.gather("")[0])
            self.gather(None)
            return
        with atomic_folder(target, record, overwrite) as folder:
            self.gather(str(folder))
            yield folder
            self.gather(None)


ALONE = Processes()
"""One process for everything."""


@cache
def launched() -> Processes:
    """The processes that were started together, with this one among them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import Accelerator

    accelerator = Accelerator()
    gpu = str(accelerator.device) if accelerator.device.type == "cuda" else None
    return Processes(accelerator.process_index, accelerator.num_processes, gpu)


def check_alone(command: str) -> None:
    """Refuse several processes for what one does.

    Raises:
        UsageError: there are several.
    """
    if launched().count > 1:
        raise UsageError(f"{command} runs in one process; what takes long may be measured by several before (fisher)")


def leave() -> None:
    """Part from the other processes, before this one ends."""
    if launched().count > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
