"""`Peers`: students that are trained together as one, each from the labels and from the targets that others make.

Deep Mutual Learning (Zhang et al. 2018, equations 4 to 8): in one forward, every student's outputs are computed once;
targets are made of all of them, detached; and each student's loss takes the others' targets, a mean over the others,
before any of them steps. Parameters, clipping and the state of the optimizer are a student's own: its steps are those
of a training alone that is given the same targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..cache.errors import type_name
from ..errors import TrainError
from ..kernels import KDLoss, LMHead, SparseTargets, linear_kd_losses
from ..kernels.loss.linear import default_chunk
from ..models.protocol import Hidden, Output
from ..stream.batch import AnyBatch
from .exchange import Exchange, row_numbers
from .objective import OUTPUTS, Objective, TokenKD
from .optimizer import clip_all_
from .student import LoadedStudent, Student

PARTS = ("loss", *KDLoss._fields[1:], "grad_norm")
"""What is logged of each student, as NAME/PART."""


class Peers(Student):
    """Several students as one `Student`, which `Trainer` trains with one optimizer into one checkpoint.

    students: those of this process, by name, in the order of `exchange.own`. The loss that is differentiated is the sum
    of theirs. Raises TrainError if their vocabularies differ.
    """

    live: Exchange

    def __init__(self, students: Mapping[str, LoadedStudent], exchange: Exchange) -> None:
        modules = {name: made.student for name, made in students.items()}
        check_vocabularies({name: one.vocab_size for name, one in modules.items()})
        first, limits = next(iter(modules.values())), [one.max_positions for one in modules.values()]
        super().__init__(
            nn.ModuleDict(modules), _not_run, name=" + ".join(exchange.names), vocab_size=first.vocab_size,
            max_positions=min((limit for limit in limits if limit is not None), default=None),
            packs=all(one._packs for one in modules.values()),
            notes=[f"{name}: {note}" for name, one in modules.items() for note in one.notes],
        )  # fmt: skip
        self._parts = dict(students)
        exchange.vocab_size = self.vocab_size
        self.live = exchange

    @property
    def students(self) -> dict[str, Student]:
        """The students of this process, by name."""
        return dict(self.model.items())  # type: ignore[operator]

    @property
    def parts(self) -> dict[str, LoadedStudent]:
        return self._parts

    @property
    def alone(self) -> bool:
        return self.live.one_each

    @property
    def absent(self) -> tuple[str, ...]:
        names = [name for name in self.live.names if name not in self.live.own]
        here = [f"live.copies.{name}." for name in self.live.own] if self.live.one_each else []
        return (*(f"model.{name}." for name in names), *here)

    @property
    def left_out(self) -> frozenset[str]:
        each = [(name, path) for name, one in self.students.items() for path in one.left_out]
        return frozenset(f"{where}.{name}.{path}" for name, path in each for where in ("model", "live.copies"))

    @property
    def layers(self) -> list[nn.Module]:
        return [layer for one in self.students.values() for layer in one.layers]

    def read(self, objective: Objective) -> None:
        if not isinstance(objective, TokenKD):
            raise TrainError(
                f"objective: got {type_name(objective)} for students that learn from each other; expected none "
                "beside the distillation loss of the settings."
            )
        self.objective = objective

    def forward(self, batch: AnyBatch, *, num_items: int | Tensor | None = None, **scheduled: Any) -> dict[str, Tensor]:
        """The losses of a micro-batch: "loss", the sum over students, and NAME/loss, NAME/hard, NAME/soft of each, 0
        for those of other processes."""
        assert isinstance(self.objective, TokenKD)
        items = batch.count if num_items is None else num_items
        with self._autocast(batch.device):
            given = self.live(batch, self.autocast)
            outputs = {name: self.of(name).run(batch) for name in self.students}
            losses = self._fused if _fusable(outputs.values()) else self._apart
            found = losses(batch, outputs, given, items, scheduled)
        zero = torch.zeros((), device=batch.device)
        result = {"loss": torch.stack([one.loss for one in found.values()]).sum()}
        for name in self.live.names:
            values = found.get(name, KDLoss(zero, zero, zero))
            result |= {f"{name}/{part}": value.detach() for part, value in values._asdict().items()}
        return result

    def logits(
        self, batch: AnyBatch, rows: Tensor | None = None, run: Callable[[AnyBatch], Output] | None = None
    ) -> Tensor:
        """Logits `[m, V]` of what `run` returns, such as one of the students; None: of the ensemble of all, the log of
        their mean probabilities."""
        if run is not None:
            return super().logits(batch, rows, run)
        index = batch.targets.index if rows is None else rows
        with self._autocast(batch.device):
            each = [OUTPUTS["logits"](self.of(name).run(batch), index).float().softmax(-1) for name in self.students]
        total = torch.stack(each).sum(0)
        if self.live.one_each:
            dist.all_reduce(total)
        return (total / len(self.live.names)).log()

    def clip_(self, most: float | None) -> dict[str, Tensor]:
        """Clip each student's gradient to the norm `most`; the norms before that, and that of all of them."""
        norms = {name: clip_all_(one, most).float() for name, one in self.students.items()}
        zero = torch.zeros_like(next(iter(norms.values())))
        each = torch.stack([norms.get(name, zero) for name in self.live.names])
        if self.live.one_each:
            dist.all_reduce(each)
        found = {f"{name}/grad_norm": norm for name, norm in zip(self.live.names, each.unbind(), strict=True)}
        return {**found, "grad_norm": each.square().sum().sqrt()}

    def of(self, name: str) -> Student:
        """A student by name, in the precision of the training."""
        student = self.students[name]
        student.autocast = self.autocast
        return student

    def _fused(
        self, batch: AnyBatch, outputs: Mapping[str, Output], given: Mapping[str, SparseTargets],
        items: int | Tensor, scheduled: Mapping[str, Any],
    ) -> dict[str, KDLoss]:  # fmt: skip
        """With LM heads of one matrix: their logits serve targets and losses at once."""
        assert isinstance(self.objective, TokenKD)
        index, exchange = batch.targets.index, self.live
        assert index is not None
        topk = exchange.drawn_anew()
        hidden = [output for output in outputs.values() if isinstance(output, Hidden)]
        found = linear_kd_losses(
            [one.states.flatten(0, -2) for one in hidden],
            [one.lm_head for one in hidden if isinstance(one.lm_head, LMHead)],
            batch.labels.flatten(),
            index,
            lambda at, own: exchange.pick(at, own, given),
            topk=[topk if exchange.makes_targets(name) else None for name in outputs],
            config=replace(self.objective.config, **scheduled),
            num_items=items,
            positions=row_numbers(batch),
            chunk_tokens=self._chunk(batch),
        )
        return dict(zip(outputs, found, strict=True))

    def _apart(
        self, batch: AnyBatch, outputs: Mapping[str, Output], given: Mapping[str, SparseTargets],
        items: int | Tensor, scheduled: Mapping[str, Any],
    ) -> dict[str, KDLoss]:  # fmt: skip
        """With students that return logits, and for other LM heads: targets first, then losses."""
        exchange, count = self.live, batch.count
        own = [
            exchange.targets_of(batch, output, self.vocab_size) if exchange.makes_targets(name) else None
            for name, output in outputs.items()
        ]
        chunk = self._chunk(batch) or max(count, 1)  # what is exchanged at once is the same on all processes
        stretches = [slice(first, min(first + chunk, count)) for first in range(0, count, chunk)]
        parts = [exchange.pick(at, [one and one[at] for one in own], given) for at in stretches]
        found = {}
        for number, (name, output) in enumerate(outputs.items()):
            sources = [SparseTargets.cat(column) for column in zip(*(part[number] for part in parts), strict=True)]
            each = [self._loss(batch, output, one, items, scheduled) for one in sources]
            if not each:  # of labels alone
                alone = {**scheduled, "alpha": 1.0, "temperature": 1.0}
                none = SparseTargets.empty(count, 0, vocab_size=self.vocab_size, device=batch.device)
                each = [self._loss(batch, output, none, items, alone)]
            found[name] = KDLoss(*(torch.stack(part).mean() for part in zip(*each, strict=True)))
        return found

    def _loss(
        self, batch: AnyBatch, output: Output, targets: SparseTargets, items: int | Tensor, scheduled: Mapping[str, Any]
    ) -> KDLoss:
        answered = replace(batch, targets=replace(targets, index=batch.targets.index))
        return KDLoss(**self.objective.losses(answered, {"output": output}, num_items=items, **scheduled))

    def _chunk(self, batch: AnyBatch) -> int | None:
        """Rows at a time, where processes exchange them: the same on all, whatever their students are."""
        if not self.live.one_each:
            return None
        return default_chunk(batch.device, self.vocab_size, 4, rows=batch.count)


class PeerView(nn.Module):
    """One of the students, to be evaluated: FSDP2 gathers its parameters in the methods of `Peers`."""

    def __init__(self, peers: Peers, name: str) -> None:
        super().__init__()
        self.peers, self.name = peers, name
        self.objective, self.vocab_size = peers.objective, peers.vocab_size
        self.live = None

    def logits(self, batch: AnyBatch, rows: Tensor | None = None) -> Tensor:
        return self.peers.logits(batch, rows, self.peers.of(self.name).run)


def check_vocabularies(sizes: Mapping[str, int]) -> None:
    """Raise TrainError unless students have as many outcomes each."""
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{size} ({name})" for name, size in sizes.items())
        raise TrainError(
            f"students: got vocabularies of {listed} outcomes; expected one, as each learns from the others' "
            "distributions. Give them the same vocab_size and tokenizer."
        )


def _fusable(outputs: Any) -> bool:
    """Whether all have hidden states and an LM head of one matrix, of types whose gradients are made in the forward."""
    return all(
        isinstance(one, Hidden) and isinstance(one.lm_head, LMHead) and one.states.dtype != torch.float16
        for one in outputs
    )


def _not_run(model: Any, batch: Any) -> Output:
    raise TrainError("peers: got a call of all students as one model; expected one of its students.")
