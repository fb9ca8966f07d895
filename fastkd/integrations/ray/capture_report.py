"""What a capture by a cluster did, and which worker wrote what."""

from dataclasses import dataclass, field
from typing import Any

from ...capture.runner import capture_text
from ...capture.shard_runner import CaptureReport
from ...utils.numbers import size_text
from ...utils.text import format_table, printable


@dataclass
class WorkerReport:
    """What a worker wrote, in all its starts. hosts: where it ran. positions_lost: that its teacher ran, and it did not
    commit: of shards that it was at when it died, and of those that another worker had committed first."""

    worker: int
    starts: int = 0
    hosts: list[str] = field(default_factory=list)
    shards_written: int = 0
    positions_written: int = 0
    bytes_written: int = 0
    positions_lost: int = 0


@dataclass(frozen=True)
class RayCaptureReport(CaptureReport):
    """A `CaptureReport` of all workers together, in this call. workers: each one's part. teacher_busy: their mean, over
    the last minute. features: not accounted for."""

    workers: list[WorkerReport] = field(default_factory=list)

    @property
    def positions_lost(self) -> int:
        return sum(worker.positions_lost for worker in self.workers)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"positions_lost": self.positions_lost}


def ray_capture_text(report: RayCaptureReport) -> str:
    """What a capture did, what remains to be done, and who wrote what."""
    rows = [["worker", "shards", "positions", "bytes", "lost", "starts", "on"]]
    for one in report.workers:
        if one.starts:
            counts = (one.shards_written, one.positions_written)
            cells = [*(f"{count:,}" for count in counts), size_text(one.bytes_written), f"{one.positions_lost:,}"]
            rows.append([str(one.worker), *cells, str(one.starts), ", ".join(one.hosts)])
    lines = format_table(rows) if len(rows) > 1 else []
    return "\n".join([capture_text(report), *map(printable, lines)])
