"""Verdicts: whether a student is better than one trained beside it, on the same held-out windows.

A difference of a measure is judged by its interval, paired over windows: helped, hurt, or no difference. First comes
the measure that decides (`--best`), over all positions, with an interval of 95%; so have the other measures over all
positions, each for itself. Then come the slices (`fastkd.evaluate.slices`): many cells, a measure and a slice each, of
which some would differ by chance. Their intervals hold for all cells together (Bonferroni: a share of 5% / cells lies
outside each), so that with a probability of 95% no cell is called different that is not.

All that is for one seed: another one may change a difference by more than its interval over windows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..evaluate.measures import MEASURES, sign_of
from ..evaluate.slices import SAYS
from ..utils.intervals import NO_INTERVAL, TAIL, Interval, to_json
from ..utils.numbers import difference_text
from ..utils.words import KINDS, counted

if TYPE_CHECKING:
    from ..evaluate.result import Evaluation

HELPED, HURT, EVEN = "helped", "hurt", "no difference"
NOT_KNOWN = "not known"
"""There is no interval, so that nothing can be said."""
LEAST_WINDOWS = 8
"""A slice with positions in fewer windows of a cache is not judged."""


def verdict(measure: str, difference: Interval) -> str:
    """Whether a difference of a measure, with its interval, is for the better, for the worse, or neither; NOT_KNOWN
    without an interval. All that judges asks here."""
    if not difference.known:
        return NOT_KNOWN
    if not difference.excludes_zero:
        return EVEN
    return HELPED if difference.mean * sign_of(measure) < 0 else HURT


@dataclass(frozen=True)
class Verdict:
    """A student minus an arm, on the same held-out windows.

    against: the arm's folder. measure: the one that decides. windows: their number. difference: of each measure over
    all positions, with its own interval of 95%. slices: the same within each slice, by name, with intervals that hold
    for all `cells` of them together. step: of both evaluations, if the student was stopped there; else None. looks: for
    how many comparisons the intervals of `difference` hold together. kind: of the data; see `fastkd.utils.words`.
    """

    against: str
    measure: str
    windows: int
    difference: Mapping[str, Interval]
    slices: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    step: int | None = None
    looks: int = 1
    kind: str = "text"

    @property
    def cells(self) -> int:
        """Pairs of a slice and a measure that are judged."""
        return sum(len(found) for found in self.slices.values())

    @property
    def overall(self) -> str:
        """By the measure that decides: HELPED, HURT, EVEN or NOT_KNOWN."""
        return verdict(self.measure, self.difference[self.measure])

    def different(self) -> dict[str, list[tuple[str, Interval]]]:
        """The measures that differ beyond the interval, by slice."""
        found = {
            name: [(measure, value) for measure, value in cells.items() if verdict(measure, value) in (HELPED, HURT)]
            for name, cells in self.slices.items()
        }
        return {name: cells for name, cells in found.items() if cells}

    def sentence(self, said: str = "") -> str:
        """The overall verdict. said: what was compared; "": the arm's name."""
        when = f"at step {self.step}, " if self.step is not None else ""
        when += f"95% for all {self.looks} comparisons together, " if self.looks > 1 else ""
        found = self.difference[self.measure]
        over = f"paired over {counted(self.windows, 'held-out ' + KINDS[self.kind].window)}"
        figure = f"{self.measure} {difference_text(*found)}, {when}{over}"
        figure += "; one seed" if found.known else f"; {NO_INTERVAL}"
        return f"{said or 'against ' + self.against.replace('_', ' ')}: {self.overall} ({figure})"

    @property
    def lines(self) -> list[str]:
        """The overall verdict, then the slices that differ."""
        lines = [self.sentence()]
        if self.cells:
            some = self.different()
            what = f"intervals of 95% for all {self.cells} cells together"
            lines.append(f"  by slice ({what}): {'' if some else 'no difference'}".rstrip())
            for name, cells in some.items():
                told = (f"{verdict(m, d)}, {m} {difference_text(*d)}" for m, d in cells)
                lines.append(f"    {SAYS.get(name, name)}: {'; '.join(told)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        def judged(found: Mapping[str, Interval]) -> dict[str, Any]:
            return {name: to_json(value) | {"verdict": verdict(name, value)} for name, value in found.items()}

        return {
            "against": self.against,
            "measure": self.measure,
            "verdict": self.overall,
            "windows": self.windows,
            **({} if self.kind == "text" else {"kind": self.kind}),
            **({} if self.step is None else {"step": self.step, "looks": self.looks}),
            "difference": judged(self.difference),
            "cells": self.cells,
            "slices": {name: judged(found) for name, found in self.slices.items()},
        }


def judge(
    against: str,
    ours: "Sequence[Evaluation]",
    theirs: "Sequence[Evaluation]",
    weights: Sequence[float],
    measure: str,
    *,
    step: int | None = None,
    looks: int = 1,
    tail: float = TAIL,
) -> Verdict | None:
    """The verdict from the evaluations of a student and of an arm, one for each cache: means over caches by their
    weights (in a slice, also by its share of a cache's positions). None unless both were evaluated, on the same windows
    and by that measure. Perplexity is judged by its logarithm, the cross-entropy. tail: the share outside an interval
    over all positions, at either end. Raises StreamError for evaluations of other windows."""
    from ..evaluate.api import compare

    if not ours or len(ours) != len(theirs):
        return None
    whole = [compare(one, other, tail=tail) for one, other in zip(ours, theirs, strict=True)]
    difference = combined(whole, weights)
    measure = "cross_entropy" if measure == "perplexity" else measure
    if measure not in difference:
        return None
    windows = sum(one.windows for one in ours)
    slices = _slices(ours, theirs, weights)
    return Verdict(against, measure, windows, difference, slices, step, looks, ours[0].kind)


def _slices(
    ours: "Sequence[Evaluation]", theirs: "Sequence[Evaluation]", weights: Sequence[float]
) -> dict[str, dict[str, Interval]]:
    from ..evaluate.api import compare_slices

    def compared(tail: float) -> dict[str, dict[str, Interval]]:
        parts = [
            compare_slices(one, other, tail=tail, least=LEAST_WINDOWS) for one, other in zip(ours, theirs, strict=True)
        ]
        found = {}
        for name in SAYS:
            held = [number for number, part in enumerate(parts) if name in part]
            if held:
                share = [weights[i] * ours[i].slices[name].counts.sum() / ours[i].count for i in held]
                differences = combined([parts[i][name] for i in held], share)
                # both KL divergences are of the same thing: one of them is enough
                twice = "kl_sampled" if "kl_bucket" in differences else ""
                found[name] = {m: value for m, value in differences.items() if m in MEASURES and m != twice}
        return found

    cells = sum(len(found) for found in compared(TAIL).values())
    return compared(TAIL / cells) if cells else {}


def combined(parts: Sequence[Mapping[str, Interval]], weights: Sequence[float]) -> dict[str, Interval]:
    """Means over caches of the measures that all have. Windows of several caches are independent."""
    shares = [float(weight / sum(weights)) for weight in weights]
    return {
        name: Interval(
            sum(share * part[name].mean for share, part in zip(shares, parts, strict=True)),
            sum((share * part[name].half) ** 2 for share, part in zip(shares, parts, strict=True)) ** 0.5,
        )
        for name in parts[0]
        if all(name in part for part in parts)
    }
