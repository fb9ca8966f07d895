"""Measures as cells of a table: a value, a difference, and whether it is better."""

from collections.abc import Mapping
from math import exp, isfinite

from ..evaluate.measures import REPORT, Measure, printed_in
from ..train.verdict import EVEN, HELPED, HURT, NOT_KNOWN
from ..train.verdict import verdict as judged
from ..utils.intervals import Interval
from ..utils.numbers import DASH, THIN, decimals, figures, places, with_half
from .page import UNKNOWN, Cell, Column

MEASURES = {measure.name: measure for measure in printed_in(REPORT)}
PERPLEXITY = MEASURES.pop("perplexity")  # evaluations do not have it: it follows from the cross-entropy
TONES = {HELPED: "good", HURT: "bad", EVEN: "even", NOT_KNOWN: ""}
VERDICTS = {"good": "better", "bad": "worse", "even": "no difference", "": "no interval"}


def column(measure: Measure) -> Column:
    """The column of a measure."""
    return Column(measure.short, f"{measure.unit} {'↑' if measure.better == 'higher' else '↓'}")


def cell(measure: Measure, found: Mapping[str, Interval], *, difference: bool = False) -> Cell:
    """A measure with its interval; of a difference also whether it is better."""
    if measure.name not in found:
        return UNKNOWN
    mean, half = with_half(*found[measure.name], scale=measure.scale, sign=difference)
    if not difference:
        return Cell(mean, f"±{THIN}{half}" if half else "")
    tone = verdict(measure, found[measure.name])
    return Cell(mean, f"±{THIN}{half}" if half else "", tone, VERDICTS[tone])


def perplexity(found: Mapping[str, Interval]) -> Cell:
    """exp of the cross-entropy, with the ends of its interval."""
    if "cross_entropy" not in found:
        return UNKNOWN
    value = found["cross_entropy"]
    if not isfinite(value.half) or value.high > 100:
        return Cell(figures(exp(min(value.mean, 700.0))))
    count = places(exp(value.mean), 3)
    low, high = (decimals(exp(x), count) for x in (value.low, value.high))
    return Cell(decimals(exp(value.mean), count), f"{low}{DASH}{high}")


def verdict(measure: Measure, difference: Interval) -> str:
    """ "good" or "bad" for a difference larger than its interval, else "even"; "" without an interval."""
    return TONES[judged(measure.name, difference)]
