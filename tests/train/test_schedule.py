"""Rates, alphas and temperatures, step by step."""

import math

import pytest

from fastkd.train.optimizer import RAMPS, RATES, ramp_at, rate_at


def rates(steps: int, **arguments: float | str) -> list[float]:
    return [rate_at(i, steps, **{"peak": 2.0, **arguments}) for i in range(steps)]  # type: ignore[arg-type]


def test_warm_up_rises_in_a_straight_line_to_the_peak() -> None:
    found = rates(40, schedule="constant", warmup=0.1)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[4:] == [2.0] * 36


def test_cosine_falls_to_the_floor_along_half_a_cosine() -> None:
    found = rates(21, schedule="cosine", floor=0.1)
    expected = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 20)) / 2) for i in range(21)]
    assert found == pytest.approx(expected)
    assert (found[0], found[-1]) == pytest.approx((2.0, 0.2))


def test_linear_falls_in_a_straight_line() -> None:
    assert rates(5, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_wsd_stays_and_then_falls() -> None:
    found = rates(10, schedule="wsd", warmup=0.2, decay=0.3)
    assert found == pytest.approx([2 / 3, 4 / 3, 2, 2, 2, 2, 2, 2, 1, 0])


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_every_rate_lies_between_nothing_and_the_peak(schedule: str, steps: int, warmup: float) -> None:
    found = rates(steps, schedule=schedule, warmup=warmup, floor=0.1, decay=1.0)
    assert all(0 < rate <= 2.0 for rate in found)


@pytest.mark.parametrize("schedule", RAMPS)
def test_a_ramp_has_both_its_ends_exactly(schedule: str) -> None:
    found = [ramp_at(i, 11, start=4.0, end=1.1, schedule=schedule) for i in range(11)]
    assert (found[0], found[-1]) == (4.0, 1.1)
    assert found == sorted(found, reverse=True)
    assert found[5] == pytest.approx(2.55)


def test_without_an_end_a_ramp_stays() -> None:
    assert {ramp_at(i, 7, start=0.3, end=None) for i in range(7)} == {0.3}


def test_a_single_step_has_the_start() -> None:
    assert ramp_at(0, 1, start=0.2, end=0.9) == 0.2
