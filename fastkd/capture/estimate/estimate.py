"""What a capture will take, before it runs: its plan, and a measured sample of it, extrapolated."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...data.describe import describe_documents
from ...data.documents import Documents
from ...data.examples import Examples
from ...errors import DataError
from ...settings import CaptureSettings
from ...teachers.protocol import Teacher
from ..prepare import prepare
from ..teacher_pass import device_name
from .costs import capture_hours, host_bytes, objects, other_bytes, position_seconds, requests
from .k_table import KCost, KTable
from .measure import CapturedRows, run_sample
from .sizes import measure_sizes


@dataclass(frozen=True)
class Estimate:
    """What a capture is estimated to take; made by `estimate`.

    data: number and lengths of the documents, a line each; see `describe_documents`. plan: see `WindowPlan.totals`.
    measured: of the sample: batches, positions, seconds, shards, batches_halved; seconds_requested and seconds_spent
        (warm-up included).
    positions_per_second: of one worker on this device. seconds_per_position: "run" (teacher, top-k and copies to the
        host) and "encode" (on one core).
    bytes: of all shards; bytes_per_position; by_array: bytes a position. other_bytes: of all other objects. objects: in
        the store at the end. requests: PUT, GET and LIST of "capture" (sealing included) and an "epoch" of training.
    hours: until all workers are done; hours_low and hours_high: two standard errors of the mean over batches; None for
        fewer than five batches. worker_hours: of all workers together; cost: of these.
    host_bytes: memory of a worker beside its teacher and data, at most, from shapes. device_bytes: peak memory on the
        device, teacher included, measured; None on a CPU.
    by_k: size and kept probability for other k.
    """

    teacher: str
    device: str
    settings: dict[str, Any]
    data: list[str]
    plan: dict[str, int]
    measured: dict[str, Any]
    positions_per_second: float
    seconds_per_position: dict[str, float]
    bytes: float
    bytes_per_position: float
    by_array: dict[str, float]
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
    by_k: list[KCost]

    def to_json(self) -> dict[str, Any]:
        """The estimate as a JSON object."""
        return asdict(self)


def estimate(
    teacher: Teacher,
    data: Documents | Examples,
    settings: CaptureSettings,
    *,
    seconds: float = 20.0,
    price_per_hour: float | None = None,
    workers: int = 1,
    min_batches: int = 1,
    progress: bool = False,
) -> Estimate:
    """Estimate what a capture with these settings will take: measure and plan the data, and run a sample.

    seconds: how long to run the sample, approximately, warm-up included. min_batches: batches to run however long they
        take. price_per_hour: of one worker's machine. workers: number of equal workers. progress: bars on stderr.

    Nothing is written. Raises what `capture` would: DataError, TeacherError, CacheError for impossible settings.
    """
    numbers: dict[str, tuple[float | None, int]] = {
        "workers": (workers, 1),
        "min_batches": (min_batches, 1),
        "seconds": (seconds, 0),
        "price_per_hour": (price_per_hour, 0),
    }
    for name, (value, least) in numbers.items():
        if value is not None and not least <= value < math.inf:
            raise DataError(f"{name}: got {value}; expected a number from {least} on.")
    prepared = prepare(teacher, data, settings, progress=progress)
    plan, spec = prepared.plan, prepared.spec
    begun = time.perf_counter()
    k_table = KTable(spec, settings)
    sample = run_sample(
        teacher,
        data,
        plan,
        settings,
        seconds=seconds,
        min_batches=min_batches,
        on_answer=k_table.add,
        progress=progress,
    )
    spent = time.perf_counter() - begun
    captured = CapturedRows.cat(sample.captured)
    shard_rows = np.diff(plan.shard_rows)
    context = plan.settings.context if plan.settings.packing == "pack" else None
    sizes = measure_sizes(spec, captured, float(shard_rows.mean()), context)
    by_array = sizes.of(shard_rows)
    size, positions = sum(by_array.values()), plan.totals["positions"]
    run = sample.seconds / sample.positions
    each = position_seconds(run, sizes.seconds, teacher.device)
    hours = capture_hours(plan, workers, each)
    error = _relative_error(sample.parts)
    return Estimate(
        teacher=teacher.fingerprint,
        device=device_name(teacher.device),
        settings={
            **asdict(settings),
            "context": plan.settings.context,
            "shard_positions": plan.settings.shard_positions,
        },
        data=describe_documents(data, plan.lengths) if isinstance(data, Documents) else [],
        plan=plan.totals,
        measured={
            "batches": sample.batches,
            "positions": sample.positions,
            "seconds": sample.seconds,
            "shards": sample.shards,
            "batches_halved": sample.halved,
            "seconds_requested": seconds,
            "seconds_spent": spent,
        },
        positions_per_second=1 / each,
        seconds_per_position={"run": run, "encode": sizes.seconds},
        bytes=size,
        bytes_per_position=size / positions,
        by_array={name: n / positions for name, n in sorted(by_array.items(), key=lambda item: -item[1])},
        other_bytes=other_bytes(plan, spec),
        objects=objects(plan.shards, workers, hours),
        requests=requests(plan.shards, workers, hours),
        workers=workers,
        hours=hours,
        hours_low=None if error is None else hours * max(1 - 2 * error, 0.1),
        hours_high=None if error is None else hours * (1 + 2 * error),
        worker_hours=hours * workers,
        price_per_hour=price_per_hour,
        cost=None if price_per_hour is None else price_per_hour * workers * hours,
        host_bytes=host_bytes(spec, plan),
        device_bytes=sample.device_peak,
        by_k=k_table.rows(by_array, positions, float(shard_rows.mean()) * sample.counted / sample.positions),
    )


def _relative_error(parts: list[tuple[int, float]]) -> float | None:
    """The standard error of the mean seconds a position over batches, relative to it; None for fewer than five."""
    positions, seconds = np.array(parts, np.float64).T
    if len(positions) < 5 or not seconds.sum():
        return None
    each = seconds.sum() / positions.sum()
    rest = seconds - each * positions
    error = math.sqrt(float(rest @ rest) / (len(rest) - 1) / len(rest)) / positions.mean()
    return float(error / each)
