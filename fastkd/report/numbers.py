"""Numbers as a person reads them: three significant figures, thin spaces between thousands, a real minus sign."""

import math

THIN = "\u202f"
MINUS = "\u2212"
DASH = "\u2013"


def figures(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """About so many significant figures: "0.0123", "4.50", "12 300"; a dash for what is not known."""
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
    """Decimal places that show so many significant figures."""
    if value == 0 or not math.isfinite(value):
        return 0
    # as it will be rounded: 0.0999 with two figures is 0.10, not 0.100
    rounded = float(f"{abs(value):.{digits - 1}e}")
    return max(0, digits - 1 - math.floor(math.log10(rounded)))


def decimals(value: float, count: int, *, sign: bool = False) -> str:
    """So many decimal places, thousands apart from 10 000 on."""
    text = f"{abs(value):,.{count}f}"
    whole, dot, rest = text.partition(".")
    whole = whole.replace(",", "" if len(whole) <= 5 else THIN)
    return _signed(whole + dot + rest, value, sign)


def whole(value: int) -> str:
    """An integer, all of it."""
    return decimals(value, 0)


def with_half(mean: float, half: float, *, scale: float = 1.0, sign: bool = False) -> tuple[str, str]:
    """A mean and half its interval, both to the place where the half has two figures: ("3.016", "0.051"). Where the
    half is not known, it is empty."""
    mean, half = mean * scale, half * scale
    if not math.isfinite(half):
        return figures(mean, sign=sign), ""
    # rounding of sums leaves a half that is not quite 0
    count = min(places(half, 2), 4) if half > 1e-9 * abs(mean) else places(mean, 3)
    return decimals(mean, count, sign=sign), decimals(half, count)


def prefixed(value: float | None, unit: str = "") -> str:
    """Three figures with an SI prefix: "113 M", "1.20 k"; "453 MB" with a unit."""
    if value is None or not math.isfinite(value):
        return DASH
    power, size = 0, abs(value)
    while size >= 999.5 and power < 5:
        size, power = size / 1000, power + 1
    if not power:
        text = figures(value) if unit == "" else f"{figures(value)}{THIN}{unit}"
        return text
    return _signed(f"{figures(size)}{THIN}{('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}", value, False)


def seconds(value: float | None) -> str:
    """A duration: "0.31 s", "48 s", "4 min 12 s", "2 h 5 min"."""
    if value is None or not math.isfinite(value):
        return DASH
    if value < 59.5:
        return f"{figures(value, 2)}{THIN}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min" + (f" {rest}{THIN}s" if rest else "")
    hours, minutes = divmod(minutes, 60)
    return f"{whole(hours)}{THIN}h" + (f" {minutes}{THIN}min" if minutes else "")


def percent(value: float | None, digits: int = 3) -> str:
    """A share as per cent."""
    return DASH if value is None or not math.isfinite(value) else f"{figures(100 * value, digits)}{THIN}%"


def _signed(text: str, value: float, sign: bool) -> str:
    zero = not any(c in "123456789" for c in text)
    if zero:
        return f"±{text}" if sign else text
    return (MINUS if value < 0 else "+" if sign else "") + text
