"""Objectives: what a training minimizes. `TokenKD` is distillation from the targets of a cache.

An objective is any object with the members of `Objective`; `WeightedSum` adds some up. The student calls it inside its
own forward, since under DDP and FSDP2 parameters are complete only there. An objective that is a torch module becomes a
part of the student: its parameters are trained, and saved in checkpoints.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..cache.spec import CacheSpec
from ..errors import TrainError
from ..kernels import KDError, LMHead, LossConfig, kd_loss, linear_kd_loss, resolve_treatment
from ..kernels.loss.config import SCHEDULED
from ..kernels.tail import check_temperature
from ..models.lm_head import LowRankHead, logits_of
from ..models.protocol import Logits, Output
from ..settings import TrainSettings
from ..stream.batch import AnyBatch
from .inner import is_inner
from .optimizer import RAMPS, ramp_at


class Objective(Protocol):
    """A loss, with named parts for the log."""

    @property
    def signals(self) -> Sequence[str]:
        """Fields and signals of a micro-batch that the objective reads, such as `labels`, `targets` and "features/20".
        An attribute will do."""

    @property
    def outputs(self) -> Sequence[str]:
        """Outputs of the student that it reads: some of `OUTPUTS`, and inner states such as "state:16", "module:NAME"
        and "attention:16" (see `inner.py`). An attribute will do."""

    def schedule(self, step: int, steps: int) -> Mapping[str, float]:
        """Numbers that change during the training, at a step (from 0 on) of `steps`. They are logged."""

    def losses(
        self, batch: Any, outputs: Mapping[str, Any], *, num_items: int | Tensor | None, **scheduled: Any
    ) -> dict[str, Tensor]:
        """The loss of a micro-batch under "loss", which is differentiated, and parts of it under other names, which are
        logged: 0-d tensors.

        outputs: the student's, by name. scheduled: the numbers of `schedule`, as 0-d tensors. num_items: the positions
        that count in the whole optimizer step, in all micro-batches of all processes. Each result is a sum over the
        positions of the micro-batch, divided by num_items: the results of all micro-batches are added up.
        """

    def describe(self) -> Mapping[str, Any]:
        """The settings, in values that JSON can hold. A run is resumed only with the same."""


def _logits(output: Output, rows: Any) -> Tensor:
    if isinstance(output, Logits):
        return output.values.flatten(0, -2)[rows]
    return logits_of(output.states.flatten(0, -2)[rows], output.lm_head)


def _states(output: Output, rows: Any) -> Tensor:
    if isinstance(output, Logits):
        raise TrainError("objective: got a student that returns logits; expected hidden states and an LM head.")
    return output.states.flatten(0, -2)[rows]


OUTPUTS: dict[str, Callable[[Output, Any], Any]] = {
    "output": lambda output, rows: output,
    "logits": _logits,
    "states": _states,
}
"""What an objective can read of the student: `output`, what the model returns for all positions (`Hidden` or `Logits`);
`logits` `[m, V]` and `states` `[m, D]` (the last hidden states) at the m positions that count."""


# Metrics that the trainer logs itself: an objective's parts and schedules have other names.
RESERVED = (
    "step", "epoch", "rate", "grad_norm", "positions", "sequences", "positions_per_second", "seconds", "waiting",
    "evaluation",
)  # fmt: skip


def check_objective(objective: Any) -> None:
    """Raise TrainError unless an object has the members of `Objective`, with values of the right types."""
    name, problem = type(objective).__name__, ""
    members = ("signals", "outputs", "schedule", "losses", "describe")
    if isinstance(objective, type):
        problem = f"the class {objective.__name__}; expected an instance of it"
    elif missing := [member for member in members if not hasattr(objective, member)]:
        problem = f"{name} without {', '.join(missing)}; expected the members of fastkd.train.objective.Objective"
    else:
        for member in ("signals", "outputs"):
            value = getattr(objective, member)
            if isinstance(value, str) or not isinstance(value, Sequence):
                problem = f"{name}.{member} = {value!r}; expected a tuple of names"
        unknown = [] if problem else [name for name in objective.outputs if not (name in OUTPUTS or is_inner(name))]
        if unknown:
            known = (*OUTPUTS, "state:LAYER", "module:NAME", "attention:LAYER")
            problem = f"the output {unknown[0]!r}; expected some of {', '.join(known)}"
    if not problem and not isinstance(scheduled := objective.schedule(0, 1), Mapping):
        problem = f"{scheduled!r} from {name}.schedule; expected a mapping of numbers by name"
    elif not problem and (taken := [key for key in scheduled if key in (*RESERVED, "num_items", "loss")]):
        problem = f"a schedule named {taken[0]!r}, which the trainer uses; expected another name"
    if problem:
        raise TrainError(f"objective: got {problem}.")
    try:
        json.dumps(dict(objective.describe()), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TrainError(f"objective: got a {name}.describe() that is not JSON ({error}).") from error


def check_losses(objective: Any, losses: Any) -> Mapping[str, Tensor]:
    """What `Objective.losses` returned. Raises TrainError unless it has "loss", which can be differentiated, and parts
    that are 0-d tensors."""
    name, problem = f"{type(objective).__name__}.losses", ""
    if not isinstance(losses, Mapping) or "loss" not in losses:
        got = f"the names {', '.join(map(str, losses))}" if isinstance(losses, Mapping) else type(losses).__name__
        raise TrainError(f'objective: got {got} from {name}; expected a mapping with "loss" and parts by name.')
    for key, value in losses.items():
        if key in RESERVED:
            problem = f"a part named {key!r}, which the trainer logs itself; expected another name"
        elif not isinstance(value, Tensor):
            problem = f"{value!r} as {key!r} from {name}; expected a 0-d floating-point tensor"
        elif value.ndim or not value.is_floating_point():
            got = f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
            problem = f"{got} as {key!r} from {name}; expected a 0-d floating-point tensor"
    if not problem and torch.is_grad_enabled() and not losses["loss"].requires_grad:
        problem = f'a "loss" without a gradient from {name}; expected one to differentiate'
    if problem:
        raise TrainError(f"objective: got {problem}.")
    return losses


@dataclass(frozen=True)
class TokenKD:
    """Cross-entropy with the labels and a divergence from the teacher's targets (see `LossConfig`), fused with the LM
    head if that is one matrix. Parts: hard, soft.

    alpha_end, temperature_end: their values at the last step; None: as at the first one. The schedules are linear or
    cosine.
    """

    config: LossConfig = field(default_factory=LossConfig)
    alpha_end: float | None = None
    alpha_schedule: str = "linear"
    temperature_end: float | None = None
    temperature_schedule: str = "linear"

    signals: ClassVar[tuple[str, ...]] = ("labels", "targets")
    outputs: ClassVar[tuple[str, ...]] = ("output",)

    def __post_init__(self) -> None:
        for name in ("alpha_schedule", "temperature_schedule"):
            if (value := getattr(self, name)) not in RAMPS:
                raise TrainError(f"{name}: got {value!r}; expected one of {', '.join(RAMPS)}.")
        changes: dict[str, Any] = {"alpha": self.alpha_end, "temperature": self.temperature_end}
        # the values at the last step are checked as those at the first
        replace(self.config, **{name: value for name, value in changes.items() if value is not None})

    @classmethod
    def from_settings(cls, settings: TrainSettings) -> "TokenKD":
        """The objective that the settings describe. Raises TrainError if they are not possible."""
        same = {f.name: getattr(settings, f.name) for f in fields(cls) if f.name != "config"}
        try:
            return cls(settings.loss_config(), **same)
        except KDError as error:
            raise TrainError(str(error)) from error

    def check_cache(self, spec: CacheSpec) -> None:
        """Raise TrainError if a cache lacks what the temperatures and the treatment need."""
        config, end = self.config, self.temperature_end
        first = float(config.temperature)
        last = first if end is None else end
        # between stored temperatures, more of them are needed
        reached = {first, last} | ({(first + last) / 2, (2 * first + last) / 3} if first != last else set())
        if config.treatment == "sampled" and not spec.draws:
            raise TrainError("treatment: got 'sampled', and the cache holds no draws. Use auto, or capture with draws.")
        for temperature in sorted(reached):
            try:
                check_temperature(temperature, spec.temperatures)
                resolve_treatment(
                    config.treatment, temperature, has_draws=spec.draws > 0, has_topk=spec.k > 0,
                    draw_temperature=spec.draw_temperature, divergence=config.divergence,
                )  # fmt: skip
            except KDError as error:
                where = f"The cache has tails at {spec.temperatures}; temperatures up to {max(reached):g} are used."
                raise TrainError(f"{error} {where}") from error

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {
            name: ramp_at(
                step, steps, start=float(getattr(self.config, name)), end=getattr(self, f"{name}_end"),
                schedule=getattr(self, f"{name}_schedule"),
            )
            for name in SCHEDULED
        }  # fmt: skip

    def losses(
        self, batch: AnyBatch, outputs: Mapping[str, Any], *, num_items: int | Tensor | None = None, **scheduled: Any
    ) -> dict[str, Tensor]:
        output: Output = outputs["output"]
        labels, targets = batch.labels.flatten(), batch.targets
        options: dict[str, Any] = {"config": self.config, "num_items": num_items, **scheduled}
        if isinstance(output, Logits):
            return kd_loss(output.values.flatten(0, -2), targets, labels, **options)._asdict()
        states, lm_head = output.states.flatten(0, -2), output.lm_head
        if isinstance(lm_head, LowRankHead):
            states, lm_head = lm_head.widened(states)
        if isinstance(lm_head, LMHead):
            # only hidden states at targets.index go through the LM head, in chunks
            return linear_kd_loss(states, lm_head, targets, labels, **options)._asdict()
        rows = targets.index
        assert rows is not None
        return kd_loss(lm_head(states[rows]), replace(targets, index=None), labels[rows], **options)._asdict()

    def describe(self) -> dict[str, Any]:
        return asdict(self)


AUTO = "auto"


class WeightedSum(nn.Module):
    """A sum of objectives, by name. weights: their factors, 1 by default; "auto", for any but the first term, is found
    in the first steps of the training (see `auto_weight.py`), and 0 until then.

    The log has each term's own loss (without its factor) under its name, and the parts of all terms.
    """

    def __init__(
        self, terms: Mapping[str, Objective], weights: Mapping[str, float | Literal["auto"]] | None = None
    ) -> None:
        super().__init__()
        if not terms or "loss" in terms:
            got = "a term named 'loss', as the sum is" if terms else "no terms"
            raise TrainError(f"WeightedSum: got {got}; expected at least one, of other names.")
        if unknown := sorted(set(weights or {}) - set(terms)):
            raise TrainError(f"WeightedSum: got a weight for {unknown[0]!r}; expected some of {', '.join(terms)}.")
        for term in terms.values():
            check_objective(term)
        given = {name: (weights or {}).get(name, 1.0) for name in terms}
        self.auto = tuple(name for name, weight in given.items() if weight == AUTO)
        if self.auto[:1] == (next(iter(terms)),):
            raise TrainError(f"WeightedSum: got the weight {AUTO!r} for the first term; expected a number.")
        self.terms = dict(terms)
        self.weights = {name: 0.0 if name in self.auto else float(weight) for name, weight in given.items()}
        # a module's name has no dots
        modules = {name.replace(".", "%2E"): one for name, one in terms.items() if isinstance(one, nn.Module)}
        self.term_modules = nn.ModuleDict(modules)
        self.signals = tuple(dict.fromkeys(name for term in self.terms.values() for name in term.signals))
        self.outputs = tuple(dict.fromkeys(name for term in self.terms.values() for name in term.outputs))

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return _merged({name: term.schedule(step, steps) for name, term in self.terms.items()})

    def losses(
        self, batch: Any, outputs: Mapping[str, Any], *, num_items: int | Tensor | None = None, **scheduled: Any
    ) -> dict[str, Tensor]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, term in self.terms.items():
            own = {key: scheduled[key] for key in term.schedule(0, 1)}
            found[name] = dict(check_losses(term, term.losses(batch, outputs, num_items=num_items, **own)))
        losses = {name: parts.pop("loss") for name, parts in found.items()}
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        parts = _merged({"": {name: loss.detach() for name, loss in losses.items()}, **found})
        return {"loss": total, **parts}

    def describe(self) -> dict[str, Any]:
        weights = {**self.weights, **dict.fromkeys(self.auto, AUTO)}
        return {name: {"weight": weights[name], **term.describe()} for name, term in self.terms.items()}


def _merged(by_term: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for term, values in by_term.items():
        if both := sorted(merged.keys() & values.keys()):
            raise TrainError(
                f"WeightedSum: got {both[0]!r} from {term or 'a term'!r} and from another term; expected one."
            )
        merged |= values
    return merged
