"""LiveSource: optimizer steps over documents or examples whose targets are made while a student trains."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Unpack

import numpy as np
import torch

from ..cache.stores import open_store
from ..cache.workspace import Workspace
from ..capture.features.prepare import Feature
from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import StreamError, TeacherError
from ..kernels import SparseTargets
from ..settings import CaptureSettings
from ..stream.batch import AnyBatch
from ..stream.cached import row_bytes
from ..stream.features import FeatureSignal
from ..stream.gather import BatchFormat, OpenShard, TextInputs, open_shard, shard_of
from ..stream.rows import NUMBERS
from ..stream.shard_source import ShardSource, SourceChanges, SourceOptions
from ..stream.signals import Signal, open_signals
from ..stream.split import ShardTable
from ..teachers.protocol import Answer, Teacher, for_targets
from .answer import no_targets, numbers_of, targets_at
from .features import LiveFeatureSignal, States
from .planned import PlannedShards, plan_shards
from .teacher_batches import FORWARDS, AnsweredBatches, Forward, inputs_of, lengths_of, with_forwards
from .write_through import Requests, WriteThrough

DEFAULTS = CaptureSettings()


class LiveSource(ShardSource):
    """Steps as a `CachedSource` of the cache that `fastkd.capture` with the same settings would write: the same
    sequences in the same order, divided in the same way.

    teacher given: the targets of a micro-batch are made on the device, when it is taken from `Step.micro_batches`, in
        the thread that takes it: as the capture makes them, with the same draws, without the codec.
    teacher None: micro-batches come unanswered. Their targets have an index and no entries, and the signal
        "rows/numbers" has what seeds draws; `fastkd.live.answer` makes targets of an answer.
    write_cache: a `WriteThrough`, or a folder, URL or `Store`, with a teacher: what is read is captured there first,
        unless it is there, and micro-batches are those of a `CachedSource`, bit for bit.

    data: `Documents` or `Examples` (labelled); or the `PlannedShards` of them, with this teacher and these settings.
    features: hidden states to make (and write) as well, from `prepare_features`; the micro-batches then have them as
        `features`.
    capture: how data are divided and targets are made; `capture.seed` is that of the draws and of the held-out split,
        `capture.batch_tokens` the positions of a teacher's forward, at most.
    vocab_size: without a teacher, that of whatever answers.
    options: as of `CachedSource`: batch_size or batch_tokens, micro_tokens, layout, seed, split, device and so on.

    `spec` is the `CacheSpec` that the capture would write. Raises StreamError, DataError and TeacherError.
    """

    def __init__(
        self,
        data: Documents | Examples | PlannedShards,
        teacher: Teacher | None,
        capture: CaptureSettings = DEFAULTS,
        *,
        vocab_size: int | None = None,
        write_cache: Any = None,
        features: Sequence[Feature] = (),
        **options: Unpack[SourceChanges],
    ) -> None:
        chosen = SourceOptions(**options)
        if write_cache is not None and teacher is None:
            raise StreamError("write_cache: got no teacher; expected one, whose targets are written.")
        if not isinstance(data, PlannedShards):
            data = plan_shards(data, teacher, capture, vocab_size=vocab_size)
        if teacher is not None and not _same_device(teacher.device, chosen.where):
            raise StreamError(
                f"teacher: got one on {teacher.device}; expected it on {chosen.where}, where the student is trained."
            )
        if write_cache is not None and not isinstance(write_cache, WriteThrough):
            assert teacher is not None
            store = open_store(write_cache, create=True)
            write_cache = WriteThrough.open(data, teacher, store, rank=chosen.rank, world_size=chosen.world_size)
            weakref.finalize(self, write_cache.close)
        self._origin, self.capture, self._written = data, data.settings, write_cache
        self._teacher = None if write_cache is not None or teacher is None else for_targets(teacher, data.settings)
        self._requests: Requests | None = None
        self._live_features: list[LiveFeatureSignal] = []
        self._bad: torch.Tensor | None = None  # on a GPU, whether any target was NaN
        self.plan, self.spec = data.plan, data.spec
        examples = data.data if isinstance(data.data, Examples) else None
        if examples is not None:
            _check_examples(examples, self.spec.vocab_size)
        table = data.table(chosen.split, skip=chosen.skip, max_positions=chosen.max_positions)
        written = write_cache is not None
        signals: list[Signal] = []
        if written:
            plan_rows = dict(enumerate(np.diff(self.plan.shard_rows).tolist()))
            cached = [write_cache.cache.features[one.name] for one in features]
            signals = [
                FeatureSignal(one.name, [there], [plan_rows], chosen.where)
                for one, there in zip(features, cached, strict=True)
            ]
        else:
            self._live_features = [LiveFeatureSignal(one) for one in features]
            signals = [*open_signals([NUMBERS], [table], chosen.where), *self._live_features]
        self._states = States(self._teacher, features)
        form = BatchFormat(
            layout=chosen.layout,
            tokens=chosen.micro_tokens,
            rows=chosen.micro_batch_size,
            micro_batches=chosen.micro_batches,
            spec=self.spec,
            width=self.spec.width if written else 0,
            draws=written and self.spec.draws > 0,
            device=chosen.where,
            data=examples,
            signals=tuple(signals),
            buckets=chosen.buckets,
        )
        described = {**data.describe(), "sequences": int(table.sequences.sum()), "content": table.content}
        super().__init__([table], [Fraction(1)], form, chosen, described)
        if examples is not None:
            self.fingerprint["labels"] = examples.labels_fingerprint()
        if features:
            self.fingerprint["features"] = {one.name: one.spec.hash for one in features}

    def _open(self, source: int, row: int, workspaces: list[Workspace]) -> OpenShard:
        index = int(self._tables[source].shard[row])
        if self._written is not None:
            assert self._requests is not None, "shards are opened by an iteration"
            self._requests.need(index)
            return open_shard(self._written.cache, index, workspaces, self._form.signals, source)
        return self._read(index, workspaces)

    def _open_inputs(self, source: int, row: int, workspaces: list[Workspace]) -> OpenShard:
        return self._read(int(self._tables[source].shard[row]), workspaces)

    def _read(self, index: int, workspaces: list[Workspace]) -> OpenShard:
        """A shard from the data, without targets."""
        rows = self._origin.read(index)
        arrays = {
            **rows.inputs,
            "sequence_lengths": rows.sequence_lengths,
            "document_lengths": rows.document_lengths,
            "row_numbers": rows.row_numbers(np.arange(len(rows))),
        }
        signals = self._form.signals[:1] if self._written is None else ()
        opened = shard_of(arrays, rows.counts, index, workspaces[: 1 + len(signals)], signals)
        masks = (one.mask(rows) for one in self._live_features)
        return replace(opened, signals=(*opened.signals, *masks), workspaces=workspaces)

    def _helper(self, wake: Callable[[], None]) -> Requests | None:
        self._requests = None
        if self._written is not None:
            self._requests = self._written.requests(wake, may_stop=self.fingerprint["split"] == "train")
        return self._requests

    def _assembled(self, batches: Sequence[AnyBatch]) -> Sequence[AnyBatch]:
        if self._teacher is None or self._reads_late:
            return batches
        return self._with_forwards(batches)

    def _handed_out(self, batches: Sequence[AnyBatch]) -> Sequence[AnyBatch]:
        if self._teacher is None:
            return batches
        if self._reads_late:
            on_host = self._with_forwards([batch.to("cpu") for batch in batches])
            batches = [batch.to(self._form.device) for batch in on_host]
        return AnsweredBatches(batches, self._answered)

    @property
    def _reads_late(self) -> bool:
        """Whether inputs are read when a step is handed out; see `ExampleBatch.unread`."""
        return self._form.data is not None and self._form.data.draws

    def _with_forwards(self, batches: Sequence[AnyBatch]) -> list[AnyBatch]:
        every = bool(self._live_features)
        return [
            with_forwards(batch, self.capture.batch_tokens, all_rows=every) if batch.positions else batch
            for batch in batches
        ]

    def text_inputs(self, source: int, row: int) -> tuple[TextInputs, int, int]:
        # from the data: no shard is captured for it
        table = self._tables[source]
        opened = self._read(int(table.shard[row]), [Workspace()] * 2)
        return opened.inputs, int(table.shard[row]), int(table.first[row])

    def _shard_bytes(self, table: ShardTable) -> int:
        # otherwise tokens, labels, mask, document
        return (32 if self._written is None else row_bytes(self.spec)) * int(table.positions.max())

    def _answered(self, batch: AnyBatch) -> AnyBatch:
        """A micro-batch with the teacher's targets. It is called on its device; nothing waits for it there."""
        numbers_M, index_M = numbers_of(batch), batch.targets.index
        assert index_M is not None
        signals = dict(batch.signals)
        forwards = signals.pop(FORWARDS, None)
        shape = batch.labels.shape
        with torch.no_grad(), self._states.recording():
            if not batch.positions or not (batch.count or self._live_features):  # nothing to answer
                targets, values = no_targets(batch, self.capture, index_M), {}
            elif forwards is None:
                answer = self._call(inputs_of(batch), batch)
                targets = targets_at(batch, answer, self.capture, index_M, numbers_M, shape)
                values = self._states.take(shape)
            else:
                parts, values = [], {}
                for one in forwards.parts:
                    part_shape = one.inputs.shape[: len(shape)]
                    answer = self._call(one.inputs, one)
                    parts.append(targets_at(batch, answer, self.capture, one.flat, numbers_M[one.rows], part_shape))
                    for name, value in self._states.take(part_shape).items():
                        rows = value.flatten(0, len(shape) - 1)
                        if name not in values:
                            values[name] = rows.new_zeros(shape.numel(), *rows.shape[1:])
                        values[name][one.here] = rows[one.there]
                targets = replace(SparseTargets.cat(parts).take(forwards.order), index=index_M)
            signals |= self._features_of(batch, values)
            if targets.tail.is_cuda:  # on a CPU it is refused at once
                bad = targets.tail.isnan().any()
                self._bad = bad if self._bad is None else self._bad | bad
        return replace(batch, targets=targets, signals=signals)

    def failed(self) -> str:
        """What was wrong with the teacher's answers so far, as the end of a sentence; "" for nothing. It waits for the
        device."""
        if self._bad is None or not bool(self._bad):
            return ""
        return "the teacher's logits had NaN or infinity (try a wider --teacher-dtype)"

    def _features_of(self, batch: AnyBatch, values: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The features of a micro-batch. values: the teacher's tensors; none for one without positions."""
        if not self._live_features:
            return {}
        places = {one.name: batch.signals[one.name] for one in self._live_features}
        if not values:
            for one in self._live_features:
                place = one.feature.place
                values[place.name] = torch.zeros(
                    batch.labels.numel(), *place.shape, dtype=place.dtype, device=batch.device
                )
        return self._states.coded(values, places)

    def _call(self, inputs: torch.Tensor, of: AnyBatch | Forward) -> Answer:
        """The teacher's answer. of: the micro-batch, or the forward, that the inputs are of."""
        assert self._teacher is not None
        try:
            with torch.inference_mode():
                if (submit := getattr(self._teacher, "submit", None)) is not None and inputs.dim() == 2:
                    answer: Answer = submit(inputs.to(self._teacher.device), lengths_of(of)).result()
                    return answer
                return self._teacher(inputs.to(self._teacher.device, non_blocking=True))
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"teacher: a forward of {tuple(inputs.shape)} does not fit into the device's memory beside the "
                "student. Capture a cache first and train from it, or use a smaller teacher batch "
                "(--teacher-batch-tokens), smaller micro-batches (--micro-tokens) or another --teacher-dtype."
            ) from error


def _check_examples(data: Examples, vocab_size: int) -> None:
    if not data.labelled:
        raise StreamError("data: got no labels; expected Examples(..., labels=...).")
    if data.classes > vocab_size:
        raise StreamError(f"data: got a label {data.classes - 1}; expected classes from 0 to {vocab_size - 1}.")


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)
