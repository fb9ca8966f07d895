"""What a capture will take, before it is begun: its plan, and a measured slice of it, extrapolated."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ...data.describe import describe_documents
from ...data.documents import Documents
from ...data.examples import Examples
from ...errors import DataError
from ...settings import CaptureSettings
from ...teachers.protocol import Teacher
from ..answers import topk_config
from ..prepare import prepare
from .choices import Choice, choices
from .costs import Clock, host_bytes, objects, other_bytes, requests
from .measure import run_slice
from .scaling import Scale, readers, scales
from .sizes import joined_said, measure_sizes

_Z = 2.0  # standard errors either side


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found.

    understood: what the data were taken for, a line each; see `understood`.
    plan: see `Plan.totals`. measured: of the slice: batches, positions, seconds, shards, batches_halved; and
        seconds_asked, seconds_spent (with warm-up, and with other settings).
    positions_per_second: of one worker on this device, all stages together; low and high: two standard errors of the
        mean over batches; None of fewer than five. slowest_batch, fastest_batch: of teacher and top-k alone.
    seconds_per_position: "run" (teacher, top-k, copies), "topk" (head and top-k: a part of that), "encode" and
        "decode" (a core's).
    bytes: of the shards, and bytes_per_position; by_array: bytes a position. once_a_shard: bytes of a shard, whatever
        its positions. other_bytes: of all other objects.
    objects: in the store when all is done. requests: PUT, GET and LIST of "capture" (sealing included), of "seal"
        alone, and of an "epoch" of reading.
    hours: by the clock, with so many workers, with hours_low and hours_high; worker_hours: of all of them together.
    cost: of these, at price_per_hour.
    host_bytes: of a worker beside its teacher and its data, at most, by shapes. device_bytes: in use on the device with
        the teacher, at most, measured; None on a CPU.
    choices: what other settings would cost. scales: what other amounts of data would.
    readers: cores that decode for so many GPUs, each training a student at student_rate positions a second.
    """

    teacher: str
    device: str
    settings: dict[str, Any]
    understood: list[str]
    plan: dict[str, int]
    measured: dict[str, Any]
    positions_per_second: float
    low: float | None
    high: float | None
    slowest_batch: float
    fastest_batch: float
    seconds_per_position: dict[str, float | None]
    bytes: float
    bytes_per_position: float
    by_array: dict[str, float]
    once_a_shard: float
    other_bytes: float
    objects: int
    requests: dict[str, dict[str, int]]
    workers: int
    hours: float
    hours_low: float | None
    hours_high: float | None
    worker_hours: float
    price_per_hour: float | None
    cost: float | None
    host_bytes: int
    device_bytes: int | None
    choices: list[Choice]
    scales: list[Scale]
    student_rate: float
    readers: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        """The estimate, for a machine."""
        return asdict(self)


def estimate(
    teacher: Teacher,
    data: Documents | Examples,
    settings: CaptureSettings,
    *,
    seconds: float = 20.0,
    price_per_hour: float | None = None,
    workers: int = 1,
    others: bool = True,
    student_rate: float = 100_000.0,
    batches: int = 1,
    progress: bool = False,
) -> Estimate:
    """What a capture of these settings will take: the data are measured and planned, and a slice is run.

    seconds: how long is measured, about, a warm-up included. others: whether the top-k of some of the slice's rows is
        repeated for other settings, without the teacher: in half of the time. batches: run at least so many, however
        long they take.
    price_per_hour: of one worker's machine. workers: of the same kind, each with shards of its own.
    student_rate: positions a second at which one GPU will train a student: what readers are reckoned for.
    progress: bars on stderr.

    Raises what `capture` would: DataError, TeacherError, CacheError for settings that no cache can have.
    """
    numbers: dict[str, tuple[float | None, int]] = {
        "workers": (workers, 1),
        "batches": (batches, 1),
        "seconds": (seconds, 0),
        "price_per_hour": (price_per_hour, 0),
        "student_rate": (student_rate, 0),
    }
    for name, (value, least) in numbers.items():
        if value is not None and not least <= value < math.inf:
            raise DataError(f"{name}: got {value}; expected a number from {least} on.")
    prepared = prepare(teacher, data, settings, progress=progress)
    plan, spec = prepared.plan, prepared.spec
    begun = time.perf_counter()
    part = seconds / 2 if others else seconds
    found = run_slice(teacher, data, plan, topk_config(settings), seconds=part, least=batches, progress=progress)
    context = plan.settings.context if plan.settings.packing == "pack" else None
    shard_rows = np.diff(plan.shard_rows)
    sizes = measure_sizes(spec, joined_said(found.said), float(shard_rows.mean()), context)
    run = found.seconds / found.positions
    clock = Clock(plan, workers, price_per_hour, teacher.device)
    of_all = sizes.of(shard_rows)
    total, n = sum(of_all.values()), plan.totals["positions"]
    each = clock.position(run, sizes.seconds)
    error = _relative_error(found.parts)
    hours = clock.hours(each)
    found_so = []
    if others:
        left = max(seconds - (time.perf_counter() - begun), 0.0)
        found_so = choices(teacher, spec, settings, found, plan, of_all, (run, sizes.seconds), clock, left, progress)
    spent = time.perf_counter() - begun
    rates = sorted(positions / busy for positions, busy in found.parts if busy > 0) or [0.0]
    return Estimate(
        teacher=teacher.fingerprint,
        device=torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else teacher.device.type,
        settings={
            **asdict(settings),
            "context": plan.settings.context,
            "shard_positions": plan.settings.shard_positions,
        },
        understood=describe_documents(data, plan.lengths) if isinstance(data, Documents) else [],
        plan=plan.totals,
        measured={
            "batches": found.batches,
            "positions": found.positions,
            "seconds": found.seconds,
            "shards": found.shards,
            "batches_halved": found.halved,
            "seconds_asked": seconds,
            "seconds_spent": spent,
        },
        positions_per_second=1 / each,
        low=None if error is None else 1 / each / (1 + _Z * error),
        high=None if error is None else 1 / each / max(1 - _Z * error, 0.1),
        slowest_batch=rates[0],
        fastest_batch=rates[-1],
        seconds_per_position={
            "run": run,
            "topk": next((c.topk_seconds for c in found_so if c.asked), None),
            "encode": sizes.seconds,
            "decode": sizes.decode,
        },
        bytes=total,
        bytes_per_position=total / n,
        by_array={name: size / n for name, size in sorted(of_all.items(), key=lambda item: -item[1])},
        once_a_shard=sizes.once_a_shard,
        other_bytes=other_bytes(plan, spec),
        objects=objects(plan.shards, workers, hours),
        requests=requests(plan.shards, workers, hours),
        workers=workers,
        hours=hours,
        hours_low=None if error is None else hours * max(1 - _Z * error, 0.1),
        hours_high=None if error is None else hours * (1 + _Z * error),
        worker_hours=hours * workers,
        price_per_hour=price_per_hour,
        cost=clock.cost(each),
        host_bytes=host_bytes(spec, plan),
        device_bytes=found.device_peak,
        choices=found_so,
        scales=scales(sizes, each, price_per_hour),
        student_rate=student_rate,
        readers=readers(student_rate, sizes.decode),
    )


def _relative_error(parts: list[tuple[int, float]]) -> float | None:
    """The standard error of the mean seconds a position over these batches, as a part of it; None of fewer than five,
    which would mean nothing."""
    positions, seconds = np.array(parts, np.float64).T
    if len(positions) < 5 or not seconds.sum():
        return None
    each = seconds.sum() / positions.sum()
    rest = seconds - each * positions
    error = math.sqrt(float(rest @ rest) / (len(rest) - 1) / len(rest)) / positions.mean()
    return float(error / each)
