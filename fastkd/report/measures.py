"""How a measure is shown: as a cell, as a difference, and in words."""

from collections.abc import Mapping
from math import exp, isfinite

from ..evaluate.measures import REPORT, Measure, printed_in, sign_of
from ..utils.intervals import Interval
from ..utils.numbers import (
    DASH,
    THIN,
    decimals,
    figures,
    places,
    with_half,
)
from .page import Cell, Column

*MEASURES, PERPLEXITY = printed_in(REPORT)  # perplexity has no interval of its own


def column(measure: Measure) -> Column:
    """Its column in a table."""
    return Column(measure.short, f"{measure.unit} {'↑' if measure.better == 'higher' else '↓'}")


def cell(measure: Measure, found: Mapping[str, Interval]) -> Cell:
    """A measure with its interval."""
    if measure.name not in found:
        return Cell(DASH, tone="aside")
    mean, half = with_half(*found[measure.name], scale=measure.scale)
    return Cell(mean, f"±{THIN}{half}" if half else "")


def perplexity(found: Mapping[str, Interval]) -> Cell:
    """exp of the cross-entropy, with the ends of its interval."""
    if "cross_entropy" not in found:
        return Cell(DASH, tone="aside")
    value = found["cross_entropy"]
    if not isfinite(value.half) or value.high > 100:
        return Cell(figures(exp(min(value.mean, 700.0))))
    count = places(exp(value.mean), 3)
    low, high = (decimals(exp(x), count) for x in (value.low, value.high))
    return Cell(decimals(exp(value.mean), count), f"{low}{DASH}{high}")


def verdict(measure: Measure, difference: Interval) -> str:
    """One of "good", an improvement beyond the interval; "bad", the other way; and "even"."""
    if abs(difference.mean) <= difference.half:
        return "even"
    return "good" if difference.mean * sign_of(measure.name) < 0 else "bad"


WORDS = {"good": "better", "bad": "worse", "even": "within noise"}


def difference_cell(measure: Measure, found: Mapping[str, Interval]) -> Cell:
    """A paired difference with its interval, and whether it is one."""
    if measure.name not in found:
        return Cell(DASH, tone="aside")
    value = found[measure.name]
    mean, half = with_half(*value, scale=measure.scale, sign=True)
    tone = verdict(measure, value)
    return Cell(mean, f"±{THIN}{half or '∞'}", tone, WORDS[tone])
