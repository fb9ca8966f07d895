"""Verdicts: overall, by slice for the family of all cells, over several caches, and what is said of them."""

from dataclasses import replace

import numpy as np
import pytest
from report_cases import CONTROL, STUDENT, evaluation

from fastkd.errors import StreamError
from fastkd.evaluate.api import Evaluation, compare, compare_slices
from fastkd.evaluate.result import Windows
from fastkd.evaluate.slices import SLICES
from fastkd.train.verdict import EVEN, HELPED, HURT, LEAST_WINDOWS, NOT_KNOWN, judge, verdict
from fastkd.utils.intervals import TAIL, Interval, ratio_interval


def test_verdicts() -> None:
    assert verdict("cross_entropy", Interval(-0.2, 0.1)) == HELPED
    assert verdict("cross_entropy", Interval(0.2, 0.1)) == HURT
    assert verdict("agreement", Interval(0.2, 0.1)) == HELPED
    assert verdict("agreement", Interval(0.1, 0.1)) == EVEN
    assert verdict("agreement", Interval(0.1, float("inf"))) == NOT_KNOWN
    assert verdict("agreement", Interval(float("nan"), 0.1)) == EVEN


def test_a_verdict() -> None:
    ours, theirs = evaluation(STUDENT), evaluation(CONTROL, seed=1)
    found = judge("control", [ours], [theirs], [3.0], "perplexity")
    assert found is not None
    assert (found.measure, found.overall, found.windows) == ("cross_entropy", HELPED, 12)
    assert dict(found.difference) == compare(ours, theirs)
    assert found.cells == 8 * 4  # not both KL divergences
    # each slice's interval holds for all cells together
    at = ours.slices["entropy/low"], theirs.slices["entropy/low"]
    minus = at[0].sums["kl_bucket"] - at[1].sums["kl_bucket"]
    assert found.slices["entropy/low"]["kl_bucket"] == ratio_interval(minus, at[0].counts, tail=TAIL / 32)
    assert found.slices["entropy/low"]["kl_bucket"].half > 1.5 * ratio_interval(minus, at[0].counts).half
    mean, half = found.difference["cross_entropy"]
    first, second, *rest = found.lines
    assert first == (
        f"against control: helped (cross_entropy {mean:+.4f} ± {half:.4f}, paired over 12 held-out windows; one seed)"
    )
    assert second == "  by slice (intervals of 95% for all 32 cells together):"
    assert any(line.startswith("    teacher wrong: hurt, kl_bucket +") for line in rest)
    same = judge("control", [ours], [ours], [1.0], "cross_entropy")
    assert same is not None
    assert same.lines[1] == "  by slice (intervals of 95% for all 32 cells together): no difference"
    assert judge("control", [], [], [], "kl_bucket") is None
    assert judge("control", [ours], [theirs], [1.0], "mine") is None
    with pytest.raises(StreamError, match="different windows"):
        judge("control", [ours], [evaluation(content="other")], [1.0], "kl_bucket")
    old = judge("control", [replace(ours, slices={})], [theirs], [1.0], "kl_bucket")
    assert old is not None
    assert len(old.lines) == 1


def test_of_several_caches() -> None:
    """Means by their weights; the windows of different caches are independent."""
    ours, theirs = evaluation(STUDENT), evaluation(CONTROL, seed=1)
    one, two = compare(ours, theirs)["kl_bucket"], compare(theirs, ours)["kl_bucket"]
    found = judge("control", [ours, theirs], [theirs, ours], [3.0, 1.0], "kl_bucket")
    assert found is not None
    mean, half = found.difference["kl_bucket"]
    assert mean == pytest.approx(0.75 * one.mean + 0.25 * two.mean)
    assert half == pytest.approx(((0.75 * one.half) ** 2 + (0.25 * two.half) ** 2) ** 0.5)
    assert found.overall == HELPED
    assert found.windows == 24
    # a slice that one of them lacks is that of the other
    fewer = [replace(e, slices={n: s for n, s in e.slices.items() if n != "teacher/wrong"}) for e in (theirs, ours)]
    found = judge("control", [ours, fewer[0]], [theirs, fewer[1]], [3.0, 1.0], "kl_bucket")
    assert found is not None
    alone = compare_slices(ours, theirs)["teacher/wrong"]["kl_bucket"]
    assert found.slices["teacher/wrong"]["kl_bucket"].mean == pytest.approx(alone.mean)


def noise(random: np.random.Generator, windows: int) -> Evaluation:
    counts = random.integers(4, 40, (len(SLICES), windows)).astype(float)
    counts[0, LEAST_WINDOWS - 1 :] = 0.0  # too few windows to be judged
    names = ("cross_entropy", "accuracy", "agreement", "kl_bucket")
    each = [{n: random.normal(0, 1, windows) * row**0.5 for n in names} for row in counts]
    slices = {name: Windows(row, sums) for name, row, sums in zip(SLICES, counts, each, strict=True)}
    whole = Windows(counts.sum(0), {n: np.sum([sums[n] for sums in each], 0) for n in names})
    return Evaluation("held_out", "s", "c", 1, 1.0, 1, "cpu", whole, Windows.empty(windows), slices)


def test_by_chance_few_families_have_a_cell_that_differs() -> None:
    random, times, some = np.random.default_rng(0), 400, 0
    for _ in range(times):
        one = noise(random, 30)
        zero = {n: 0.0 * row for n, row in one.student.sums.items()}
        none = {name: replace_sums(part, 0.0) for name, part in one.slices.items()}
        found = judge("control", [one], [replace(one, student=Windows(one.student.counts, zero), slices=none)], [1.0],
                      "cross_entropy")  # fmt: skip
        assert found is not None
        assert found.cells == 7 * 4
        some += bool(found.different())
    assert some / times < 0.08  # of 28 cells at 95% each it would be 0.76


def replace_sums(part: Windows, value: float) -> Windows:
    return Windows(part.counts, {name: np.full_like(row, value) for name, row in part.sums.items()})
