"""How busy the machine was with other work while figures were measured, and whether they can be trusted."""

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastkd.bench.hardware import cores

QUIET = 0.05
"""Of the cores: if others used more on average, wall times are not to be trusted."""
_STAT = Path("/proc/stat")


class LoadMeter:
    """Measures from when it is made. The load average counts this process too; `others` does not."""

    def __init__(self) -> None:
        self._begun, self._before = self._now(), _average()

    def load(self) -> dict[str, Any]:
        """The load so far: load averages of a minute before and after, cores, the cores that others used on average
        (None if the system does not say), and whether it was quiet."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._begun, strict=True))
        others = None if busy != busy or wall <= 0 else max(0.0, busy - own) / wall
        return load_of(self._before, _average(), cores(), others)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        used = os.times()
        own = used.user + used.system + used.children_user + used.children_system
        return time.monotonic(), _busy_seconds(), own


def load_of(before: float | None, after: float | None, count: int, others: float | None) -> dict[str, Any]:
    """As JSON. Where the cores of others are not known, the load before the measurement decides."""
    known = others if others is not None else before
    quiet = None if known is None else known <= QUIET * count
    found = {"before": before, "after": after, "cores": count, "others": others, "quiet": quiet}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def load_text(load: Mapping[str, Any]) -> str:
    """One line for people; "" for a recording that has no load."""
    if not load:
        return ""
    before, after = ("unknown" if load[when] is None else f"{load[when]:.2f}" for when in ("before", "after"))
    text = f"load average {before} before, {after} after, on {load['cores']} cores"
    if load["others"] is not None:
        text += f"; other processes used {load['others']:.2f} cores"
    if load["quiet"] is None:
        return f"{text}; it is not known whether the machine was quiet"
    if load["quiet"]:
        return f"{text}: quiet"
    return f"{text}: NOT QUIET, times are not to be trusted, ratios of runs that alternate less than usual"


def _average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _busy_seconds() -> float:
    """Seconds that the cores that this process may use worked since the start of the machine, together, those taken by
    other machines on it included; NaN if the system does not say."""
    try:
        return busy_ticks(_STAT.read_text(), os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return float("nan")


def busy_ticks(stat: str, of: Collection[int]) -> int:
    """Ticks that these cores worked, by /proc/stat: user, nice, system, irq, softirq and steal; not idle and iowait."""
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name[3:].isdigit() and name.startswith("cpu") and int(name[3:]) in of:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks
