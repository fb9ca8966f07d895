"""One result of sweeps out of several over different tokens of the same rows: best tokens and sums."""

import torch
from torch import Tensor

from .config import TopKCall
from .draws import transform
from .fill import Swept, over_temperatures
from .torch_impl import stable_best


def merge(
    best_x: Tensor, best_id: Tensor, top_x: Tensor, sums: Tensor, *, row_top: Tensor, finite: Tensor, call: TopKCall
) -> Swept:
    """`Swept` of tokens that are listed, and of others that are known by sums.

    best_x, best_id `[n, C]`: tokens, of which equal ones have ascending ids; −inf where there is none. C is at least
    `call.entries`, and no other token comes before the first `call.entries` of these.
    top_x `[n, P]`, sums `[n, P, M]`: of P sets of other tokens the greatest logit (−inf: none), and
    `Σ e^((z - z of top_x)/T)`. row_top, finite: see `Swept`.
    """
    values, places = stable_best(best_x, call.entries)
    left_x = best_x.scatter(1, places, -torch.inf)
    tail_top_x = torch.cat([top_x, left_x], 1).amax(1)
    reference = transform(tail_top_x, call)
    reference = torch.where(reference > -torch.inf, reference, 0.0)[:, None]
    inverse_M = over_temperatures(1.0, call.temperatures, sums.device, sums.dtype)
    tail_sums = ((transform(top_x, call) - reference)[:, :, None] * inverse_M).exp_().mul_(sums).sum(1)
    left = transform(left_x, call) - reference
    for m in range(len(call.temperatures)):
        tail_sums[:, m] += (left * inverse_M[m]).exp_().sum(1)
    return Swept(
        best_x=values,
        best_id=best_id.gather(1, places),
        tail_top_x=tail_top_x,
        row_top=row_top,
        finite=finite,
        tail_sums=tail_sums,
        rest=None,
    )
