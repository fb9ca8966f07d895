"""An evaluation divided over processes: which steps each makes, and how their sums become one's.

Steps are whole: each process makes the very micro-batches that one alone would make, so that each window's sums are
the same numbers, whoever made them.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..stream.batch import Step
from ..stream.cached import DistillLoader
from ..utils.distributed import ALONE, Processes
from .windows import Windows


class EvalPartition:
    """One process's part of the steps of an epoch of a loader, which itself is of one rank, and cut by batch_size.

    Where there are fewer steps than processes, each makes all of them, and nothing is summed.
    """

    def __init__(
        self, loader: DistillLoader, windows: int, windows_a_step: int, processes: Processes, student: Any
    ) -> None:
        self._loader, count = loader, len(loader)
        self._processes = processes if count >= processes.world_size else ALONE
        world = self._processes.world_size
        begins = [count * rank // world for rank in range(world + 1)]
        self._first, self._last = begins[self._processes.rank], begins[self._processes.rank + 1]
        self._most = -(-count // world)
        # FSDP2 gathers a layer's parts in every forward: all have to make equally many, at the same time
        modules = student.modules() if isinstance(student, nn.Module) else ()
        self._together = world > 1 and any(isinstance(module, FSDPModule) for module in modules)
        self.window = min(self._first * windows_a_step, windows)
        """The number of the first window of the first step."""

    def steps(self, forward: Callable[[Any], object]) -> Iterator[Step]:
        """The steps of this process. forward: of a micro-batch, called where others make more forwards than this one,
        which makes one of each micro-batch that has positions that count."""
        state = self._loader.state_dict()
        self._loader.load_state_dict(state | {"epoch": 0, "sequences": self.window, "steps": self._first})
        mine = islice(self._loader.steps(epochs=1), self._last - self._first)
        last: Any = None
        for _ in range(self._most):
            step = next(mine, None)
            counts = [] if step is None else [batch.count for batch in step.micro_batches]
            forwards = sum(count > 0 for count in counts)
            most = self._max(forwards) if self._together else forwards
            if step is not None:
                last = step.micro_batches[-1]
                yield step
            for _ in range(most - forwards):
                forward(last)

    def sum(self, windows: Windows) -> Windows:
        """The sums of all processes; each window has been seen by one of them."""
        if self._processes.group is None:
            return windows
        group = self._processes.group
        known: list[Any] = [None] * self._processes.world_size
        dist.all_gather_object(known, (sorted(windows.sums), windows.bins is not None), group=group)
        told: list[tuple[list[str], bool]] = known
        nothing = np.zeros(len(windows.counts))
        counts = self._summed(windows.counts)
        names = sorted({name for some, _ in told for name in some})
        sums = {name: self._summed(windows.sums.get(name, nothing)) for name in names}
        bins = None
        if any(has for _, has in told):
            bins = self._summed(Windows.zero_bins(len(nothing)) if windows.bins is None else windows.bins)
        return Windows(counts, sums, bins)

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        return self._processes.begin_sum([number])()[0]

    def _max(self, number: int) -> int:
        numbers = [0] * self._processes.world_size
        numbers[self._processes.rank] = number
        return max(self._processes.begin_sum(numbers)())

    def _summed(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        tensor = torch.from_numpy(array.copy())
        dist.all_reduce(tensor, group=self._processes.group)
        found: NDArray[np.float64] = tensor.numpy()
        return found
