"""An evaluation divided over processes: which steps each computes, and the sums over all of them.

Steps are whole: each process computes the same micro-batches as a single process would, so that the sums of each window
are the same numbers, whichever process computes them.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import nn

from ..stream.batch import Step
from ..stream.cached import CachedSource
from ..utils.distributed import ALONE, Processes, is_fsdp
from .windows import Windows


class EvalPartition:
    """This process's part of the steps of an epoch.

    source: not divided over ranks, with a batch_size. windows: of the epoch. student: checked for FSDP2.
    With fewer steps than processes, each process computes all of them, and nothing is summed.
    """

    def __init__(self, source: CachedSource, windows: int, processes: Processes, student: Any) -> None:
        self._source, count = source, len(source)
        self._processes = processes if count >= processes.world_size else ALONE
        world = self._processes.world_size
        self._first, self._last = (count * rank // world for rank in (self._processes.rank, self._processes.rank + 1))
        self._max_steps = -(-count // world)
        # FSDP2 gathers the shards of a layer in every forward, so all processes must run equally many, at the same time
        modules = student.modules() if isinstance(student, nn.Module) else ()
        self._in_lockstep = world > 1 and any(is_fsdp(module) for module in modules)
        self.first_window = min(self._first * source.fingerprint["batch_size"], windows)
        """The number of the first window of the first step."""

    def steps(self, forward: Callable[[Any], object]) -> Iterator[Step]:
        """The steps of this process; the caller runs one forward for each micro-batch with positions that count.

        forward: of a micro-batch, called in addition if other processes run more forwards than this one.
        """
        self._source.seek(0, self._first)
        mine = islice(self._source.steps(epochs=1), self._last - self._first)
        last: Any = None
        for _ in range(self._max_steps):
            step = next(mine, None)
            forwards = 0 if step is None else sum(batch.count > 0 for batch in step.micro_batches)
            most = max(self._processes.gather(forwards)) if self._in_lockstep else forwards
            if step is not None:
                last = step.micro_batches[-1]
                yield step
            for _ in range(most - forwards):
                forward(last)

    def sum(self, windows: Windows) -> Windows:
        """The sums of all processes; each window was computed by one of them."""
        return Windows.merged(self._processes.gather(windows)) if self._processes.group else windows

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        return sum(self._processes.gather(number))
