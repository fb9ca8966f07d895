"""What an export and a report on several return: their numbers, as JSON and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluate.measures import MEASURES
from ..utils.intervals import NO_INTERVAL, Interval, to_json
from ..utils.numbers import difference_text, size_text
from ..utils.text import format_table
from .measure import Measured
from .quality import AGREEMENT, Quality, kl_of

SHOWN = ("agreement", AGREEMENT, "cross_entropy")
"""Measures of a table, after the KL divergence."""


@dataclass(frozen=True, eq=False)
class ExportReport:
    """What `fastkd.deploy.export` wrote. bytes: of the format's files. student_bytes: of the student's weights.
    quality: None without a cache. notes: of the format, a line each."""

    out: str
    to: str
    quantize: str
    bytes: int
    student_bytes: int
    seconds: float
    runtime: str = ""
    quality: Quality | None = None
    at_most: float | None = None
    notes: Sequence[str] = ()

    @property
    def above(self) -> bool:
        """Whether it costs more than `at_most`."""
        return self.quality is not None and self.quality.above(self.at_most)

    @property
    def status(self) -> int:
        """Exit status: 1 if it costs more than `at_most`."""
        return int(self.above)

    def to_json(self) -> dict[str, Any]:
        names = ("out", "to", "quantize", "bytes", "student_bytes", "seconds", "runtime", "at_most")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return found | {
            "ratio": self.bytes / self.student_bytes,
            "quality": None if self.quality is None else quality_json(self.quality),
            "status": self.status,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        named = self.to if self.quantize == "none" else f"{self.to}, {self.quantize}"
        ratio = self.bytes / self.student_bytes
        lines = [
            f"{self.out}: {named}, {size_text(self.bytes)}, {ratio:.2f} of the student's weights, "
            f"in {self.seconds:.0f} s",
            *(f"note: {note}" for note in self.notes),
        ]
        if self.quality is not None:
            lines += quality_lines(self.quality, self.runtime)
        if self.above:
            lines.append(above_text(self.out, self.quality, self.at_most))
        return "\n".join(lines)


def above_text(name: str, found: Quality | None, at_most: float | None) -> str:
    """One sentence for an export that costs too much."""
    assert found is not None
    return (
        f"{name}: its KL to the teacher is {found.cost.mean:.4f} nats higher than the unquantised student's; expected "
        f"at most {at_most:g}."
    )


def quality_json(found: Quality) -> dict[str, Any]:
    def values(some: Mapping[str, Interval]) -> dict[str, Any]:
        return {name: to_json(one) for name, one in some.items()}

    return {
        "measure": found.measure,
        "cost": to_json(found.cost),
        "windows": found.exported.windows,
        "positions": found.exported.count,
        "student": values(found.student.intervals()),
        "exported": values(found.exported.intervals()),
        "difference": values(found.differences),
    }


def quality_lines(found: Quality, runtime: str) -> list[str]:
    """The measures of a student and its export in a table, and their differences."""
    student, exported = found.student.intervals(), found.exported.intervals()
    differences = found.differences
    rows = [["", "student", "exported", "difference"]]
    for name in (found.measure, *SHOWN):
        if name not in exported:
            continue
        scale = MEASURES[name].scale
        cells = [f"{some[name].mean * scale:.4f}" if name in some else "" for some in (student, exported)]
        told = difference_text(*(x * scale for x in differences[name])) if name in differences else ""
        rows.append([f"{MEASURES[name].label} ({MEASURES[name].unit})", *cells, told])
    words = found.exported.words
    where = f"{words.counted(found.exported.count, found.exported.windows, before='held-out')}, in {runtime}"
    how = "95% intervals" if found.cost.known else NO_INTERVAL
    return [*format_table(rows), f"{where}; {how}, paired by {words.window} with the student in PyTorch"]


@dataclass(frozen=True, eq=False)
class DeployRow:
    """The student in PyTorch, or an export. folder: where it is. bytes: of its weights or files; ratio: to the
    student's. measured: its latency and memory. quality: None if it was not evaluated. above: whether it costs more
    than at_most."""

    name: str
    folder: str
    bytes: int
    ratio: float
    measured: Measured
    quality: Quality | None = None
    above: bool = False

    @property
    def intervals(self) -> dict[str, Interval]:
        """Its measures; of the student, those that all exports are compared with."""
        return {} if self.quality is None else self.quality.exported.intervals()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": self.folder,
            "bytes": self.bytes,
            "runtime": self.measured.runtime,
            "prefill_seconds": self.measured.prefill,
            "decode_seconds": self.measured.decode,
            "memory_bytes": self.measured.memory,
            "ratios": {"bytes": self.ratio, **self.measured.ratios},
            "quality": None if self.quality is None else quality_json(self.quality),
            "above": self.above,
        }


@dataclass(frozen=True, eq=False)
class DeployReport:
    """What `fastkd.deploy.deploy_report` found. rows: the student in PyTorch first. prompt: tokens of a prefill; 0 for
    a classifier. threads: of every runtime. turns: that latencies are medians over. page: the file."""

    student: str
    page: str
    rows: Sequence[DeployRow]
    prompt: int
    threads: int
    turns: int
    at_most: float | None = None
    notes: Sequence[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Exit status: 1 if an export costs more than at_most."""
        return int(any(row.above for row in self.rows))

    @property
    def measure(self) -> str | None:
        """The name of the KL divergence; None if nothing was evaluated."""
        found = next((row.quality for row in self.rows if row.quality is not None), None)
        return None if found is None else kl_of(found.student)

    def to_json(self) -> dict[str, Any]:
        names = ("student", "page", "prompt", "threads", "turns", "at_most", "status")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return found | {"notes": list(self.notes), "rows": [row.to_json() for row in self.rows]}


def report_lines(report: DeployReport) -> list[str]:
    """The rows in a table, each number with its ratio to the student's in PyTorch."""
    text = report.prompt > 0
    head = ["", "size", "ratio", f"prefill {report.prompt}" if text else "example", "ratio"]
    head += ["token", "ratio"] if text else []
    head += ["memory", "ratio"]
    shown = () if report.measure is None else (report.measure, *SHOWN)
    head += [MEASURES[name].short for name in shown]
    rows = [head]
    for row in report.rows:
        m = row.measured
        cells = [row.name, size_text(row.bytes), f"{row.ratio:.2f}", _ms(m.prefill), _ratio(m, "prefill")]
        cells += [_ms(m.decode), _ratio(m, "decode")] if text else []
        cells += ["" if m.memory is None else size_text(m.memory), _ratio(m, "memory")]
        cells += [_value(row, name) for name in shown]
        rows.append(cells)
    lines = [f"note: {note}" for note in report.notes] + format_table(rows)
    each = f"{report.threads} thread{'s' * (report.threads > 1)}, batch 1, each in a process of its own"
    lines.append(f"{each}; medians of {report.turns} turns; ratios to PyTorch's in the same turn")
    for row in report.rows[1:]:
        if row.quality is not None:
            why = "" if row.quality.cost.known else f" ({NO_INTERVAL})"
            cost = difference_text(*row.quality.cost)
            lines.append(f"{row.name}: KL to the teacher {cost} nats against the student{why}")
    lines += [above_text(row.name, row.quality, report.at_most) for row in report.rows if row.above]
    return [*lines, report.page]


def _value(row: DeployRow, name: str) -> str:
    found = row.intervals.get(name)
    return "" if found is None else f"{found.mean * MEASURES[name].scale:.{MEASURES[name].decimals}f}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3g} ms"


def _ratio(measured: Measured, name: str) -> str:
    return f"{measured.ratios[name]:.2f}" if name in measured.ratios else ""
