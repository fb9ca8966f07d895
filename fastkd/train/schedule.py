"""What changes from step to step: the rate, alpha and the temperature, as pure functions of (step, steps)."""

import math

RATES = ("cosine", "wsd", "linear", "constant")
RAMPS = ("linear", "cosine")


def rate_at(
    step: int, steps: int, *, peak: float, schedule: str, warmup: float = 0.0, floor: float = 0.0, decay: float = 0.2
) -> float:
    """The learning rate of a step (from 0 on) of `steps`.

    It rises in a straight line over the first `warmup` of the steps, `peak` being that of the first step after them,
    and falls to `floor` times the peak at the last step: along half a cosine, in a straight line, or (wsd) in a
    straight line over the last `decay` of the steps; or it does not fall. Where warm-up and decay meet, it is the
    lower of the two.
    """
    rising = round(warmup * steps)
    if step < rising:
        up = (step + 1) / (rising + 1)
    else:
        up = 1.0
    if schedule == "constant":
        return peak * up
    begin = max(rising, steps - max(1, round(decay * steps))) if schedule == "wsd" else rising
    # the first step has the peak, the last one the floor
    part = min(1.0, max(0.0, (step - begin) / max(1, steps - 1 - begin)))
    return peak * min(up, floor + (1.0 - floor) * _left("cosine" if schedule == "cosine" else "linear", part))


def ramp_at(step: int, steps: int, *, start: float, end: float | None, schedule: str = "linear") -> float:
    """A value that goes from `start` at the first step to `end` at the last; None: it stays."""
    if end is None:
        return start
    part = min(1.0, step / max(1, steps - 1))
    if part in (0.0, 1.0):  # exactly what was asked for, without a rounding
        return end if part else start
    return end + (start - end) * _left(schedule, part)


def _left(schedule: str, part: float) -> float:
    """How much of a fall is left after a part of it: from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * part)) if schedule == "cosine" else 1.0 - part
