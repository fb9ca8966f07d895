"""DistillSFTTrainer: TRL's SFTTrainer on a cache (extra `trl`)."""

from ...models.hub import load_transformers
from .mixin import DistillMixin

load_transformers()
from trl import SFTTrainer  # noqa: E402


class DistillSFTTrainer(DistillMixin, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose data is a cache. Arguments: see `DistillMixin`; peft_config and others are SFTTrainer's."""


__all__ = ["DistillSFTTrainer"]
