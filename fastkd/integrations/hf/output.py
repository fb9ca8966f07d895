"""What an attached model returns for a micro-batch with targets."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...models.hub import load_transformers

load_transformers()  # says what to install; and the folder kernels/ of a checkout is not what transformers looks for
from transformers.utils import ModelOutput  # noqa: E402


@dataclass
class DistillOutput(ModelOutput):  # type: ignore[misc]
    """The loss of a micro-batch: a sum over its positions, divided by the positions that count in the whole step.

    hard, soft: its parts, without gradients; others of the objective are in `parts`, by name. logits `[m, V]`: at the
    positions that count, instead of a loss, if they were asked for (`kd_logits=True`).
    """

    loss: Tensor | None = None
    hard: Tensor | None = None
    soft: Tensor | None = None
    parts: dict[str, Any] | None = None
    logits: Tensor | None = None


def output_of(losses: dict[str, Tensor]) -> DistillOutput:
    """From what `Objective.losses` returned."""
    named = {name: losses[name] for name in ("loss", "hard", "soft") if name in losses}
    return DistillOutput(**named, parts={name: one for name, one in losses.items() if name not in named} or None)


def parts_of(output: Any) -> dict[str, Tensor]:
    """The parts of the loss, by name."""
    found = {name: value for name in ("hard", "soft") if (value := output.get(name)) is not None}
    return found | (output.get("parts") or {})
