"""From an answer for a micro-batch to the micro-batch with targets: as a capture makes them, without the codec."""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cache.errors import said
from ..capture.answers import targets_of, topk_config
from ..errors import StreamError, TeacherError
from ..kernels import KDError, SparseTargets
from ..stream.batch import AnyBatch
from ..stream.rows import NUMBERS
from ..teachers.protocol import Answer

Batch = TypeVar("Batch", bound=AnyBatch)


@torch.no_grad()
def answer(batch: Batch, answer: Answer, config: Any) -> Batch:
    """A micro-batch with the targets of an answer, made on its device without waiting for it.

    batch: unanswered, or to be answered anew: its `targets.index` says which positions count, `rows/numbers` which rows
        of the dataset they are, which seeds their draws: so the same model draws the same entries in a capture.
    answer: of a teacher (or of a student) for all positions of the micro-batch: `Hidden` or `Logits` of its shape
        (`[B, L]`, `[1, n]` if packed; `[B]` for examples), or `TopK`. It is detached.
    config: a `CaptureSettings`, or an object with its fields k, draws, draw_temperature, mass, temperatures and seed.

    Raises StreamError for a micro-batch without row numbers; TeacherError if the answer has another shape, and on a CPU
    for a row that is no distribution, naming document and position (on a GPU its targets are NaN).
    """
    index: Any = batch.targets.index
    targets = targets_at(batch, answer, config, index, numbers_of(batch), batch.labels.shape)
    return replace(batch, targets=targets)


def targets_at(
    batch: AnyBatch, answer: Answer, config: Any, flat_M: Tensor, numbers_M: Tensor, shape: torch.Size
) -> SparseTargets:
    """The targets of some rows of an answer for a micro-batch or a part of it. flat_M: int64 `[m]`, indices of the rows
    in the flattened answer, which become the targets' index. numbers_M: `[m]`. shape: of the answer's rows."""
    vocab_size = batch.targets.vocab_size
    if not len(flat_M):
        return no_targets(batch, config, flat_M)
    try:
        targets = targets_of(answer, flat_M, numbers_M, config, shape, vocab_size)
    except KDError as error:
        if error.row is None:
            raise TeacherError(f"teacher: no targets can be made of its answer ({error}).") from error
        number = int(numbers_M[error.row])
        raise TeacherError(
            f"document {number >> 31}, position {number & (2**31 - 1)}: the teacher failed there: {said(error)}. Try a "
            "wider dtype (float16 overflows where bfloat16 and float32 do not), or leave the document out."
        ) from error
    return replace(targets, index=flat_M)


def no_targets(batch: AnyBatch, config: Any, index_0: Tensor) -> SparseTargets:
    """Targets of no rows, as wide as those of others."""
    made, vocab_size = topk_config(config), batch.targets.vocab_size
    none = SparseTargets.empty(
        0,
        made.width(vocab_size),
        vocab_size=vocab_size,
        temperatures=made.temperatures,
        draws=made.draws > 0,
        draw_temperature=made.draw_temperature,
        device=batch.device,
    )
    return replace(none, index=index_0)


def numbers_of(batch: AnyBatch) -> Tensor:
    """The numbers of the rows that count, `[m]`. StreamError if the micro-batch lacks them."""
    if (rows := batch.signals.get(NUMBERS)) is None:
        raise StreamError(
            f"{type(batch).__name__}: got no row numbers ({NUMBERS}), which seed draws; expected a micro-batch of a "
            "LiveSource. A cache already has targets."
        )
    numbers: Tensor = rows.numbers
    return numbers
