"""What a training will do, said before its first step: its steps, evaluations, and what they are measured on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..settings import TrainSettings
from ..utils.words import EXAMPLES, TEXT, Words, counted
from .batch import Size

FEW_STEPS = 50
"""With fewer steps, a student has hardly begun to learn, and a comparison says little."""
ENOUGH_STEPS = 100
FEW_WINDOWS = 8
"""Over fewer held-out windows, an interval says little."""
_EVALUATIONS = 10  # per run, if the settings do not say


class HeldOutSize(NamedTuple):
    """What an evaluation reads. documents: None if it is a part of the split. unit: of documents, for people."""

    windows: int
    positions: int
    documents: int | None = None
    unit: str = "document"

    @property
    def words(self) -> Words:
        """The words for its data."""
        return EXAMPLES if self.unit == "example" else TEXT

    def __str__(self) -> str:
        if self.words is not TEXT:
            return self.words.counted(self.positions, self.windows, before="held-out")
        parts = [] if self.documents is None else [counted(self.documents, f"held-out {self.unit}")]
        if self.unit == "document" or self.documents is None:
            parts.append(counted(self.windows, "window" if parts else "held-out window"))
        return ", ".join([*parts, counted(self.positions, "position")])

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"windows": self.windows, "positions": self.positions}
        if self.documents is not None:
            found = {"documents": self.documents, **found}
        return found if self.unit == "document" else {**found, "unit": self.unit}


@dataclass(frozen=True)
class Outline:
    """A training before it begins. steps: in all; per_epoch: of an epoch. batch: of a step, in words. every: steps
    between evaluations, 0 for none. held_out: what an evaluation reads, None if that is not known. why: there are no
    evaluations, as a sentence; or "". doubts: about settings, for people. by_steps: whether their number was given, and
    not that of epochs."""

    steps: int
    per_epoch: int
    batch: str
    every: int
    held_out: HeldOutSize | None = None
    why: str = ""
    doubts: tuple[str, ...] = ()
    by_steps: bool = False

    @property
    def evaluations(self) -> int:
        """Their number: one more at the end, if that is not due anyway."""
        return -(-self.steps // self.every) if self.every else 0

    @property
    def lines(self) -> list[str]:
        """For people, before the first step."""
        epochs = self.steps / self.per_epoch
        each = "less than one epoch" if epochs < 1 else f"{epochs:.3g} epoch{'s' * (epochs != 1)}"
        lines = [f"training: {counted(self.steps, 'step')} of {self.batch}, {each}"]
        if self.every:
            when = f"after every {self.every} steps" if self.every > 1 else "after every step"
            at_end = "at the end" if self.every >= self.steps else when
            on = f", on {self.held_out}" if self.held_out is not None else ""
            lines.append(f"evaluations: {self.evaluations}, {at_end}{on}")
        else:
            lines.append(f"evaluations: none{', as ' * bool(self.why)}{self.why.rstrip('.')}")
        return lines + self.warnings

    @property
    def warnings(self) -> list[str]:
        """What a person should change, if anything."""
        doubts = [f"warning: {text}" for text in self.doubts]
        held = self.held_out
        if self.every and held is not None and held.words is TEXT and held.windows < FEW_WINDOWS:
            doubts.append(
                f"warning: intervals over {counted(held.windows, 'held-out window')} will be wide. More data give more "
                "of them, or a cache with a shorter --context or a larger --held-out."
            )
        if self.steps >= FEW_STEPS:
            return doubts
        epochs = max(2, math.ceil(ENOUGH_STEPS / self.per_epoch))
        more = f"--epochs {epochs} makes {epochs * self.per_epoch}"
        if self.by_steps:  # which --epochs would not change
            more = f"--steps {ENOUGH_STEPS} is {ENOUGH_STEPS / self.per_epoch:.3g} times the data"
        return [
            *doubts,
            f"warning: {few_steps(self.steps)} to learn from, and a comparison after fewer than "
            f"{FEW_STEPS} says little. {more}; more data are better still.",
        ]

    def to_json(self) -> dict[str, Any]:
        held = None if self.held_out is None else self.held_out.to_json()
        return {
            "steps": self.steps, "steps_per_epoch": self.per_epoch, "batch": self.batch,
            "evaluations": self.evaluations, "evaluate_every": self.every, "held_out": held,
            "no_evaluations": self.why or None, "warnings": self.warnings,
        }  # fmt: skip


def few_steps(steps: int) -> str:
    """The beginning of a sentence about their number."""
    return f"{counted(steps, 'step')} {'is too little' if steps == 1 else 'are few'}"


def steps_of(settings: TrainSettings, per_epoch: int) -> int:
    """Optimizer steps of a training. per_epoch: the length of its source."""
    return settings.steps or max(1, math.ceil(settings.epochs * per_epoch))


def evaluate_every_of(settings: TrainSettings, steps: int) -> int:
    """Steps between evaluations of a training that is evaluated; 0 for never."""
    every = settings.evaluate_every
    return max(1, steps // _EVALUATIONS) if every is None else every


def outline_of(
    settings: TrainSettings,
    per_epoch: int,
    *,
    size: Size | None = None,
    held_out: HeldOutSize | None = None,
    why: str = "",
    doubts: Sequence[str] = (),
) -> Outline:
    """The outline of a training with these settings, whose source has `per_epoch` steps. size: what an epoch reads, if
    that is known: no step has more. held_out, why, doubts: see `Outline`; with neither of the first two, it is
    evaluated by a function of the caller."""
    steps = steps_of(settings, per_epoch)
    every = 0 if why else evaluate_every_of(settings, steps)
    words = TEXT if held_out is None else held_out.words
    batch = "its own size"
    if settings.batch_size is not None:
        most = settings.batch_size if size is None else min(settings.batch_size, size.sequences)
        batch = counted(most, "sequence" if words is TEXT else words.window)
    elif size is not None and settings.batch_tokens is not None and size.positions <= settings.batch_tokens:
        batch = counted(size.positions, words.position)
    elif settings.batch_tokens is not None:
        batch = f"about {settings.batch_tokens:,} {words.positions}"
    why = why or ("evaluate_every is 0" if not every else "")
    if settings.steps and settings.epochs != TrainSettings.epochs:
        doubts = [*doubts, f"--steps {settings.steps} counts, and --epochs {settings.epochs:g} does not."]
    return Outline(steps, per_epoch, batch, every, held_out, why, tuple(doubts), by_steps=bool(settings.steps))
