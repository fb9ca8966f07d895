"""What formats of hidden states share: a file for each sample, of some layers, and one for the inputs of a shard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...errors import ExportError
from ..features import final_norm, select
from ..samples import Sample, samples_of
from . import Options, Written

if TYPE_CHECKING:
    from ...cache import Cache
    from ...utils.signals import Stop

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SampleFormat:
    """See `formats.Format`. NEEDS_TEACHER: whether it needs the final norm of the teacher."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"features", "dtype", "teacher"})
    NEEDS_TEACHER: ClassVar[bool] = False
    NAME: ClassVar[str]

    def __init__(self, cache: "Cache", folder: Path, options: Options) -> None:
        if options.dtype not in DTYPES:
            raise ExportError(f"dtype: got {options.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if "tokens" not in cache.spec.inputs:
            raise ExportError(f"{cache!r}: got a cache of examples; expected one of text, with its tokens.")
        self._cache, self._folder, self._dtype = cache, folder, DTYPES[options.dtype]
        self._chosen = select(cache, options.features)
        self.features = tuple(feature.name for feature in self._chosen)
        self.settings = {
            "features": {feature.name: feature.spec.hash for feature in self._chosen},
            "dtype": options.dtype,
        }
        self.check(self.features)
        self._norm = final_norm(cache, options.teacher, options.settings, self.NAME) if self.NEEDS_TEACHER else None

    def write_shard(self, shard: int, first: int, stop: "Stop") -> Written:
        inputs: dict[str, list[Any]] = {"tokens": [], "loss_mask": []}
        tokens = size = 0
        for sample in samples_of(self._cache, self._chosen, shard):
            if stop.asked:
                break
            size += self.write(first + len(inputs["tokens"]), sample)
            inputs["tokens"].append(sample.tokens.numpy())
            inputs["loss_mask"].append(sample.loss_mask.numpy())
            tokens += len(sample.tokens)
        if not stop.asked:
            self.finish_shard(shard, first, inputs)
        return Written(len(inputs["tokens"]), tokens, size, not stop.asked)

    def check(self, features: Sequence[str]) -> None:
        """Raise ExportError for layers that the readers do not take. features: their names in order, "-1" last."""
        raise NotImplementedError

    def write(self, number: int, sample: Sample) -> int:
        """Write a sample, unless its file is there. number: of the sample, from 0. Returns the bytes of its file."""
        raise NotImplementedError

    def finish_shard(self, shard: int, first: int, inputs: Mapping[str, Sequence[Any]]) -> None:
        """After the samples of a shard. first: number of the first; inputs: tokens and loss masks of all of them."""

    def finish(self, shards: Sequence[int]) -> None:
        """After all shards, which are given in order."""
