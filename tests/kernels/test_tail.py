"""The tail at temperatures that are not stored: the spline against its definition, and its error on a real teacher."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastkd.kernels import KDError, SparseTargets
from fastkd.kernels.tail import OFF_GRID_NEEDS, check_temperature, device_table, spline_table, tail_weights

FIXTURE = Path(__file__).parents[1] / "data" / "smollm2_tail_histograms.npz"
GRIDS = [(1.0, 2.0, 4.0), (1.0, 1.5, 2.0, 4.0), (0.5, 1.0, 1.7, 3.0, 9.0), (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)]
BETWEEN = [1.0 + 1e-4, 1.2, 1.9, 2.5, 3.0, 3.3, 7.0, 30.0, 1e6]

Array = NDArray[np.float64]


def polynomial_weights(temperature: float, grid: tuple[float, ...]) -> Array:
    """Weights of the polynomial through all knots: what fewer than three stored temperatures could serve at best."""
    knots = np.array([0.0, *(1.0 / t for t in grid)])
    powers = np.linalg.inv(np.vander(knots, increasing=True))
    weights: Array = (1.0 / temperature) ** np.arange(len(knots)) @ powers
    return weights


def truncated_power_weights(temperature: float, grid: tuple[float, ...]) -> Array:
    """The same weights from another basis: cubics plus (β - knot)³ where β > knot, for every knot but the outer two
    on each side. This is what not-a-knot means: these two are no knots of the spline at all."""
    knots = np.array(sorted([0.0, *(1.0 / t for t in grid)]))

    def basis(beta: Array) -> Array:
        cubic = beta[:, None] ** np.arange(4)
        return np.hstack([cubic, np.maximum(beta[:, None] - knots[2:-2], 0.0) ** 3])

    in_order = np.linalg.solve(basis(knots).T, basis(np.array([1.0 / temperature]))[0])
    return in_order[[np.searchsorted(knots, b) for b in (0.0, *(1.0 / t for t in grid))]]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("temperature", BETWEEN)
def test_weights_are_those_of_a_not_a_knot_spline(grid: tuple[float, ...], temperature: float) -> None:
    weights = tail_weights(temperature, grid)
    np.testing.assert_allclose(weights, truncated_power_weights(temperature, grid), atol=1e-11)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_cubic_in_beta_is_reproduced(grid: tuple[float, ...]) -> None:
    coefficients = np.array([10.8, -9.3, 2.1, -0.7])

    def cubic(beta: Array) -> Array:
        value: Array = beta[..., None] ** np.arange(4) @ coefficients
        return value

    values = cubic(np.array([0.0, *(1.0 / t for t in grid)]))
    for t in BETWEEN:
        assert tail_weights(t, grid) @ values == pytest.approx(float(cubic(np.array(1.0 / t))), abs=1e-10)


def test_three_temperatures_make_one_cubic() -> None:
    for t in (1.3, 2.5, 3.0, 50.0):
        grid = (1.0, 2.0, 4.0)
        np.testing.assert_allclose(tail_weights(t, grid), polynomial_weights(t, grid), atol=1e-11)


@pytest.mark.parametrize("grid", [(1.0,), (2.0, 1.0)])
def test_a_short_grid_has_its_own_temperatures_alone(grid: tuple[float, ...]) -> None:
    """The kernels read the table at the stored temperatures, and hold off everything else."""
    knots, table = spline_table(grid)
    np.testing.assert_allclose(knots, sorted([0.0, *(1.0 / t for t in grid)]))
    assert not table[:, 1:].any()
    for m, stored in enumerate(grid):
        assert table[np.searchsorted(knots, 1.0 / stored), 0].tolist() == np.eye(len(grid) + 1)[m + 1].tolist()


@pytest.mark.parametrize("grid", [(1.0,), (2.0, 1.0), *GRIDS])
def test_a_stored_temperature_is_hit_exactly(grid: tuple[float, ...]) -> None:
    for m, stored in enumerate(grid):
        for t in (stored, float(np.float32(stored)), stored * (1 + 5e-7), stored * (1 - 5e-7)):
            assert tail_weights(t, grid).tolist() == [0.0] * (m + 1) + [1.0] + [0.0] * (len(grid) - m - 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_there_is_no_jump_around_a_knot_or_at_infinity(grid: tuple[float, ...]) -> None:
    for m, stored in enumerate(grid):
        exact = np.eye(len(grid) + 1)[m + 1]
        sides = (1 + 2e-6, 1 - 2e-6) if stored > min(grid) else (1 + 2e-6,)
        for side in sides:
            np.testing.assert_allclose(tail_weights(stored * side, grid), exact, atol=1e-4)
    np.testing.assert_allclose(tail_weights(1e9, grid), np.eye(len(grid) + 1)[0], atol=1e-7)


@pytest.mark.parametrize("grid", GRIDS[:3])
def test_the_order_of_the_grid_does_not_matter(grid: tuple[float, ...]) -> None:
    for order in itertools.permutations(range(len(grid))):
        shuffled = tuple(grid[i] for i in order)
        for t in (1.3, 3.5):
            expected = tail_weights(t, grid)[[0, *(i + 1 for i in order)]]
            np.testing.assert_allclose(tail_weights(t, shuffled), expected, atol=1e-13)


def test_the_device_table_is_the_table() -> None:
    grid = GRIDS[1]
    flat = device_table(grid, torch.device("cpu"))
    knots, table = spline_table(grid)
    assert flat.dtype == torch.float32
    np.testing.assert_allclose(flat.numpy(), np.concatenate([knots, table.ravel()]), rtol=1e-7)
    assert table[-1, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]  # the last knot is the lowest temperature, T = 1
    assert not table[-1, 1:].any()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(KDError, match="positive, finite"):
        check_temperature(temperature, (1.0, 2.0, 4.0))


@pytest.mark.parametrize(
    ("temperature", "grid", "message"),
    [
        (0.9, (1.0, 2.0, 4.0), "below the lowest stored one, 1.0"),
        (1 - 2e-6, (4.0, 1.0, 2.0), "below the lowest"),
        (0.5, (1.0,), "below the lowest"),
        (2.0, (1.0,), "not among the stored"),
        (3.0, (1.0, 2.0), "at least 3 stored"),
        (1 + 2e-6, (1.0, 2.0), "at least 3 stored"),
    ],
)
def test_a_temperature_the_grid_cannot_serve_is_refused(
    temperature: float, grid: tuple[float, ...], message: str
) -> None:
    with pytest.raises(KDError, match=message):
        check_temperature(temperature, grid)
    with pytest.raises(KDError, match=message):
        tail_weights(temperature, grid)


def test_what_the_grid_can_serve_is_not_refused() -> None:
    check_temperature(2.0, (1.0, 2.0))
    check_temperature(float(np.float32(1.1)), (1.0, 1.1))
    check_temperature(1 - 5e-7, (1.0,))
    check_temperature(100.0, (1.0, 2.0, 4.0))


class Teacher:
    """256 positions of SmolLM2-135M: every outcome at the centre of its bin, so that any log-partition is exact."""

    def __init__(self) -> None:
        with np.load(FIXTURE) as data:
            per_nat = int(data["bins_per_nat"])
            self.head: Array = -(data["head_bins"] + 0.5) / per_nat
            widths = data["tail_widths"].astype(int)
            starts = np.repeat(widths.cumsum() - widths, widths)
            bins = np.arange(widths.sum()) - starts + np.repeat(data["tail_first_bin"].astype(int), widths)
            self.x: Array = -(bins + 0.5) / per_nat
            self.counts = data["tail_counts"].astype(float)
        self.starts = widths.cumsum() - widths
        self.outcomes = np.add.reduceat(self.counts, self.starts)

    def tail(self, temperature: float) -> Array:
        """`log Σ_tail e^(x/T)`. (The least likely bin lies above e^-70: nothing underflows.)"""
        return np.log(np.add.reduceat(self.counts * np.exp(self.x / temperature), self.starts))

    def full(self, temperature: float) -> Array:
        """The same over the whole vocabulary."""
        return np.logaddexp(self.tail(temperature), np.log(np.exp(self.head / temperature).sum(1)))

    def error(self, temperature: float, grid: tuple[float, ...], *, full: bool = False) -> tuple[float, float]:
        """Mean and 99th percentile of the interpolation's error in nats."""
        exact, everything = (self.full, self.outcomes + self.head.shape[1]) if full else (self.tail, self.outcomes)
        values = np.stack([np.log(everything), *(exact(t) for t in grid)], 1)
        weights = (tail_weights if len(grid) >= OFF_GRID_NEEDS else polynomial_weights)(temperature, grid)
        error = np.abs(values @ weights - exact(temperature))
        print(f"T={temperature} from {grid}{' (full)' if full else ''}: mean {error.mean():.4f}", end=" ")
        print(f"p99 {np.quantile(error, 0.99):.4f} max {error.max():.4f} nats")
        return float(error.mean()), float(np.quantile(error, 0.99))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


def test_the_fixture_is_a_teacher(teacher: Teacher) -> None:
    assert teacher.outcomes.tolist() == [49152 - 64] * 256
    # centres of bins 1/16 wide: the total is 1 up to half a bin
    np.testing.assert_allclose(teacher.full(1.0), 0.0, atol=1 / 32)
    tail_mass = [float(np.exp(teacher.tail(t) - teacher.full(t)).mean()) for t in (1.0, 2.0, 4.0)]
    print("mass outside the top 64 at T = 1, 2, 4:", " ".join(f"{mass:.3f}" for mass in tail_mass))
    assert tail_mass[0] < 0.15
    assert tail_mass[2] > 0.95


# Measured on this fixture, rounded up by a fifth or so: 0.0078 and 0.0176, 0.0034 and 0.0091.
@pytest.mark.parametrize(
    ("grid", "mean", "p99"), [((1.0, 2.0, 4.0), 0.0095, 0.022), ((1.0, 1.5, 2.0, 4.0), 0.0042, 0.011)]
)
def test_the_error_on_a_real_teacher(teacher: Teacher, grid: tuple[float, ...], mean: float, p99: float) -> None:
    measured = teacher.error(3.0, grid)
    assert measured[0] <= mean
    assert measured[1] <= p99


def test_what_is_refused_is_much_worse(teacher: Teacher) -> None:
    mean, p99 = teacher.error(3.0, (1.0, 2.0, 4.0))
    assert teacher.error(3.0, (1.0, 2.0))[0] > 5 * mean
    assert teacher.error(2.0, (1.0,))[0] > 1.0
    # the full log-partition bends where the head gives way to the tail, sharply so in rows that are nearly certain
    full_mean, full_p99 = teacher.error(3.0, (1.0, 2.0, 4.0), full=True)
    assert full_mean > 2 * mean
    assert full_p99 > 8 * p99


def test_targets_interpolate_so(teacher: Teacher) -> None:
    grid = (1.0, 1.5, 2.0, 4.0)
    targets = SparseTargets(
        ids=torch.arange(64).expand(256, -1).contiguous(),
        logprobs=torch.from_numpy(teacher.head),
        tail=torch.from_numpy(np.stack([teacher.tail(t) for t in grid], 1)),
        outcomes=torch.from_numpy(teacher.outcomes.astype(np.int64)),
        vocab_size=49152,
        temperatures=grid,
    )
    for t, allowed in ((2.0, 1e-12), (3.0, 0.05)):
        at = targets.at(t, "bucket", dtype=torch.float64)
        error = at.log_q_tail.numpy() - (teacher.tail(t) - teacher.full(t))
        assert np.abs(error).max() <= allowed
        np.testing.assert_allclose(at.weights.sum(1) + at.log_q_tail.exp(), 1.0, atol=1e-12)
