"""The line of a progress bar, laid out for the width of the terminal. Pure functions."""

from collections.abc import Sequence

from tqdm.std import Bar, tqdm
from tqdm.utils import disp_len, disp_trim

from .numbers import size_text

_BARS = ((110, 20), (70, 10))  # columns of the bar on terminals from so many columns on
_GAP = "  "


def bar_line(
    width: int, label: str, count: str, share: float | None, pieces: Sequence[str], *, ascii_only: bool = False
) -> str:
    """At most `width` columns: label, count, a bar, and of the pieces, the most important first, those that fit whole.

    share: of the work that is done; None if it is not known. A label longer than two fifths of the width is shortened
    in the middle, since names of arms differ at both ends.
    """
    if disp_len(label) > (room := width * 2 // 5):
        label = f"{disp_trim(label, room // 2 - 1)}…{label[-(room - room // 2) :]}"
    head = f"{label}: {count}" if label else count
    long = next((columns for least, columns in _BARS if width >= least), 0)
    if share is not None and long and disp_len(head) + long < width // 2:
        head += _GAP + format(Bar(share, long, Bar.ASCII if ascii_only else Bar.UTF))
    tail = ""
    for piece in ([f"{int(100 * share)}%"] if share is not None else []) + list(pieces):
        longer = f"{tail}, {piece}" if tail else _GAP + piece
        tail = longer if disp_len(head + longer) <= width else tail
    return str(disp_trim(head + tail, width))


def amount(count: float, unit: str) -> str:
    """A count for a bar: "1,234", "2.05M"; of bytes "453 MB"."""
    if unit == "byte":
        return size_text(count)
    return f"{count:,.0f}" if abs(count) < 100_000 else str(tqdm.format_sizeof(count))


def pace_text(rate: float, unit: str) -> str:
    """Units a second, or seconds a unit if there is less than one a second: "12/s", "4.1 s/step"; "" for none."""
    if rate <= 0 or unit == "second":
        return ""
    if rate < 1:
        return f"{1 / rate:,.{1 if rate > 0.1 else 0}f} s/{unit}"
    if unit == "byte":
        return f"{size_text(rate)}/s"
    return f"{rate:,.{0 if rate >= 10 else 1}f}/s"
