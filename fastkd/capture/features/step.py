"""The step of a feature by the KL divergence that it costs: the teacher's remaining layers run on the coded states."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...data.documents import Documents
from ...data.examples import Examples
from ...errors import DataError, TeacherError
from ...kernels import HiddenTargets
from ...models.lm_head import logits_of
from ...models.taps import Taps, layers_of, replaced
from ...teachers.protocol import Answer, Hidden, Teacher, TopK
from ..feature_places import Place, network_of
from ..rows import ShardRows, teacher_inputs
from ..window_plan import WindowPlan
from .sample import POSITIONS, batches_of, first_rows

KL_POSITIONS = 2048
"""Positions on which the divergence is measured."""
SMALLEST, LARGEST = 1e-3, 8.0  # steps
_CLOSE = 1.05  # two steps whose ratio is at most this are not told apart
_ROWS = 256  # of logits at a time
_EXACT = 1e-3  # of the divergence asked for, that the teacher may have when it is run on from its own states


@dataclass(frozen=True)
class StepSearch:
    """A step whose divergence is at most `feature_kl`, and the next larger one that was tried.

    kl, next_kl: nats, the mean divergence of the teacher run on from coded states from the teacher, over `positions`.
    next_step, next_kl: None if the largest step is fine enough.
    """

    feature_kl: float
    step: float
    kl: float
    next_step: float | None
    next_kl: float | None
    positions: int

    def to_notes(self) -> str:
        """As the notes of a feature's spec."""
        return json.dumps({"step_search": asdict(self)})

    def text(self, name: str) -> str:
        """One line for a person."""
        line = f"feature {name}: step {self.step:g} gives KL {self.kl:.3g} nats on {self.positions:,} positions"
        return line + (f", step {self.next_step:g} gives {self.next_kl:.3g}" if self.next_step else "")


def found_in(notes: str) -> StepSearch | None:
    """The search that a spec's notes tell of; None if they tell of none."""
    try:
        return StepSearch(**json.loads(notes)["step_search"])
    except (ValueError, TypeError, KeyError):
        return None


def find_step(
    teacher: Teacher,
    data: Documents | Examples,
    plan: WindowPlan,
    place: Place,
    basis: Any,
    positions: str,
    target: float,
    share: Callable[[float], float] = lambda kl: kl,
) -> StepSearch:
    """The largest step, found by bisection of its logarithm, that changes the teacher's distribution by at most
    `target` nats, on average over some positions behind those of the basis.

    basis: see `Codes`. share: makes a number the same in all processes of a worker.
    Raises TeacherError if the teacher cannot be run on from this place, or needs a smaller step than there is.
    """
    rest = _Rest(teacher, data, plan, place, positions)
    exact = share(rest.divergence(lambda states: states))
    if not exact <= _EXACT * target:
        raise TeacherError(
            f"feature {place.name}: run on from {place.what}, the teacher answers differently (KL {exact:.3g}), so no "
            "step can be found by --feature-kl. Use --feature-step."
        )

    def measured(step: float) -> float:
        return share(rest.divergence(lambda x: HiddenTargets.from_states(x, basis, step).states()))

    low, high = _bisect(measured, target)
    if low is None:
        assert high is not None
        raise TeacherError(
            f"feature_kl: got {target:g}; expected at least {high[1]:.3g}, what the smallest step ({high[0]:g}) costs "
            f"at {place.what}."
        )
    step, kl = low
    next_step, next_kl = (None, None) if high is None else high
    return StepSearch(target, step, kl, next_step, next_kl, rest.count)


def _bisect(
    measured: Callable[[float], float], target: float
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """The largest step with at most this divergence, and the smallest with more, each with its divergence; None for one
    that is not among the possible steps."""
    step, low, high = 0.2, None, None
    while low is None or high is None or high[0] > _CLOSE * low[0]:
        here = step, measured(step)
        if here[1] <= target:
            low = here
        else:
            high = here
        if low is not None and high is not None:
            step = float(f"{math.sqrt(low[0] * high[0]):.3g}")
            if step in (low[0], high[0]):
                break
        elif low is not None:
            if step == LARGEST:
                break
            step = min(LARGEST, 2 * step)
        else:
            if step == SMALLEST:
                break
            step = max(SMALLEST, step / 2)
    return low, high


class _Rest:
    """The rest of a teacher, from a place on, on some batches of a plan. count: positions that are compared."""

    def __init__(
        self, teacher: Teacher, data: Documents | Examples, plan: WindowPlan, place: Place, positions: str
    ) -> None:
        self._teacher, self._place, self.count = teacher, place, 0
        network = network_of(teacher)
        layers = layers_of(network)[: place.tap.layer] if place.tap.layer is not None else []
        plain = dict.fromkeys(range(len(layers)), False)  # whether a layer returns a tensor
        handles = [layer.register_forward_hook(_notes_kind(plain, i)) for i, layer in enumerate(layers)]
        self._batches: list[tuple[Tensor, Tensor, Tensor, Answer]] = []
        try:
            with Taps(network, [place.tap]) as taps, torch.inference_mode():
                for rows in _slice(plan, data, positions):
                    for segments in batches_of(rows, plan.settings.batch_tokens):
                        which, flat = rows.placed(segments)
                        counts = rows.counts[which]
                        if not counts.any():
                            continue
                        inputs = teacher_inputs(rows, data, segments).to(teacher.device)
                        answer = teacher(inputs)
                        if isinstance(answer, TopK):
                            raise TeacherError("feature_kl: got a teacher of top-k entries. Use --feature-step.")
                        state = taps.take()[place.tap.name]
                        chosen = torch.from_numpy(flat[counts]).to(teacher.device)
                        self._batches.append((inputs, state, chosen, answer))
                        self.count += len(chosen)
        finally:
            for handle in handles:
                handle.remove()
        self._skipped: Sequence[nn.Module] = layers if all(plain.values()) else ()
        if not self.count:
            raise DataError("feature_kl: none of the first positions has a target to compare. Use --feature-step.")

    @torch.inference_mode()
    def divergence(self, changed: Callable[[Tensor], Tensor]) -> float:
        """Mean KL divergence, in nats, of the teacher run on from changed vectors `[n · P, W]` from the teacher."""
        total = 0.0
        for inputs, state, flat, answer in self._batches:
            rows = torch.arange(state.numel() // math.prod(self._place.shape), device=state.device)
            value = self._place.value_of(changed(self._place.vectors_of(state, rows).float()), state)
            with replaced(self._place.tap, value, self._skipped):
                other = self._teacher(inputs)
            total += sum(_kl(answer, other, flat[start : start + _ROWS]) for start in range(0, len(flat), _ROWS))
        return total / self.count


def _notes_kind(plain: dict[int, bool], number: int) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, result: Any) -> None:
        plain[number] = isinstance(result, Tensor)

    return hook


def _slice(plan: WindowPlan, data: Documents | Examples, positions: str) -> Iterator[ShardRows]:
    """Rows behind those that a basis is learnt from; in a small dataset, the same."""
    behind = int((plan.shard_rows < POSITIONS).sum())  # the first shard that begins behind them
    skip = behind if plan.totals["positions"] - int(plan.shard_rows[min(behind, plan.shards)]) >= KL_POSITIONS else 0
    return (rows for _, rows in first_rows(plan, data, positions, KL_POSITIONS, skip))


def _kl(answer: Answer, other: Answer, flat: Tensor) -> float:
    """The sum over some rows of KL(answer ‖ other)."""
    p, q = (_logits(x, flat).float().log_softmax(-1) for x in (answer, other))
    # a token that the teacher masks has p = 0 and p − q = NaN
    return float((p.exp() * (p - q).nan_to_num(nan=0.0)).sum(dtype=torch.float64))


def _logits(answer: Answer, flat: Tensor) -> Tensor:
    assert not isinstance(answer, TopK)
    values = answer.states if isinstance(answer, Hidden) else answer.values
    rows = values.reshape(-1, values.shape[-1])[flat]
    return logits_of(rows, answer.lm_head) if isinstance(answer, Hidden) else rows
