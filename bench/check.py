"""Compares recordings: rows that changed by more than the noise. Only ratios and bytes, never absolute times.

The noise of a row is half the spread of its rounds (20th to 80th percentile), or half the difference between the
medians of several runs if that is more, added up over both sides; at least 2%.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd.bench.hardware import named
from fastkd.bench.table import Recording, Row, load
from fastkd.errors import NoSuite

FOLDER = Path(__file__).parent / "recorded"
NO_RECORDINGS = ("sass.json",)  # other files in it: see bench_sass.py
LEAST_NOISE = 0.02


@dataclass(frozen=True)
class Move:
    """A row that both sides have. change: new over old; noise: its relative tolerance. better: "lower" or "higher"."""

    suite: str
    case: str
    name: str
    old: float
    new: float
    change: float
    noise: float
    better: str

    @property
    def moved(self) -> bool:
        """Whether the change exceeds the noise."""
        if min(self.old, self.new) <= 0:
            return self.old != self.new
        return abs(math.log(self.change)) > self.noise

    @property
    def worse(self) -> bool:
        """Whether it moved in the wrong direction."""
        return self.moved and (self.new > self.old) == (self.better == "lower")


def compare(before: Sequence[Recording], after: Sequence[Recording]) -> list[Move]:
    """The rows with the same suite, size, case and name on both sides."""
    old, new = _rows(before), _rows(after)
    return [_move(key, old[key], new[key]) for key in old if key in new]


def unmatched(before: Sequence[Recording], after: Sequence[Recording]) -> list[str]:
    """Names of recorded rows that the same suite no longer measures."""
    new, suites = _rows(after), {(r.suite, r.size) for r in after}
    return [f"{key[2]}: {key[3]}" for key in _rows(before) if key not in new and key[:2] in suites]


def worse(moves: Sequence[Move]) -> bool:
    """Whether any of them is worse."""
    return any(move.worse for move in moves)


def bundled() -> list[Recording]:
    """The recordings in `recorded/`, of any hardware."""
    return [recording for file in recording_files() for recording in load(file)]


def of_same_hardware(found: Sequence[Recording], there: Sequence[Recording]) -> list[Recording]:
    """Those of `there` on the hardware of `found`. Raises NoSuite."""
    machines = [recording.hardware for recording in found]
    same = [recording for recording in there if recording.hardware in machines]
    if not same:
        known = sorted({named(dict(recording.hardware)) for recording in there})
        raise NoSuite(
            f"no recording of {named(dict(machines[0]))}; there are: {'; '.join(known) or 'none'}. "
            "Use --against FILE to compare with another recording, or make one: --json FILE --runs 2."
        )
    return same


def recording_files() -> list[Path]:
    """The files in `recorded/` that `load` reads."""
    return [file for file in sorted(FOLDER.glob("*.json")) if file.name not in NO_RECORDINGS]


def text(before: Sequence[Recording], after: Sequence[Recording]) -> str:
    """The comparison as text: the rows that moved, worse ones first, and the rows that are no longer measured."""
    moves = compare(before, after)
    moved = sorted((m for m in moves if m.moved), key=lambda m: (not m.worse, -abs(math.log(m.change or 1))))
    machines = "; ".join(sorted({named(dict(recording.hardware)) for recording in before}))
    bad = sum(move.worse for move in moved)
    lines = [f"compared with the recording on {machines}: {len(moves)} rows, {len(moved)} moved, {bad} of them worse"]
    for move in moved:
        word = "WORSE " if move.worse else "better"
        lines.append(
            f"  {word} {move.old:.4g} -> {move.new:.4g} ({move.change - 1:+.1%}, noise {move.noise:.1%})  "
            f"{move.suite}: {move.case}: {move.name}"
        )
    if gone := unmatched(before, after):
        lines.append(f"  not measured any more: {'; '.join(gone)}")
    return "\n".join(lines)


def _rows(recordings: Sequence[Recording]) -> dict[tuple[str, str, str, str], list[Row]]:
    """The rows of all runs that can be compared, by suite, size, case and name."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for recording in recordings:
        for row in recording.rows:
            if row.better and row.figure is not None:
                name = f"{row.name}, over {row.over}" if row.over else row.name  # a run may have several ratios
                found.setdefault((recording.suite, recording.size, row.case, name), []).append(row)
    return found


def _move(key: tuple[str, str, str, str], before: Sequence[Row], after: Sequence[Row]) -> Move:
    old, new = (_middle(rows) for rows in (before, after))
    noise = max(LEAST_NOISE, _noise(before) + _noise(after))
    return Move(key[0], key[2], key[3], old, new, new / old if old else math.inf, noise, after[-1].better)


def _middle(rows: Sequence[Row]) -> float:
    values = [row.figure for row in rows if row.figure is not None]
    if min(values) <= 0:
        return sum(values) / len(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def _noise(rows: Sequence[Row]) -> float:
    """Half the width of the spread, as a difference of logarithms."""
    values = [row.figure for row in rows if row.figure is not None]
    if min(values) <= 0:
        return 0.0
    spreads = [math.log(row.p80 / row.p20) / 2 for row in rows if row.p20 and row.p80 and row.p20 > 0]
    return max([math.log(max(values) / min(values)) / 2, *spreads])
