"""OnPolicyKD: distillation from the data and from what the student says itself.

Positions of the data have the loss of `TokenKD`. Those of a student's own continuation have the divergence alone, which
is alpha = 0: a label that the student has sampled is no truth to learn (Agarwal et al., "On-Policy Distillation of
Language Models", ICLR 2024). They lie in micro-batches of their own, so that alpha is one number in each, as kernels
take it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..live.rollouts import RolloutBatch
from ..stream.batch import AnyBatch
from .objective import TokenKD


@dataclass(frozen=True)
class OnPolicyKD(TokenKD):
    """`TokenKD` for a source with rollouts. Parts: hard and soft, means over the positions of the data; rollout/soft, a
    mean over those of the rollouts."""

    def losses(
        self, batch: AnyBatch, outputs: Mapping[str, Any], *, num_items: int | Tensor | None = None, **scheduled: Any
    ) -> dict[str, Tensor]:
        sampled = isinstance(batch, RolloutBatch)
        if sampled:
            scheduled["alpha"] = torch.zeros_like(torch.as_tensor(scheduled.get("alpha", self.config.alpha)))
        found = super().losses(batch, outputs, num_items=num_items, **scheduled)
        rollouts = batch.counts.get("rollouts", 0)
        own = rollouts if sampled else batch.counts.get("targets", 0) - rollouts
        total = batch.count if num_items is None else num_items
        hard, soft = (found[name] * (total / max(1, own)) for name in ("hard", "soft"))
        none = torch.zeros_like(soft)
        parts = (none, none, soft) if sampled else (hard, soft, none)
        return {"loss": found["loss"], **dict(zip(("hard", "soft", "rollout/soft"), parts, strict=True))}
