"""Batches for a student: the `BatchSource` protocol, the cached source, order, prefetch and assembly.

Belongs here: a new kind of batch source, and what turns shards into micro-batches.
Does not: losses, optimizers, or anything that changes weights.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from ..errors import StreamError as StreamError
    from ..utils.distributed import summed_over as summed_over
    from .batch import BatchSource as BatchSource
    from .batch import ExampleBatch as ExampleBatch
    from .batch import MicroBatch as MicroBatch
    from .batch import Step as Step
    from .cached import CachedSource as CachedSource
    from .cached import DistillLoader as DistillLoader
    from .epoch_order import Epoch as Epoch
    from .epoch_order import order as order
    from .tensors import batch_of_tensors as batch_of_tensors
    from .tensors import batch_to_tensors as batch_to_tensors

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batch": ["BatchSource", "ExampleBatch", "MicroBatch", "Step"],
        "cached": ["CachedSource", "DistillLoader", "StreamError", "summed_over"],
        "epoch_order": ["Epoch", "order"],
        "tensors": ["batch_of_tensors", "batch_to_tensors"],
    },
)
