"""Live sources and what they must equal: the targets that a capture makes, before the codec, and its cached batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capture_cases import Layered, documents
from numpy.typing import NDArray
from vision_cases import Net, examples

import fastkd
from fastkd.capture.rows import read_shard_rows
from fastkd.capture.teacher_pass import TeacherPass
from fastkd.data.documents import open_documents
from fastkd.data.examples import Examples
from fastkd.live import LiveSource
from fastkd.settings import CaptureSettings
from fastkd.stream import CachedSource
from fastkd.teachers.module import ModuleTeacher

TEXT = CaptureSettings(k=5, draws=3, context=16, shard_positions=64, batch_tokens=40, held_out=0.2)
IMAGES = CaptureSettings(k=4, draws=2, shard_positions=16, batch_tokens=10, held_out=0.2)


def text_teacher(**changes: Any) -> ModuleTeacher:
    return ModuleTeacher(Layered(**changes), probe=torch.zeros((1, 1), dtype=torch.int64))


def image_teacher() -> ModuleTeacher:
    return ModuleTeacher(Net(seed=7), probe=examples().first())


def text_data() -> Any:
    return open_documents(documents())


def both(
    out: Path, data: Any, teacher: Any, settings: CaptureSettings, **options: Any
) -> tuple[LiveSource, CachedSource]:
    """A live source, and the source of a cache that is captured with the same settings."""
    fastkd.capture(teacher, data, out, settings)
    more = {"data": data} if isinstance(data, Examples) else {}
    return LiveSource(data, teacher, settings, **options), CachedSource(out, **more, **options)


def uncoded(source: LiveSource, teacher: Any) -> dict[int, dict[str, NDArray[Any]]]:
    """What a capture makes of each row that counts, before the codec, by the row's number."""
    plan, found = source.plan, {}
    for shard in range(plan.shards):
        rows = read_shard_rows(plan, source._origin.data, shard)
        arrays, _ = TeacherPass(teacher, source.capture).run(rows, plan.batches(shard), source._origin.data, shard)
        counted = np.flatnonzero(rows.counts)
        for row, number in zip(counted.tolist(), rows.row_numbers(counted).tolist(), strict=True):
            found[number] = {name: column[row] for name, column in arrays.items()}
    return found


def inputs_of(batch: Any) -> list[torch.Tensor]:
    """All tensors of a micro-batch but targets and signals, and the index of its targets."""
    own = replace(batch, signals={}).tensors()
    return [*own[: -len(batch.targets.tensors())], batch.targets.index]


def same_steps(live: LiveSource, cached: CachedSource, count: int) -> list[tuple[Any, Any]]:
    """The micro-batches of both, after checking that they differ in targets and signals alone."""
    pairs = []
    for _, ours, theirs in zip(range(count), live.steps(), cached.steps(), strict=False):
        for name in ("count", "positions", "sequences", "epoch", "number"):
            assert getattr(ours, name) == getattr(theirs, name)
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            for x, y in zip(inputs_of(a), inputs_of(b), strict=True):
                assert torch.equal(x, y)
            assert a.counts["targets"] == b.counts["targets"]
            pairs.append((a, b))
    live.close()
    cached.close()
    return pairs
