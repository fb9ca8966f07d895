"""What another k would cost, and how much of the teacher's probability it would keep."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...cache import CacheSpec
from ...kernels import KDError, SparseTargets
from ...models.lm_head import logits_of
from ...models.protocol import Hidden, Logits
from ...settings import CaptureSettings
from ...teachers.protocol import Answer
from ..answers import targets_of
from ..rows import Ints, ShardRows
from .measure import CapturedRows
from .sizes import measure_sizes

KS = (16, 32, 64, 128)
_ROWS, _CHUNK = 1024, 256  # of a batch, at most; projected to logits at a time
_TARGETS = ("head/", "draws/", "tail", "outcomes")  # arrays whose size depends on k


@dataclass(frozen=True)
class KCost:
    """A capture with another k and otherwise the same settings.

    bytes: of all shards; bytes_per_position. mass_1, mass_2: mean probability of the top-k entries at T = 1 and T = 2;
    None if the cache cannot be used at that temperature.
    """

    k: int
    bytes: float
    bytes_per_position: float
    mass_1: float | None
    mass_2: float | None


class KTable:
    """Targets of the same rows for several k: of the settings' k, and of KS."""

    def __init__(self, spec: CacheSpec, settings: CaptureSettings) -> None:
        self._spec, self._settings = spec, settings
        self._inputs: list[dict[str, np.ndarray]] = []
        self._targets: dict[int, list[SparseTargets]] = {
            k: [] for k in sorted({settings.k, *(k for k in KS if k <= spec.vocab_size)})
        }

    @torch.inference_mode()
    def add(self, some: ShardRows, answer: Answer) -> None:
        """Add up to 1024 evenly spaced rows of a batch, which the teacher's answer is for."""
        rows, flat = some.counted(np.arange(len(some.document_lengths)))
        if not len(rows) or not isinstance(answer, (Hidden, Logits)):
            return
        pick = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).round().astype(np.int64))
        values = (answer.states if isinstance(answer, Hidden) else answer.values).flatten(0, -2)
        for start in range(0, len(pick), _CHUNK):
            chunk = pick[start : start + _CHUNK]
            picked = values[torch.from_numpy(flat[chunk]).to(values.device)]
            logits = logits_of(picked, answer.lm_head) if isinstance(answer, Hidden) else picked
            self._add_logits(logits, some, rows[chunk])

    def _add_logits(self, logits: Tensor, some: ShardRows, rows: Ints) -> None:
        """Add rows by their logits `[m, V]`."""
        index = torch.arange(len(rows), device=logits.device)
        numbers = torch.from_numpy(some.row_numbers(rows)).to(logits.device)
        self._inputs.append({name: column[rows] for name, column in some.inputs.items()})
        for k, parts in self._targets.items():
            settings = replace(self._settings, k=k)
            targets = targets_of(Logits(logits), index, numbers, settings, logits.shape[:1], self._spec.vocab_size)
            parts.append(targets.to("cpu"))

    def rows(self, total: dict[str, float], positions: int, shard_counted: float) -> list[KCost]:
        """The table, by ascending k; empty if no rows were added.

        total: bytes of all shards, by array, with the settings' k. positions: of all shards. shard_counted: positions
        of a shard that have targets.
        """
        if not self._inputs:
            return []
        targets = {k: SparseTargets.cat(parts) for k, parts in self._targets.items()}
        sizes = {k: self._target_bytes(found, k, max(shard_counted, 1.0)) for k, found in targets.items()}
        share = sum(size for name, size in total.items() if name.startswith(_TARGETS))
        costs = []
        for k, found in targets.items():
            size = sum(total.values()) + share * (sizes[k] / sizes[self._settings.k] - 1)
            costs.append(KCost(k, size, size / positions, _mass(found, 1.0), _mass(found, 2.0)))
        return costs

    def _target_bytes(self, targets: SparseTargets, k: int, shard_counted: float) -> float:
        """Bytes of the targets of a shard."""
        inputs = {name: np.concatenate([part[name] for part in self._inputs]) for name in self._spec.inputs}
        rows = CapturedRows(np.ones(len(targets), np.uint32), inputs | targets.arrays())
        sizes = measure_sizes(replace(self._spec, k=k), rows, shard_counted)
        by_array = sizes.of(np.array([round(shard_counted)]))
        return sum(size for name, size in by_array.items() if name.startswith(_TARGETS))


def _mass(targets: SparseTargets, temperature: float) -> float | None:
    """Mean probability of the top-k entries at a temperature."""
    used = targets.logprobs > -torch.inf
    if not bool((used if targets.draws is None else used & (targets.draws == 0)).any()):
        return 0.0
    try:
        tail = targets.at(temperature, "bucket").log_q_tail
    except KDError:  # the stored temperatures do not determine this one
        return None
    return float(1 - tail.exp().mean())
