"""Number formats for people: significant figures, SI prefixes, durations, percentages. Imports nothing heavy.

Pages use thin spaces between thousands and before units, and a real minus sign (`figures`, `prefixed`, `seconds`,
`percent`, `with_half`); terminals plain spaces (`size_text`, `duration`, `measure_text`, `difference_text`).
"""

import math

THIN = "\u202f"
MINUS = "\u2212"
DASH = "\u2013"
_PREFIXES = ("", "k", "M", "G", "T", "P")


def figures(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """`digits` significant figures: "0.0123", "4.50", "12 300"; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e15:
        mantissa, power = f"{abs(value):.{digits - 1}e}".split("e")
        return _signed(f"{mantissa}e{int(power)}".replace("-", MINUS), value, sign)
    return decimals(value, places(value, digits), sign=sign)


def places(value: float, digits: int) -> int:
    """Decimal places that show `digits` significant figures."""
    if value == 0 or not math.isfinite(value):
        return 0
    # of the rounded value: 0.0999 with two figures is 0.10, not 0.100
    rounded = float(f"{abs(value):.{digits - 1}e}")
    return max(0, digits - 1 - math.floor(math.log10(rounded)))


def decimals(value: float, count: int = 0, *, sign: bool = False) -> str:
    """`count` decimal places; thousands are separated from 10 000 on."""
    whole, dot, rest = f"{abs(value):,.{count}f}".partition(".")
    whole = whole.replace(",", "" if len(whole) <= 5 else THIN)
    return _signed(whole + dot + rest, value, sign)


def with_half(mean: float, half: float, *, scale: float = 1.0, sign: bool = False) -> tuple[str, str]:
    """A mean and half its interval, both rounded where the half has two figures: ("3.016", "0.051"). An infinite half
    is empty."""
    mean, half = mean * scale, half * scale
    if not math.isfinite(half):
        return figures(mean, sign=sign), ""
    # rounding errors in sums leave a half that is not exactly 0
    count = min(places(half, 2), 4) if half > 1e-9 * abs(mean) else places(mean, 3)
    return decimals(mean, count, sign=sign), decimals(half, count)


def measure_text(value: float | None) -> str:
    """A measure with four decimal places, and no sign if these are zeros; "" for None."""
    return "" if value is None else f"{value:z.4f}"


def difference_text(mean: float, half: float, *, sign: bool = True) -> str:
    """A difference and half its interval: "-0.0831 ± 0.0202", with more decimal places where four would leave less than
    two figures of the half; without an interval, the difference alone."""
    if not math.isfinite(half):
        return f"{mean:{'+' if sign else ''}z.4f}"
    count = min(8, max(4, places(half, 2)))
    return f"{mean:{'+' if sign else ''}z.{count}f} ± {half:.{count}f}"


def prefixed(value: float | None, unit: str = "") -> str:
    """Three figures with an SI prefix: "113 M", "1.20 k"; "453 MB" with a unit."""
    if value is None or not math.isfinite(value):
        return DASH
    size, prefix = _scaled(abs(value))
    unit = prefix + unit
    return _signed(figures(size) + (THIN + unit if unit else ""), value, False)


def size_text(size: float) -> str:
    """Bytes with about three figures and an SI prefix: "12 B", "1.2 kB", "453 MB"."""
    scaled, prefix = _scaled(size)
    return f"{scaled:.{0 if not prefix or scaled >= 99.95 else 1}f} {prefix}B"


def seconds(value: float | None) -> str:
    """A measured duration: "0.31 s", "48 s", "4 min 12 s", "2 h 5 min"."""
    if value is None or not math.isfinite(value):
        return DASH
    if value < 59.5:
        return f"{figures(value, 2)}{THIN}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min" + (f" {rest}{THIN}s" if rest else "")
    hours, minutes = divmod(minutes, 60)
    return f"{decimals(hours)}{THIN}h" + (f" {minutes}{THIN}min" if minutes else "")


def duration(seconds: float) -> str:
    """An estimated duration: "42 s", "7 min", "3.1 h", "2.5 days"."""
    for size, name in ((86400.0, "days"), (3600.0, "h")):
        if seconds >= 2 * size or (size == 3600.0 and seconds >= size):
            return f"{seconds / size:.1f} {name}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def percent(value: float | None, digits: int = 3) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{figures(100 * value, digits)}{THIN}%"


def _scaled(size: float) -> tuple[float, str]:
    """A size below 1000, as it rounds to three figures, and its SI prefix."""
    power = 0
    while size >= 999.5 and power < len(_PREFIXES) - 1:
        size, power = size / 1000, power + 1
    return size, _PREFIXES[power]


def _signed(text: str, value: float, sign: bool) -> str:
    if not any(c in "123456789" for c in text):
        return f"±{text}" if sign else text
    return (MINUS if value < 0 else "+" if sign else "") + text
