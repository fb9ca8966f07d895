"""Hugging Face: a cache and the fused loss in transformers' Trainer, TRL's SFTTrainer and accelerate (extra `hf`).

`DistillTrainer` is a Trainer whose data is a cache; `attach`, `DistillDataset` and `DistillMixin` are the parts of it,
for a training script that exists already.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .attach import attach as attach
    from .attach import detach as detach
    from .dataset import DistillDataset as DistillDataset
    from .dataset import DistillSampler as DistillSampler
    from .mixin import DistillMixin as DistillMixin
    from .sft_trainer import DistillSFTTrainer as DistillSFTTrainer
    from .trainer import DistillTrainer as DistillTrainer

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attach": ["attach", "detach"],
        "dataset": ["DistillDataset", "DistillSampler"],
        "mixin": ["DistillMixin"],
        "sft_trainer": ["DistillSFTTrainer"],
        "trainer": ["DistillTrainer"],
    },
)
