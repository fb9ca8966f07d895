"""The tail's log-partition at a temperature that is not stored, by interpolation.

`tail(β) = log Σ p_j^β` over the tokens j of the tail, with β = 1/T, is a smooth convex function of β. It is known at
every stored temperature and, exactly, at β = 0, where it is the logarithm of the number of outcomes. A not-a-knot cubic
spline through these points (de Boor, A Practical Guide to Splines, ch. IV) gives every temperature from the smallest
stored one to infinity. The spline is linear in the values, so one vector of weights serves all rows.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import KDError

if TYPE_CHECKING:
    import torch

# A temperature this close (relatively) to a stored one is that one: float32 schedules meet float64 grids.
ON_GRID = 1e-6
OFF_GRID_NEEDS = 3  # stored temperatures; with two the error at T = 3 is 0.05 nats, with one a whole nat


@lru_cache(maxsize=64)
def spline_table(temperatures: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Knots and coefficients of the spline's weights, for M temperatures and P = M + 1 knots.

    Returns `knots [P]`, ascending in β with knots[0] = 0, and `coefficients [P, 4, P]`: from knots[i] to the next one,
    the weight of value j is `Σ_d coefficients[i, d, j] (β - knots[i])^d`. The values are (log outcomes, tail at each
    temperature in the order given). The last row is that of the last knot alone, where its own value has weight 1; with
    fewer temperatures than OFF_GRID_NEEDS, every row is: they serve only the stored temperatures.
    """
    betas = np.array([0.0, *(1.0 / t for t in temperatures)])
    order = np.argsort(betas, kind="stable")
    knots, n = betas[order], len(betas)
    table = np.zeros((n, 4, n))
    table[:, 0] = np.eye(n)
    if len(temperatures) >= OFF_GRID_NEEDS:
        h = np.diff(knots)
        slope = np.diff(np.eye(n), axis=0) / h[:, None]
        # Unknowns: second derivatives at the knots. Inner rows: the first derivative is continuous. End rows: the
        # third derivative is continuous across the second and the last but one knot.
        system, right = np.zeros((n, n)), np.zeros((n, n))
        for i in range(1, n - 1):
            system[i, i - 1 : i + 2] = h[i - 1], 2.0 * (h[i - 1] + h[i]), h[i]
            right[i] = 6.0 * (slope[i] - slope[i - 1])
        system[0, :3] = h[1], -(h[0] + h[1]), h[0]
        system[-1, -3:] = h[-1], -(h[-2] + h[-1]), h[-2]
        curvature = np.linalg.solve(system, right)
        table[:-1, 1] = slope - h[:, None] * (2.0 * curvature[:-1] + curvature[1:]) / 6.0
        table[:-1, 2] = curvature[:-1] / 2.0
        table[:-1, 3] = (curvature[1:] - curvature[:-1]) / (6.0 * h[:, None])
    in_order_given = np.empty_like(table)
    in_order_given[:, :, order] = table
    return knots, in_order_given


@lru_cache(maxsize=64)
def device_table(temperatures: tuple[float, ...], device: "torch.device") -> "torch.Tensor":
    """`spline_table` in float32 on a device, flat: P knots, then the coefficients. Copied there once and kept."""
    import torch  # the rest of this file needs NumPy alone

    knots, table = spline_table(temperatures)
    return torch.from_numpy(np.concatenate([knots, table.ravel()])).to(device, torch.float32)


def check_temperature(temperature: float, temperatures: Sequence[float]) -> None:
    """Raise KDError unless the targets can serve this temperature."""
    if not temperature > 0 or temperature == float("inf"):
        raise KDError(f"temperature: got {temperature}; expected a positive, finite number.")
    lowest = min(temperatures)
    if temperature < lowest * (1 - ON_GRID):
        raise KDError(
            f"temperature: got {temperature}, below the lowest stored one, {lowest}; the tail is not known there. "
            f"Use T >= {lowest}, or store targets with temperatures down to {temperature}."
        )
    on_grid = any(abs(temperature - t) <= ON_GRID * t for t in temperatures)
    if not on_grid and len(temperatures) < OFF_GRID_NEEDS:
        raise KDError(
            f"temperature: got {temperature}, which is not among the stored {tuple(temperatures)}; interpolating the "
            f"tail needs at least {OFF_GRID_NEEDS} stored temperatures. Use a stored one, or store more of them."
        )


def tail_weights(temperature: float, temperatures: tuple[float, ...]) -> NDArray[np.float64]:
    """Weights `[M + 1]` of (log outcomes, the tail at each stored temperature) in the tail at `temperature`.

    The order is that of `temperatures` after the first entry. At a stored temperature exactly one weight is 1.
    Raises KDError as `check_temperature` does.
    """
    check_temperature(temperature, temperatures)
    for m, stored in enumerate(temperatures):
        if abs(temperature - stored) <= ON_GRID * stored:
            one = np.zeros(len(temperatures) + 1)
            one[m + 1] = 1.0
            return one
    knots, table = spline_table(temperatures)
    beta = 1.0 / temperature
    i = int(np.searchsorted(knots, beta, side="right")) - 1
    return np.asarray((beta - knots[i]) ** np.arange(4) @ table[i], dtype=np.float64)
