"""A micro-batch of text as named tensors, for models and loops that pass keyword arguments, and back, exactly.

    input_ids, position_ids `[B, L]`   as of `MicroBatch`
    shift_labels `[B, L]`              its labels: what the logits at each position predict
    labels `[B, L]`                    the same in the convention of transformers: what is at each position, which the
                                       logits before it predict
    kd_ids, kd_logprobs, kd_tail, kd_outcomes, kd_draws, kd_index
                                       its targets; numbers in float32 as the int32 with the same bits, which no
                                       framework rounds to the type of its mixed precision
    kd_cu_seqlens, kd_sequences        the bounds of its segments, and their sequences
    kd_facts                           a `Facts`, which is on no device
    kd_signal:NAME                     a signal, such as "kd_signal:features/20"

Every value has `to(device)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..cache.errors import type_name
from ..errors import StreamError
from ..kernels import SparseTargets
from ..kernels.targets import FIELDS
from .batch import AnyBatch, MicroBatch
from .gather import IGNORED

PREFIX, FACTS, SIGNAL, ITEMS = "kd_", "kd_facts", "kd_signal:", "kd_num_items"


@dataclass(frozen=True)
class Facts:
    """What of a micro-batch is no tensor; see `MicroBatch` and `SparseTargets`. Reading it never waits for a device."""

    layout: str
    max_seqlen: int
    positions: int
    counts: tuple[tuple[str, int], ...]
    vocab_size: int
    temperatures: tuple[float, ...]
    draw_temperature: float

    @property
    def count(self) -> int | None:
        """Positions that count in the whole optimizer step, on all ranks; None of a micro-batch that is of no step."""
        return dict(self.counts).get("targets")

    def to(self, *arguments: Any, **named: Any) -> Self:
        """Itself, on every device."""
        return self

    pin_memory = to


def batch_to_tensors(batch: AnyBatch) -> dict[str, Any]:
    """A micro-batch as named tensors, which share its memory. Raises StreamError if it is not of text."""
    if not isinstance(batch, MicroBatch):
        raise StreamError(f"batch: got {type_name(batch)}; expected a MicroBatch, of a cache of text.")
    targets, ours = batch.targets, batch.labels
    labels = torch.full_like(ours, IGNORED)
    labels[:, 1:] = ours[:, :-1]
    assert targets.index is not None
    found: dict[str, Any] = {
        "input_ids": batch.input_ids, "labels": labels, "shift_labels": ours, "position_ids": batch.position_ids,
    }  # fmt: skip
    for field in FIELDS:
        if (value := getattr(targets, field.name)) is not None:
            found[PREFIX + field.name] = value.view(torch.int32) if value.dtype == torch.float32 else value
    facts = Facts(
        batch.layout, batch.max_seqlen, batch.positions, tuple(batch.counts.items()), targets.vocab_size,
        targets.temperatures, targets.draw_temperature,
    )  # fmt: skip
    found |= {"kd_index": targets.index, "kd_cu_seqlens": batch.cu_seqlens, "kd_sequences": batch.sequences}
    return {**found, FACTS: facts, **{SIGNAL + name: one for name, one in batch.signals.items()}}


def for_compiled(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a model that `torch.compile` compiles as a whole, so that it is not compiled anew for each batch:
    what changes from batch to batch is in tensors, whose dimensions are marked as dynamic. "kd_num_items" is the count
    of the whole step, if it is known.
    """
    import torch._dynamo

    facts, device = tensors[FACTS], tensors["input_ids"].device
    counts = tuple((name, count) for name, count in facts.counts if name != "targets")
    found = {**tensors, FACTS: replace(facts, max_seqlen=0, positions=0, counts=counts)}
    if facts.count is not None:
        found[ITEMS] = torch.full((), facts.count, dtype=torch.int64, device=device)
    by_position = ("input_ids", "labels", "shift_labels", "position_ids")
    for name, value in found.items():
        if isinstance(value, Tensor):
            for dimension in range(min(value.ndim, 2 if name in by_position else 1)):
                if value.shape[dimension] > 1:  # 0 and 1 are cases of their own
                    torch._dynamo.maybe_mark_dynamic(value, dimension)
    return found


def batch_of_tensors(tensors: Mapping[str, Any]) -> MicroBatch:
    """The micro-batch of which `batch_to_tensors` made these. Raises StreamError if some are missing."""
    needed = ("input_ids", "shift_labels", "position_ids", *(PREFIX + f.name for f in FIELDS if not f.optional),
              "kd_index", "kd_cu_seqlens", "kd_sequences", FACTS)  # fmt: skip
    if missing := [name for name in needed if name not in tensors]:
        raise StreamError(
            f"batch: got {', '.join(tensors)} without {', '.join(missing)}; expected what `batch_to_tensors` made. In "
            "a Trainer, use the collator of DistillDataset and DistillMixin."
        )
    facts: Facts = tensors[FACTS]

    def column(name: str, dtype: torch.dtype) -> Tensor | None:
        value: Tensor | None = tensors.get(PREFIX + name)
        as_bits = value is not None and dtype.is_floating_point and value.dtype == torch.int32
        return value.view(torch.float32) if value is not None and as_bits else value

    columns: dict[str, Any] = {field.name: column(field.name, field.dtype) for field in FIELDS}
    targets = SparseTargets(
        **columns, vocab_size=facts.vocab_size, temperatures=facts.temperatures,
        draw_temperature=facts.draw_temperature, index=tensors["kd_index"],
    )  # fmt: skip
    return MicroBatch(
        input_ids=tensors["input_ids"],
        labels=tensors["shift_labels"],
        position_ids=tensors["position_ids"],
        cu_seqlens=tensors["kd_cu_seqlens"],
        sequences=tensors["kd_sequences"],
        targets=targets,
        signals={name.removeprefix(SIGNAL): one for name, one in tensors.items() if name.startswith(SIGNAL)},
        counts=dict(facts.counts),
        max_seqlen=facts.max_seqlen,
        positions=facts.positions,
        layout=facts.layout,
    )
