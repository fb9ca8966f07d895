"""DistillTrainer: transformers' Trainer on a cache.

from fastkd.integrations.hf import DistillTrainer
trainer = DistillTrainer(model, TrainingArguments("run", per_device_train_batch_size=8), cache="my-cache", alpha=0.3)
trainer.train(resume_from_checkpoint=True)
"""

from ...models.hub import load_transformers
from .mixin import DistillMixin

Trainer = load_transformers().Trainer


class DistillTrainer(DistillMixin, Trainer):  # type: ignore[misc, valid-type]
    """Trainer whose data is a cache, and whose loss is that of `fastkd.train`. Arguments: see `DistillMixin`."""


__all__ = ["DistillTrainer"]
