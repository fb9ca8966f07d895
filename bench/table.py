"""Rows of figures beside their limits: printed as they come, and kept as a recording, which is one shape of JSON."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastkd.bench.hardware import hardware, named, versions
from fastkd.errors import ReportError
from fastkd.utils.timing import Figure


@dataclass(frozen=True)
class Row:
    """One figure: what (`name`) at which sizes (`case`).

    ratio: the median ratio over `over`, a run of the same process; value: the absolute figure in `unit`. Either may be
    None, and both are where a peer cannot run (`note` says why). p20 and p80 are of the ratio where there is one, else
    of the value. limit: "<= 1.10" or ">= 0.93", of the ratio or else the value, or "". better: "lower", "higher", or
    "" for what is not compared between recordings (times, rates). at: the sizes as numbers, for plots. line: whose it
    is in them.
    """

    name: str
    case: str
    ratio: float | None = None
    over: str = ""
    value: float | None = None
    unit: str = ""
    p20: float | None = None
    p80: float | None = None
    limit: str = ""
    better: str = ""
    note: str = ""
    line: str = ""
    at: Mapping[str, float] = field(default_factory=dict)

    @property
    def figure(self) -> float | None:
        """The ratio, or else the value."""
        return self.value if self.ratio is None else self.ratio

    @property
    def verdict(self) -> str:
        """ "ok" or "MISSED", or "" where there is no limit."""
        if not self.limit or self.figure is None:
            return ""
        sign, bound = self.limit.split()
        holds = self.figure <= float(bound) if sign == "<=" else self.figure >= float(bound)
        return "ok" if holds else "MISSED"


@dataclass(frozen=True)
class Recording:
    """A suite's rows. size: "small" or "full"."""

    suite: str
    size: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    rows: Sequence[Row]

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it: numbers to six figures, and of a row what is not empty."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"rows": [_row_json(row) for row in self.rows]}


def _row_json(row: Row) -> dict[str, Any]:
    found = {name: value for name, value in asdict(row).items() if value not in (None, "", {})}
    found = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in found.items()}
    return found | ({"verdict": row.verdict} if row.verdict else {})


class Table:
    """What a suite's cases write their rows to."""

    def __init__(self, device: str, suite: str = "", *, size: str = "full") -> None:
        self.device, self.suite, self.size = device, suite, size
        self.hardware, self.rows, self.case = hardware(device), list[Row](), ""
        self.limits: dict[str, float] = {}  # measured in this process, by unit
        self._begun = time.monotonic()
        print(f"{named(self.hardware)}; " + ", ".join(f"{k} {v}" for k, v in versions().items()), flush=True)

    def title(self, text: str) -> None:
        """The case of the rows that follow."""
        self.case = text
        print(f"\n{text}", flush=True)

    def ratio(
        self,
        name: str,
        found: Figure | float,
        over: str,
        limit: str = "",
        *,
        better: str = "lower",
        value: float | None = None,
        unit: str = "",
        **more: Any,
    ) -> None:
        """A ratio over another run of this process, and what it is in absolute figures."""
        self._add(name, found, ratio=True, over=over, limit=limit, better=better, value=value, unit=unit, **more)

    def value(self, name: str, found: Figure | float, unit: str, limit: str = "", **more: Any) -> None:
        """An absolute figure. better: where it is the same on every machine (bytes, errors), and can be compared."""
        self._add(name, found, ratio=False, unit=unit, limit=limit, **more)

    def absent(self, name: str, why: str, **more: Any) -> None:
        """A peer that does not run here."""
        self._keep(Row(name, self.case, note=why, **more))

    def _add(self, name: str, found: Figure | float, *, ratio: bool, **more: Any) -> None:
        middle, p20, p80 = found if isinstance(found, Figure) else (float(found), None, None)
        if not ratio:
            more["value"] = middle
        self._keep(Row(name, self.case, ratio=middle if ratio else None, p20=p20, p80=p80, **more))

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row, self.limits.get(row.unit)), flush=True)

    def recording(self) -> Recording:
        """All of it."""
        seconds = round(time.monotonic() - self._begun, 1)
        return Recording(self.suite, self.size, self.hardware, versions(), seconds, tuple(self.rows))

    def save(self, path: Path | str | None) -> None:
        """The rows and the hardware, as JSON; nowhere, where no path is given."""
        if path:
            save([self.recording()], Path(path))


def line(row: Row, bound: float | None = None) -> str:
    """A row as text. bound: what the machine could do at most, in the row's unit."""
    if row.figure is None:
        return f"  {row.name:<64} {'-':>9}  {row.note}"
    unit = "x" if row.ratio is not None else row.unit
    spread = f"{row.p20:.3f} to {row.p80:.3f}" if row.p20 is not None else ""
    words = [f"over {row.over}"] if row.over else []
    if row.ratio is not None and row.value is not None:
        words.append(f"{row.value:.4g} {row.unit}")
    if row.value is not None and bound and row.value != bound:
        words.append(f"{row.value / bound:.0%} of the limit")
    words += [row.note] if row.note else []
    limit = f"{row.limit} {row.verdict}" if row.limit else ""
    return f"  {row.name:<64} {row.figure:9.3f} {unit:<8} {spread:<16} {limit:<14} {', '.join(words)}".rstrip()


def save(recordings: Sequence[Recording], path: Path) -> None:
    """Recordings as a file: a list, always."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for recording in recordings:  # a row a line, so that two files can be compared by eye
        found = recording.to_json()
        rows = ",\n  ".join(json.dumps(row) for row in found.pop("rows"))
        parts.append(f'{json.dumps(found)[:-1]}, "rows": [\n  {rows}\n]}}')
    path.write_text("[" + ",\n".join(parts) + "]\n")


def load(path: Path) -> list[Recording]:
    """What `save` wrote. Raises ReportError where it is something else."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, list):
            raise TypeError("not a list")
        return [_recording(one) for one in found]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ReportError(
            f"{path}: not recordings ({type(error).__name__}: {error}). `fastkd bench --json FILE` writes one."
        ) from error


def _recording(found: Mapping[str, Any]) -> Recording:
    known = {f.name for f in fields(Row)}
    rows = tuple(Row(**{name: value for name, value in row.items() if name in known}) for row in found["rows"])
    return Recording(**{**{f.name: found[f.name] for f in fields(Recording)}, "rows": rows})
