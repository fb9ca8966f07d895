"""The loss on a GPU: launches of the Triton kernels. Nothing waits for the device."""

from functools import cache, update_wrapper
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_math
from ..divergences import Divergence, find_divergence
from ..errors import KDError
from ..tail import OFF_GRID_NEEDS, ON_GRID, device_table
from ..treatment import sampled_reach
from ..triton_math import back_end, is_interpreted, on_device
from ..vocab_parallel import all_gather, locate_part, read_part
from .call import Call, RowOptions, split
from .checks import check_student, check_values, values_are_checked
from .config import HIGHEST_TEMPERATURE, SCHEDULED
from .row_passes import sweep_settings, zero_uncovered_kernel
from .triton_kernels import (
    BUCKET,
    DIVISOR,
    MERGED,
    OWN,
    RENORMALIZE,
    SAMPLED,
    SUMS,
    WEIGHTS,
    WHOLE,
    loss_kernel,
    prepare_kernel,
    total_kernel,
)  # fmt: skip

INTERPRETED = is_interpreted(loss_kernel)


@cache
def loss_kernel_of(divergence: Divergence) -> Any:
    """The loss kernel of one divergence: a copy of `loss_kernel` whose `outcome_terms` is the divergence's function.

    It compiles to what a constant argument would give. (Triton takes functions as arguments only in newer versions.)
    """
    terms = divergence.triton_terms
    if isinstance(terms, FunctionType):
        terms.__globals__.update(tl=tl, tm=triton_math)
        terms = triton.jit(terms)
    kernel = loss_kernel.fn
    names = {**kernel.__globals__, "outcome_terms": terms}
    copy = FunctionType(kernel.__code__, names, kernel.__name__, kernel.__defaults__, kernel.__closure__)
    return triton.jit(update_wrapper(copy, kernel))


class TritonRows:
    """The rows of one call on a GPU: `TorchRows` without reading any value. Rows that do not count are computed too."""

    def __init__(self, call: Call, positions: int, width: int, dtype: torch.dtype, options: RowOptions) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise KDError(f"{options.what}: got {dtype}; expected float32, bfloat16 or float16 with impl='triton'.")
        targets, device = call.targets, call.targets.device
        self.part = None  # of a divided vocabulary: first column here, and columns on all ranks, int64 [2]
        total = width
        if call.group is not None:
            parts = call.exchange_parts(width, options)
            self.part = locate_part(call.group, parts, targets.vocab_size)
            if values_are_checked(device):
                total = read_part(call.group, parts, targets.vocab_size, options.what).total
        if values_are_checked(device):
            check_values(call, positions, total)
        self.call, self.index, self.rows, self.options = call, targets.index, call.rows, options
        self.width, self.positions = width, positions
        grid = targets.temperatures
        m = len(grid)
        self.block_m = triton.next_power_of_2(m + 1)
        self.params = torch.empty(WEIGHTS.value + m + 1, dtype=torch.float32, device=device)
        self.divisor = self.params[DIVISOR.value]
        # float32, and summed by one program in one order
        self.hard, self.soft = torch.empty(2, max(self.rows, 1), dtype=torch.float32, device=device)
        # where it depends on a tensor, the kernel decides between the draws and the bucket
        treatment, reach = call.treatment(None), float("inf")
        if treatment == "auto":
            treatment, reach = "sampled", sampled_reach(targets.draw_temperature)
        (alpha, alpha_tensor), (t, t_tensor) = (split(getattr(call.config, name)) for name in SCHEDULED)
        with on_device(self.params):
            prepare_kernel[(1,)](
                self.params, device_table(grid, device), call.labels, call.mask, self.index, call.num_items,
                options.upstream, alpha_tensor, t_tensor, alpha, t, call.items, self.rows, positions,
                call.config.ignore_index, reach, options.fixed_scale or 0.0,
                M=m, OFF_GRID=m >= OFF_GRID_NEEDS, SNAP=ON_GRID, HIGHEST=HIGHEST_TEMPERATURE, BLOCK=4096,
                BLOCK_M=self.block_m, num_warps=8,
            )  # fmt: skip
            settings = sweep_settings(width, dtype.itemsize, *back_end())
        self.kernel = loss_kernel_of(find_divergence(call.config.divergence))
        self.constants: dict[str, Any] = dict(
            TREATMENT={"bucket": BUCKET, "sampled": SAMPLED, "renormalize": RENORMALIZE}[treatment],
            M=m,
            BLOCK_K=max(16, triton.next_power_of_2(targets.width)),
            BLOCK_M=self.block_m,
            **settings,
        )
        contiguous = (x if x is None else x.contiguous() for x in (targets.ids, targets.logprobs, targets.draws))
        self.pointers = (call.labels, call.mask, call.weights, self.index, *contiguous, targets.tail.contiguous())

    def loss_(self, x_CV: Tensor, first: int) -> None:
        """Losses of the rows from `first` on, whose raw logits x holds; x becomes their gradient, if one is wanted."""
        x_1CV = x_CV[None]
        self._launch(x_1CV, x_1CV if self.options.want_grad else None, len(x_CV), first, by_position=False)

    def loss_at_positions(self, logits: Tensor, out: Tensor | None) -> None:
        """Losses of all rows, at their positions in the logits `[..., V]`; their gradient goes to `out`."""
        if any(self.width * abs(x.stride(-1)) >= 2**31 for x in (logits, out) if x is not None):
            raise KDError(
                f"logits: got a stride of {logits.stride(-1)} between the {self.width} outcomes of a row, which then "
                "span more than 2^31 elements; pass logits.contiguous()."
            )
        logits_BLV = _as_three(logits)
        if out is None:
            return self._launch(logits_BLV, None, self.rows, 0, by_position=True)
        out_BLV = logits_BLV if out is logits else _as_three(out)
        self._launch(logits_BLV, out_BLV, self.rows, 0, by_position=True)
        index = self.safe_index()
        if index is not None and self.positions:
            covered = torch.zeros(self.positions + 1, dtype=torch.int8, device=out.device)
            covered[index] = 1
            with on_device(out_BLV):
                zero_uncovered_kernel[(self.positions,)](
                    out_BLV, covered, *out_BLV.stride(), out_BLV.shape[1], self.width, BLOCK=4096, num_warps=8
                )
        if out_BLV.data_ptr() != out.data_ptr():
            out.copy_(out_BLV.view(out.shape))

    def safe_index(self) -> Tensor | None:
        """The positions of the rows, int64 `[P]`, N for those outside the batch; None where they are all, in order."""
        if self.index is None:
            return None
        inside = (self.index >= 0) & (self.index < self.positions)
        return torch.where(inside, self.index, self.positions).long()

    def counted(self) -> Tensor | None:
        """Which rows count, bool `[P]`; None where all do. The kernels write zeros for the others."""
        if self.call.labels is None and self.call.mask is None and self.index is None:
            return None
        return self.call.by_row(self.positions)[1]

    def _launch(self, x: Tensor, g: Tensor | None, programs: int, first: int, *, by_position: bool) -> None:
        if programs == 0:
            return
        if self.call.group is None:
            return self._run(WHOLE, x, g, programs, first, by_position, None, 1)
        own = torch.empty(programs, SUMS.value + self.call.targets.width, dtype=torch.float32, device=x.device)
        self._run(OWN, x, None, programs, first, by_position, own, 1)
        by_rank = all_gather(own, self.call.group)
        self._run(MERGED, x, g, programs, first, by_position, by_rank, len(by_rank))

    def _run(
        self, stage: Any, x: Tensor, g: Tensor | None, programs: int, first: int, by_position: bool,
        statistics: Tensor | None, ranks: int,
    ) -> None:  # fmt: skip
        call, targets, options = self.call, self.call.targets, self.options
        if self.constants["EDGES"]:  # the kernel finds where a row's vectors start
            x_aligned, g_aligned = True, g is None or lie_alike(x, g)
        else:
            x_aligned, g_aligned = lies_in_vectors(x), g is None or lies_in_vectors(g)
        with on_device(x):
            self.kernel[(programs,)](
                x, g, self.hard, self.soft, self.params, self.part, statistics, ranks, *self.pointers, targets.outcomes,
                *x.stride(), *(x if g is None else g).stride(), x.shape[1], first,
                self.width, targets.vocab_size, targets.width, self.positions,
                targets.outcomes.stride(0) if targets.outcomes.ndim else 0, call.config.ignore_index,
                1.0 / targets.draw_temperature, call.config.parameter, options.softcap, options.logit_scale,
                BY_POSITION=by_position, X_ALIGNED=x_aligned, G_ALIGNED=g_aligned,
                STAGE=stage, WANT_GRAD=g is not None, BLOCK_R=triton.next_power_of_2(ranks), **self.constants,
            )  # fmt: skip

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, hard and soft."""
        if values_are_checked(self.params.device):
            bad = self.soft[: self.rows].isnan()
            check_student(bad if self.call.labels is None else bad | self.hard[: self.rows].isnan(), self.options.what)
        loss, hard, soft = (torch.empty((), dtype=torch.float32, device=self.params.device) for _ in range(3))
        with on_device(self.params):
            total_kernel[(1,)](
                self.hard, self.soft, self.params, hard, soft, loss, self.rows,
                HARD=self.call.labels is not None, BLOCK=4096, num_warps=8,
            )  # fmt: skip
        return loss, hard, soft


def _as_three(x: Tensor) -> Tensor:
    """`[..., V]` as `[B, L, V]`: two strides address every position, so that no slice has to be copied.

    A copy only where more leading dimensions do not collapse into two.
    """
    return x[None] if x.ndim == 2 else x.flatten(0, -3)


def lies_in_vectors(x: Tensor) -> bool:
    """Whether every row of x `[B, L, V]` starts at a 16-byte boundary."""
    return all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1]) and x.data_ptr() % 16 == 0


def lie_alike(x: Tensor, g: Tensor) -> bool:
    """Whether each row of x and of g `[B, L, V]` is dense and lies at the same distance from a 16-byte boundary."""
    if not x.stride(-1) == g.stride(-1) == 1:
        return False
    steps = zip(x.stride()[:-1], g.stride()[:-1], strict=True)
    alike = all((a - b) * x.element_size() % 16 == 0 for a, b in steps)
    return alike and (x.data_ptr() - g.data_ptr()) % 16 == 0
