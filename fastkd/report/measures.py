"""How each measure is shown: its name, its unit, which way is better, and what it is honestly."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isfinite

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


@dataclass(frozen=True)
class Measure:
    """key: in `Evaluation.intervals`. scale: 100 for a share shown as per cent. better: −1 where less is better."""

    key: str
    name: str
    short: str
    unit: str
    scale: float
    better: int
    says: str

    @property
    def arrow(self) -> str:
        """Which way is better, in words."""
        return "higher is better" if self.better > 0 else "lower is better"

    @property
    def column(self) -> Column:
        """Its column in a table."""
        return Column(self.short, f"{self.unit} {'↑' if self.better > 0 else '↓'}")


MEASURES = (
    Measure("kl_bucket", "KL to the teacher, bucket", "KL, bucket", "nats", 1, -1,
            "KL(teacher ‖ student) at T = 1 with everything outside the teacher's head as one outcome: a lower bound."),
    Measure("kl_sampled", "KL to the teacher, sampled", "KL, sampled", "nats", 1, -1,
            "the same KL with the tail represented by the draws in the cache: an estimate."),
    Measure("agreement", "top-1 agreement with the teacher", "agreement", "%", 100, 1,
            "positions at which the student's best token is the teacher's; of the teacher's equals, any counts."),
    Measure("cross_entropy", "cross-entropy", "cross-entropy", "nats", 1, -1,
            "the mean of −log of the label's probability."),
    Measure("accuracy", "accuracy on labels", "accuracy", "%", 100, 1,
            "positions at which the best token is the label."),
    Measure("ece", "calibration error", "ECE", "%", 100, -1,
            "expected calibration error, 15 equal bins of confidence (Guo et al. 2017); small samples raise it."),
)  # fmt: skip
PERPLEXITY = Column("perplexity", "e^nats ↓")


def cell(measure: Measure, found: Mapping[str, Interval]) -> Cell:
    """A measure with its interval."""
    if measure.key not in found:
        return Cell(DASH, tone="aside")
    mean, half = with_half(*found[measure.key], scale=measure.scale)
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
    return "good" if difference.mean * measure.better > 0 else "bad"


WORDS = {"good": "better", "bad": "worse", "even": "within noise"}


def difference_cell(measure: Measure, found: Mapping[str, Interval]) -> Cell:
    """A paired difference with its interval, and whether it is one."""
    if measure.key not in found:
        return Cell(DASH, tone="aside")
    value = found[measure.key]
    mean, half = with_half(*value, scale=measure.scale, sign=True)
    tone = verdict(measure, value)
    return Cell(mean, f"±{THIN}{half or '∞'}", tone, WORDS[tone])
