"""Quantiles of Student's t against tables."""

import pytest

from fastkd.utils.intervals import t_quantile


@pytest.mark.parametrize(
    ("df", "tail", "value"),
    [
        (1, 0.025, 12.7062), (2, 0.025, 4.30265), (3, 0.025, 3.18245), (11, 0.025, 2.20099), (60, 0.025, 2.00030),
        (61, 0.025, 1.99962), (1000, 0.025, 1.96234), (4, 0.0005, 8.61030), (30, 0.0005, 3.64596),
        (120, 0.0005, 3.37345), (8, 0.025 / 32, 4.68952), (61, 0.025 / 300, 4.01252),
    ],
)  # fmt: skip
def test_quantiles_of_students_t(df: int, tail: float, value: float) -> None:
    assert t_quantile(df, tail) == pytest.approx(value, abs=3e-5)
