"""Measured rows with their limits: printed at once, and collected in a recording that is stored as JSON."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastkd.bench.hardware import hardware, named, versions
from fastkd.bench.load import LoadMeter, load_text
from fastkd.bench.timing import Figure
from fastkd.errors import ReportError
from fastkd.utils.atomic import write_text


@dataclass(frozen=True)
class Row:
    """A measurement. name: what was measured. case: at which sizes.

    ratio: the median ratio to `over`, a run in the same process; value: the absolute value in `unit`. Either may be
    None; both are if a peer cannot run (`note` says why). p20, p80: percentiles of the ratio, or else of the value;
    value_p20, value_p80: of the value beside a ratio.
    limit: "<= 1.10" or ">= 0.93" for the ratio, or else the value; or "". better: "lower", "higher", or "" if it is not
    compared between recordings (times, rates). at: the sizes as numbers, for plots; line: its line in them.
    """

    name: str
    case: str = ""
    ratio: float | None = None
    over: str = ""
    value: float | None = None
    unit: str = ""
    p20: float | None = None
    p80: float | None = None
    value_p20: float | None = None
    value_p80: float | None = None
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
    def value_range(self) -> tuple[float, float] | None:
        """The 20th and the 80th percentile of the value; None if it was measured once."""
        low, high = (self.p20, self.p80) if self.ratio is None else (self.value_p20, self.value_p80)
        return None if low is None or high is None else (low, high)

    @property
    def verdict(self) -> str:
        """ "ok" or "MISSED"; "" without a limit."""
        if not self.limit or self.figure is None:
            return ""
        sign, bound = self.limit.split()
        holds = self.figure <= float(bound) if sign == "<=" else self.figure >= float(bound)
        return "ok" if holds else "MISSED"

    def details(self, bound: float | None = None) -> list[str]:
        """What the ratio is over, the absolute value, and the note. bound: the machine's limit, in the row's unit."""
        words = [f"over {self.over}"] if self.over else []
        if self.ratio is not None and self.value is not None:
            words.append(f"{self.value:.4g} {self.unit}")
        if self.value is not None and bound and self.value != bound:
            words.append(f"{self.value / bound:.0%} of the limit")
        return words + ([self.note] if self.note else [])

    def to_json(self) -> dict[str, Any]:
        """The fields that are not empty, numbers with six significant figures; and the verdict."""
        found = {name: value for name, value in asdict(self).items() if value not in (None, "", {})}
        found = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in found.items()}
        return found | ({"verdict": self.verdict} if self.verdict else {})


@dataclass(frozen=True)
class Recording:
    """The rows of a suite. size: "small" or "full". load: of the machine meanwhile (`bench.load`); empty if unknown."""

    suite: str
    size: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    rows: Sequence[Row]
    load: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self)} | {"rows": [row.to_json() for row in self.rows]}
        if not self.load:
            del found["load"]
        return found


class Table:
    """Collects and prints the rows of a suite. quiet: does not print the machine and the versions."""

    def __init__(self, device: str, suite: str = "", *, size: str = "full", quiet: bool = False) -> None:
        self.device, self.suite, self.size = device, suite, size
        self.hardware, self.rows, self.case = hardware(device), list[Row](), ""
        self.limits: dict[str, float] = {}  # measured in this process, by unit
        self._begun, self._meter = time.monotonic(), LoadMeter()
        if not quiet:
            print(f"{named(self.hardware)}; " + ", ".join(f"{k} {v}" for k, v in versions().items()), flush=True)

    def title(self, text: str, *says: str) -> None:
        """The case of the rows that follow. says: lines that are printed below it."""
        self.case = text
        print("\n  ".join((f"\n{text}", *says)), flush=True)

    def ratio(
        self,
        name: str,
        found: Figure | float,
        over: str,
        limit: str = "",
        *,
        better: str = "lower",
        value: Figure | float | None = None,
        unit: str = "",
        **more: Any,
    ) -> None:
        """Add a ratio to another run in this process, and its absolute value."""
        if isinstance(value, Figure):
            more |= {"value_p20": value.p20, "value_p80": value.p80}
            value = value.median
        self._add(name, found, ratio=True, over=over, limit=limit, better=better, value=value, unit=unit, **more)

    def value(self, name: str, found: Figure | float, unit: str, limit: str = "", **more: Any) -> None:
        """Add an absolute value. better: only if it is the same on every machine (bytes, errors)."""
        self._add(name, found, ratio=False, unit=unit, limit=limit, **more)

    def absent(self, name: str, why: str, **more: Any) -> None:
        """Add a peer that cannot run here."""
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
        """All rows, with hardware and versions."""
        seconds = round(time.monotonic() - self._begun, 1)
        return Recording(
            self.suite, self.size, self.hardware, versions(), seconds, tuple(self.rows), self._meter.load()
        )

    def say_load(self) -> None:
        """Print the load of the machine so far."""
        print(f"\n{load_text(self._meter.load())}", flush=True)

    def save(self, path: Path | str | None) -> None:
        """Write the recording as JSON, if a path is given."""
        if path:
            save([self.recording()], Path(path))


def line(row: Row, bound: float | None = None) -> str:
    """A row as text. bound: as in `Row.details`."""
    if row.figure is None:
        return f"  {row.name:<64} {'-':>9}  {row.note}"
    unit = "x" if row.ratio is not None else row.unit
    spread = f"{row.p20:.3f} to {row.p80:.3f}" if row.p20 is not None else ""
    limit = f"{row.limit} {row.verdict}" if row.limit else ""
    details = ", ".join(row.details(bound))
    return f"  {row.name:<64} {row.figure:9.3f} {unit:<8} {spread:<16} {limit:<14} {details}".rstrip()


def save(recordings: Sequence[Recording], path: Path) -> None:
    """Write recordings as a JSON list, a row per line, so that files can be compared by eye. An existing file is
    replaced at once: if the process is killed meanwhile, it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for recording in recordings:
        found = recording.to_json()
        rows = ",\n  ".join(json.dumps(row) for row in found.pop("rows"))
        parts.append(f'{json.dumps(found)[:-1]}, "rows": [\n  {rows}\n]}}')
    text = "[" + ",\n".join(parts) + "]\n"
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text)
    else:
        write_text(path.resolve(), text, sync=False)


def load(path: Path) -> list[Recording]:
    """Read what `save` wrote. Raises ReportError for anything else."""
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
    needed = {f.name: found[f.name] for f in fields(Recording) if f.name != "load"}
    return Recording(**{**needed, "rows": rows, "load": dict(found.get("load") or {})})
