"""What the two implementations of top-k share: what is asked (Plan), the room for the answer (Rows), bad rows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KDError
from ..targets import SparseTargets

MAX_POWER = 8  # of an exponential, that another is made as


@dataclass(frozen=True)
class Plan:
    """What to make of a row of `vocab_size` logits, checked."""

    vocab_size: int
    k: int  # at most vocab_size
    temperatures: tuple[float, ...]
    mass: float | None
    draws: int
    draw_temperature: float
    seed: int
    softcap: float | None
    logit_scale: float | None

    def unfilled(self, rows: int, device: torch.device) -> SparseTargets:
        """Targets of some rows, to be filled."""
        return SparseTargets.empty(
            rows,
            self.k + self.draws,
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            draws=self.draws > 0,
            draw_temperature=self.draw_temperature,
            device=device,
        )

    def chains(self) -> tuple[tuple[int, int], ...]:
        """The order in which e^(z/T) is computed: (temperature's number, power of the one before, or 0 for afresh).

        An exponential costs several multiplications: e^(z/2) is the square of e^(z/4), e^z the fourth power. A power
        has as many times the error: beyond the eighth (MAX_POWER) it is computed afresh.
        """
        left = sorted(range(len(self.temperatures)), key=lambda m: -self.temperatures[m])
        steps: list[tuple[int, int]] = []
        while left:
            last, power, whole = left.pop(0), 0, 1
            steps.append((last, power))
            for m in list(left):
                power = round(ratio := self.temperatures[last] / self.temperatures[m])
                if power in (2, 4) and ratio == power and whole * power <= MAX_POWER:
                    steps.append((m, power))
                    whole *= power
                    left.remove(m)
                    last = m
        return tuple(steps)


def refuse(fine_n: Tensor, top_x: Tensor, first_row: int) -> None:
    """On the CPU: raise KDError for the first row that is not fine. Elsewhere looking would wait for the device.

    top_x: the rows' greatest logits as they were given.
    """
    if fine_n.device.type != "cpu" or bool(fine_n.all()):
        return
    row = int((~fine_n).nonzero()[0, 0])
    top = float(top_x[row])
    if math.isfinite(top):
        raise KDError(
            f"logits: row {first_row + row} has logits out of float32's range, after logit_scale or relative to the "
            f"row's best (as given {top:g}); smaller numbers are needed, or -inf for tokens that are no outcomes.",
            row=first_row + row,
        )
    found = "no finite logit" if top == -torch.inf else "NaN" if top != top else "+inf"
    raise KDError(
        f"logits: row {first_row + row} has {found}; finite numbers are needed, -inf only for tokens that are no "
        "outcomes, and at least one token must be an outcome.",
        row=first_row + row,
    )
