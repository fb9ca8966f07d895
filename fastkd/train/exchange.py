"""`Exchange`: who learns from whom among students that are trained together, and how targets get from one to another.

The students are all in this process (or on all processes, each with a part of the batch), or one is in each process:
then what travels is the compact targets, some 2 k + 2 numbers a position, and never logits.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..capture.answers import targets_of
from ..kernels import KDError, LMHead, SparseTargets, TopKConfig
from ..models.protocol import Hidden, Logits, Output
from ..stream.batch import AnyBatch
from ..utils.distributed import ALONE, Processes, is_dtensor
from .student import Student

TEACHER = "teacher"
"""In `learns`, whose targets micro-batches come with: the teacher of a cache, or a live one that is not trained."""
Learns = Mapping[str, Sequence[str]]


def everyone(names: Sequence[str], *more: str) -> dict[str, tuple[str, ...]]:
    """Each learns from all others, and from `more`."""
    return {name: (*(other for other in names if other != name), *more) for name in names}


class Exchange(nn.Module):
    """Gives each student the targets that it learns from: an `InForward` of `Peers`.

    learns: for each student, by name, whose targets it learns from: other students, and `TEACHER`; none: it has the
        labels alone. The order of its keys is that of the students.
    topk: what a target keeps. every: 0 for targets of the same forward (Deep Mutual Learning, Zhang et al. 2018); n for
        those of copies of the other students, made anew after every n steps (Codistillation, Anil et al. 2018).
    processes: where one student is in each process, these, in the order of the students; otherwise `ALONE`.
    """

    def __init__(self, learns: Learns, topk: TopKConfig, *, every: int = 0, processes: Processes = ALONE) -> None:
        super().__init__()
        self.learns = {name: tuple(sources) for name, sources in learns.items()}
        self.topk, self.every, self._processes = topk, every, processes
        self.copies = nn.ModuleDict()

    @property
    def names(self) -> list[str]:
        """Of all students, wherever they are."""
        return list(self.learns)

    @property
    def own(self) -> list[str]:
        """The students of this process."""
        return [self.names[self._processes.rank]] if self.one_each else self.names

    @property
    def one_each(self) -> bool:
        """Whether each process has one student."""
        return self._processes.world_size > 1

    def is_source(self, name: str) -> bool:
        """Whether somebody learns from this student."""
        return any(name in sources for sources in self.learns.values())

    def copy(self, students: Mapping[str, nn.Module]) -> None:
        """Make the copies that others learn from with `every`. students: all; of those of other processes, equal
        ones."""
        for name, student in students.items():
            if self.is_source(name) and self.own != [name]:
                self.copies[name] = deepcopy(student).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Exchange":
        """Copies are always in evaluation mode, without dropout."""
        return super().train(False)

    def forward(self, batch: AnyBatch, autocast: torch.dtype | None = None) -> dict[str, SparseTargets]:
        """The targets of a micro-batch's counted rows that do not depend on this forward of the students: those of
        copies, and those it came with. autocast: the type of matrix products."""
        found = {TEACHER: replace(batch.targets, index=None)} if self.is_source(TEACHER) else {}
        with torch.no_grad():
            for name, copy in self.copies.items():
                assert isinstance(copy, Student)
                copy.autocast = autocast
                found[name] = self.targets_of(batch, copy.run(batch), copy.vocab_size)
        return found

    def makes_targets(self, name: str) -> bool:
        """Whether targets are made of a student's own forward."""
        return not self.every and self.is_source(name)

    def targets_of(self, batch: AnyBatch, output: Output, vocab_size: int) -> SparseTargets:
        """The targets of the rows that count, without an index, of what a student returned for a micro-batch."""
        answer: Output = Logits(output.values.detach()) if isinstance(output, Logits) else _one_type(output)
        index = batch.targets.index
        assert index is not None
        if not len(index):
            return self._blank(0, index.device)
        numbers = row_numbers(batch)
        numbers = torch.arange(len(index), device=index.device) if numbers is None else numbers
        config: Any = self.drawn_anew()
        with torch.no_grad():
            return targets_of(answer, index, numbers, config, batch.labels.shape, vocab_size)

    def drawn_anew(self) -> TopKConfig:
        """The top-k config with a seed of its own, so that draws differ from step to step; by torch's generator, which
        the trainer seeds at each step."""
        return replace(self.topk, seed=int(torch.randint(2**62, ()))) if self.topk.draws else self.topk

    def pick(
        self, at: slice, own: Sequence[SparseTargets | None], given: Mapping[str, SparseTargets]
    ) -> list[list[SparseTargets]]:
        """For a stretch of rows, the targets that each student of this process learns from.

        own: made of these rows in this forward, of each student of this process, or None. given: by name, of all rows.
        With one student each, every process calls it for the same stretches.
        """
        found = {name: targets[at] for name, targets in given.items()}
        found |= {name: one for name, one in zip(self.own, own, strict=True) if one is not None}
        if self.one_each and not self.every:
            found |= self._gathered(own[0], at.stop - at.start)
        return [[found[source] for source in self.learns[name]] for name in self.own]

    def _gathered(self, own: SparseTargets | None, rows: int) -> dict[str, SparseTargets]:
        """The targets of every student from which somebody learns, packed into integers for one exchange."""
        like = own if own is not None else self._blank(rows, self._processes.device)
        packed = _pack(like)
        parts = [torch.empty_like(packed) for _ in self.names]
        dist.all_gather(parts, packed)
        return {name: _unpack(part, like) for name, part in zip(self.names, parts, strict=True) if self.is_source(name)}

    def _blank(self, rows: int, device: torch.device) -> SparseTargets:
        return SparseTargets.empty(
            rows, self.topk.width(self.vocab_size), vocab_size=self.vocab_size, temperatures=self.topk.temperatures,
            draws=self.topk.draws > 0, draw_temperature=self.topk.draw_temperature, device=device,
        )  # fmt: skip

    vocab_size: int = 0
    """Of all students; set by `Peers`."""

    # the members of InForward

    def answer(self, batch: AnyBatch, output: Output | None, student: Any) -> AnyBatch:
        """The micro-batch as it is: each student has targets of its own."""
        return batch

    @torch.no_grad()
    def after_step(self, student: Any, step: int) -> None:
        """With `every`: make the copies anew, if it is time."""
        if not self.every or step % self.every:
            return
        for rank, name in enumerate(self.names):
            ours = _tensors(student.students[name]) if name in self.own else None
            copies = _tensors(self.copies[name]) if name in self.copies else None
            if self.one_each and self.is_source(name):
                for tensor in ours or copies or ():
                    dist.broadcast(tensor, rank)
            elif ours and copies:
                torch._foreach_copy_(copies, ours)

    def describe(self) -> dict[str, Any]:
        settings = {name: value for name, value in asdict(self.topk).items() if name != "seed"}
        return {"learns": {name: list(v) for name, v in self.learns.items()}, "every": self.every, **settings}


def row_numbers(batch: AnyBatch) -> Tensor | None:
    """The numbers in the data of the rows that count, int64 `[m]`, if the micro-batch has them."""
    signal = batch.signals.get("rows/numbers")
    return None if signal is None else signal.numbers


def _one_type(output: Hidden) -> Hidden:
    """Detached states and their LM head in one type: under autocast they differ."""
    states, lm_head = output.states.detach(), output.lm_head
    if not isinstance(lm_head, LMHead) or states.dtype == lm_head.weight.dtype:
        return Hidden(states, lm_head)
    bias = None if lm_head.bias is None else lm_head.bias.to(states.dtype)
    return Hidden(states, replace(lm_head, weight=lm_head.weight.to(states.dtype), bias=bias))


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in the order of the module; of those that FSDP2 divides, this process's part."""
    each = [*(p.detach() for p in module.parameters()), *module.buffers()]
    return [tensor.to_local() if is_dtensor(tensor) else tensor for tensor in each]


def _pack(targets: SparseTargets) -> Tensor:
    """int32 `[m, W]`; floats by their bits."""
    columns = [targets.ids, targets.logprobs.view(torch.int32), targets.tail.view(torch.int32)]
    columns += [targets.outcomes[:, None]] + ([] if targets.draws is None else [targets.draws])
    return torch.cat(columns, 1)


def _unpack(packed: Tensor, like: SparseTargets) -> SparseTargets:
    k, m = like.width, len(like.temperatures)
    widths = [k, k, m, 1] + ([] if like.draws is None else [k])
    if sum(widths) != packed.shape[1]:
        raise KDError(f"exchange: got {packed.shape[1]} columns; expected {sum(widths)}.")
    ids, logprobs, tail, outcomes, *draws = (part.contiguous() for part in torch.split(packed, widths, 1))
    return replace(
        like, ids=ids, logprobs=logprobs.view(torch.float32), tail=tail.view(torch.float32), outcomes=outcomes[:, 0],
        draws=draws[0] if draws else None,
    )  # fmt: skip
