"""DistillDataset: the micro-batches of a cache as a map-style dataset, with its sampler and collator.

The order, the ranks' shares and the prefetch threads are those of `CachedSource`. In order, the dataset streams; a jump
to another step, as when a Trainer resumes, is a seek, which decodes nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset, Sampler, get_worker_info

from ...errors import StreamError
from ...stream.batch import MicroBatch, Step
from ...stream.cached import CachedSource
from ...stream.tensors import batch_to_tensors
from ...utils.distributed import Reduce, summed_over


class DistillDataset(Dataset[MicroBatch]):
    """The micro-batches of this rank in one epoch of a cache: `dataset[i]` is number i % micro_batches of step
    i // micro_batches. `set_epoch` goes to another epoch, which has another order.

    cache: what `CachedSource` takes. batch_size: sequences per optimizer step, on all ranks. micro_batches: in every
    step, on every rank (`gradient_accumulation_steps`). rank, world_size, reduce: as of `CachedSource`; default: those
    of torch.distributed, if it is initialized. options: other arguments of `CachedSource` (seed, layout, device, ...).

    Make a DataLoader of it with its `sampler` and its `collate`, and batch_size=1, without workers: the cache is read
    on threads. Raises StreamError for what `CachedSource` refuses, for a cache of examples, and for micro-batches that
    are taken in another order than the sampler's.
    """

    def __init__(
        self,
        cache: Any,
        *,
        batch_size: int,
        micro_batches: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        reduce: Reduce | None = None,
        **options: Any,
    ) -> None:
        if world_size is None and dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        if reduce is None and (world_size or 1) > 1:
            reduce = summed_over(dist.new_group(backend="gloo"))
        self.micro_batches, self.world_size = micro_batches, world_size or 1
        self.source = CachedSource(
            cache, batch_size=batch_size, micro_batches=micro_batches, micro_tokens=None, rank=rank or 0,
            world_size=self.world_size, reduce=reduce, **options,
        )  # fmt: skip
        if self.source.form.data is not None:
            raise StreamError("data: got a cache of examples; expected one of text.")
        self.epoch = 0
        self._steps: Iterator[Step] | None = None
        self._next = (0, 0)  # epoch and number of the step that `_steps` yields next
        self._step: Step | None = None
        self._at: tuple[int, int, int] | None = None  # epoch, step and number of the micro-batch that was taken last

    def __len__(self) -> int:
        """Micro-batches in an epoch, on each rank."""
        return len(self.source) * self.micro_batches

    @property
    def sequences(self) -> int:
        """Sequences in an epoch, of all ranks."""
        return sum(one["sequences"] for one in self.source.described)

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"got micro-batch {index}; expected 0 to {len(self) - 1}")
        if get_worker_info() is not None:
            raise StreamError("DistillDataset: got a DataLoader with workers; expected num_workers=0, as the cache is "
                              "read on threads.")  # fmt: skip
        number, micro = divmod(index, self.micro_batches)
        at, before = (self.epoch, number), self._at
        if before is not None and before[:2] == at:
            allowed: tuple[int, ...] = (before[2], before[2] + 1)
        else:
            allowed = (0,)
        skipped = self.world_size > 1 and before is not None and before[0] == at[0] and number > before[1] + 1
        if micro not in allowed or skipped:  # of several ranks, each would have its share of another step
            raise StreamError(
                f"DistillDataset: got micro-batch {micro} of step {number} after {before and before[1:]}, which is not "
                "the order of its sampler; expected the micro-batches of a step one after another. Use DataLoader("
                "dataset, sampler=dataset.sampler(), collate_fn=dataset.collate), or DistillMixin in a Trainer."
            )
        if self._step is None or allowed == (0,):
            self._step = self._take(at)
        self._at = (*at, micro)
        batch: MicroBatch = self._step.micro_batches[micro]
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch."""
        self.epoch = int(epoch)

    def begin(self) -> None:
        """The next micro-batch may be of any step, as after a resume. Its sampler calls it."""
        self._at = None

    def sampler(self, repeat: int | None = None) -> "DistillSampler":
        """A sampler of all micro-batches, in order. repeat: how often each comes; default: once for each rank, as
        accelerate deals the batches of a DataLoader out to the ranks in turn."""
        return DistillSampler(self, self.world_size if repeat is None else repeat)

    @staticmethod
    def collate(batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """A list of one micro-batch as named tensors; see `fastkd.stream.batch_to_tensors`."""
        if len(batches) != 1:
            raise StreamError(
                f"DistillDataset: got {len(batches)} micro-batches at once; expected a DataLoader with batch_size=1, "
                "since an item is a micro-batch already."
            )
        return batch_to_tensors(batches[0])

    def close(self) -> None:
        """End the threads that read ahead. The dataset may be used again."""
        self.source.close()
        self._steps = self._step = self._at = None

    def _take(self, at: tuple[int, int]) -> Step:
        if self._steps is None or self._next != at:
            self.source.seek(*at)
            self._steps = iter(self.source.steps())
        self._step = None  # its memory, before the next one's
        step = next(self._steps)
        if (step.epoch, step.number) != at:
            raise StreamError(f"DistillDataset: got step {(step.epoch, step.number)} of the source; expected {at}.")
        last = at[1] + 1 == len(self.source)
        self._next = (at[0] + 1, 0) if last else (at[0], at[1] + 1)
        return step


class DistillSampler(Sampler[int]):
    """The indices of a DistillDataset in order, each `repeat` times. `set_epoch` sets the epoch of the dataset."""

    def __init__(self, dataset: DistillDataset, repeat: int = 1) -> None:
        self._dataset, self._repeat = dataset, repeat

    def __len__(self) -> int:
        return len(self._dataset) * self._repeat

    def __iter__(self) -> Iterator[int]:
        self._dataset.begin()
        return (index for index in range(len(self._dataset)) for _ in range(self._repeat))

    def set_epoch(self, epoch: int) -> None:
        self._dataset.set_epoch(epoch)
