"""TopKConfig: what is kept of a teacher's logits, as one object; and what a call adds to it. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any, TypedDict

from ..arguments import whole_number
from ..errors import KDError

# Least and greatest of each number: beyond, float32 arithmetic on real logits overflows or keeps no digits.
TEMPERATURES = (1e-3, 1e6)
SOFTCAPS = (1e-3, 1e4)
LOGIT_SCALES = (1e-30, 1e30)
MAX_POWER = 8  # of one exponential, as which another is computed


@dataclass(frozen=True)
class TopKConfig:
    """Settings of `topk_targets` and `linear_topk_targets`. Raises KDError for a value that is never valid."""

    k: int
    """Top-k entries a row: the first k of a stable descending sort of the logits (of equal logits the lower id comes
    first), and at most the vocabulary. 0 with draws: no top-k entries at all."""
    mass: float | None = None
    """Drop a row's top-k entries after the one at which their probability (T = 1) reaches this; what is dropped belongs
    to the tail. None or 1: keep all k."""
    draws: int = 0
    """Tokens drawn a row, with replacement, from the tail's softmax at `draw_temperature`. Equal ones are merged with
    their count."""
    draw_temperature: float = 1.0
    """Temperature of the draws, from 0.001 to 1e6: below, a logit's own rounding decides what is drawn; above, only the
    number of outcomes does."""
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    """Temperatures at which the tail's log-partition is stored, each from 0.001 to 1e6; 1.0 must be among them."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "k": int(whole_number("k", self.k, "an integer", 0)),
            "draws": int(whole_number("draws", self.draws, "an integer", 0)),
            # an int of any size: it is used modulo 2^64
            "seed": self.seed if type(self.seed) is int else int(whole_number("seed", self.seed, "an integer")),
            "mass": None if self.mass is None else _number("mass", self.mass, (0.0, 1.0)),
            "draw_temperature": _number("draw_temperature", self.draw_temperature, TEMPERATURES),
            "temperatures": _temperatures(self.temperatures),
        }
        if not checked["k"] and not checked["draws"]:
            raise KDError("k: got 0 with draws=0, which keeps nothing; expected k >= 1, or draws >= 1.")
        if checked["mass"] == 0:
            raise KDError("mass: got 0; expected a probability above 0 and at most 1, or None.")
        if checked["mass"] == 1:
            checked["mass"] = None  # reached with the last outcome, after which nothing is left to drop
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def width(self, vocab_size: int) -> int:
        """Entries a row of the targets: top-k entries and draws."""
        return min(self.k, vocab_size) + self.draws


class TopKSettings(TypedDict, total=False):
    """The fields of TopKConfig but k, as keyword arguments."""

    mass: float | None
    draws: int
    draw_temperature: float
    temperatures: Sequence[float]
    seed: int


def topk_config(k: int | None, config: TopKConfig | None, settings: TopKSettings) -> TopKConfig:
    """The config of a call: `config`, or the default, with the fields that are given in place of its own."""
    given: dict[str, Any] = {**settings} if k is None else {**settings, "k": k}
    if config is None:
        if k is None:
            raise KDError("k: got none; expected the number of top-k entries a row, or a TopKConfig as config.")
        return TopKConfig(**given)
    return replace(config, **given)


@dataclass(frozen=True, kw_only=True)
class TopKCall(TopKConfig):
    """One call of top-k, as all implementations receive it: the config, and what it is applied to.

    vocab_size: tokens of a row. softcap, logit_scale: the LM head's transform of a logit, or None.
    """

    vocab_size: int
    softcap: float | None = None
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softcap is not None:
            object.__setattr__(self, "softcap", _number("softcap", self.softcap, SOFTCAPS))
        if self.logit_scale is not None:
            scale = _number("logit_scale", self.logit_scale, LOGIT_SCALES)
            object.__setattr__(self, "logit_scale", None if scale == 1 else scale)

    @property
    def entries(self) -> int:
        """Top-k entries a row: k, or the vocabulary where that is smaller."""
        return min(self.k, self.vocab_size)

    def chains(self) -> tuple[tuple[int, int], ...]:
        """The order in which e^(z/T) is computed: (index of the temperature, power of the one before, or 0 if computed
        from z).

        An exponential costs several multiplications: e^(z/2) is the square of e^(z/4), e^z the fourth power. A power
        multiplies the relative error, so that beyond the eighth (MAX_POWER) it is computed from z.
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


def _temperatures(temperatures: Any) -> tuple[float, ...]:
    least, greatest = TEMPERATURES
    try:
        grid = tuple(float(t) for t in temperatures) if isinstance(temperatures, Iterable) else ()
    except (TypeError, ValueError):
        grid = ()
    if 1.0 not in grid or len(set(grid)) != len(grid) or not all(least <= t <= greatest for t in grid):
        raise KDError(
            f"temperatures: got {grid or temperatures!r}; expected distinct numbers from {least:g} to {greatest:g} "
            "with 1.0 among them."
        )
    return grid


def _number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = nan
    if not bounds[0] <= number <= bounds[1]:
        raise KDError(f"{name}: got {value!r}; expected a number from {bounds[0]:g} to {bounds[1]:g}.")
    return number
