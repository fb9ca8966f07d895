"""The optimizer: AdamW with weight decay for matrices only, gradient clipping, and schedules of numbers."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..settings import TrainSettings
from ..utils.distributed import is_dtensor
from .objectives.projector import projector_parameters

FACTOR = "rate_factor"
"""Of a group of parameters: its rate, as a multiple of the others'."""
RATES = ("cosine", "wsd", "linear", "constant")
RAMPS = ("linear", "cosine")


def decay_groups(
    model: nn.Module, weight_decay: float, without: Sequence[nn.Parameter] = ()
) -> list[dict[str, object]]:
    """Trained parameters in two groups: those with weight decay, then those without it: embeddings (and an LM head tied
    to one), biases, norms and all else with fewer than two dimensions. without: parameters to leave out."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    others = {id(p) for p in without}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decays}
    rest = [p for p in trained if id(p) not in chosen]
    groups = ({"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0})
    return [dict(group) for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW with these settings; the rate is set at every step (`set_rate`). Projectors have a group of their own,
    without weight decay. Raises TrainError if no parameter is trained."""
    projectors = projector_parameters(model)
    groups = decay_groups(model, settings.weight_decay, projectors)
    if not groups:
        raise TrainError("student: none of its parameters requires a gradient; there is nothing to train.")
    if projectors:
        own = settings.rate if settings.match_rate is None else settings.match_rate
        factor = own / settings.rate if settings.rate > 0 else 1.0
        groups.append({"params": projectors, "weight_decay": 0.0, FACTOR: factor})
    return torch.optim.AdamW(
        groups, lr=settings.rate, betas=settings.adam_betas, eps=settings.adam_eps, fused=device.type == "cuda"
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of a step; of projectors, by their own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[FACTOR] if FACTOR in group else rate


def clip_all_(model: nn.Module, most: float | None) -> Tensor:
    """Clip the gradients of projectors, and those of all other parameters, each to the norm `most`, and return the norm
    of the others before that. Together, a projector's gradients would make the student's steps shorter."""
    projectors = projector_parameters(model)
    if not projectors:
        return clip_(model.parameters(), most)
    clip_(projectors, most)
    own = {id(p) for p in projectors}
    return clip_([p for p in model.parameters() if id(p) not in own], most)


def clip_(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor:
    """Clip the norm of all gradients to `most` (None: do not), and return the norm before that, 0-d. With FSDP2, every
    process calls it."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), torch.inf if most is None else most)
    return norm.full_tensor() if is_dtensor(norm) else norm


def rate_at(
    step: int, steps: int, *, peak: float, schedule: str, warmup: float = 0.0, floor: float = 0.0, decay: float = 0.2
) -> float:
    """The learning rate of a step (from 0 on) of `steps`.

    Linear warm-up over the fraction `warmup` of the steps; the first step after it has `peak`. Then the schedule:
    "cosine" (half a cosine) or "linear" down to `floor` times the peak at the last step; "wsd", constant and then
    linear over the last fraction `decay` of the steps; "constant". If warm-up and decay overlap, the lower one counts.
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
    """A value that changes from `start` at the first step to `end` at the last. end=None: it is constant."""
    if end is None:
        return start
    part = min(1.0, step / max(1, steps - 1))
    if part in (0.0, 1.0):  # exactly, without rounding
        return end if part else start
    return end + (start - end) * _left(schedule, part)


def _left(schedule: str, part: float) -> float:
    """What is left of a decay, from 1 to 0, after a fraction of it."""
    return 0.5 * (1.0 + math.cos(math.pi * part)) if schedule == "cosine" else 1.0 - part
