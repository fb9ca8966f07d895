"""Inner states of the teacher as a signal: the codes of a cache's feature, gathered as `HiddenTargets`."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.errors import CacheError, StoreError
from ..cache.workspace import Workspace
from ..errors import StreamError
from ..kernels import HiddenTargets
from .split import ShardTable

Ints = NDArray[np.int64]
# Features of the caches of a mixture may differ in these fields of their specs: they say which cache, not what.
_OWN = {"base", "seed", "notes"}


class FeatureShard(NamedTuple):
    """A shard's feature as a cache stores it: `Feature.read_codes`, and where the vectors of each row are.

    codes int16 `[m, W]`, scale `[m]`: of the m stored vectors. exact_rows `[e]`, exact `[e, W]`: those stored exactly.
    vector `[m]`: the number of each in its row. first `[n + 1]`: the first vector of each row of the shard.
    """

    codes: NDArray[np.int16]
    scale: NDArray[np.float32]
    exact_rows: Ints
    exact: NDArray[np.float32]
    vector: Ints
    first: Ints


class FeatureSignal:
    """A feature of all caches of a loader; see `signals.Signal`.

    features: of each cache, of equal specs. device: of the micro-batches; the basis is kept there.
    """

    def __init__(
        self, name: str, features: Sequence[Any], rows: Sequence[dict[int, int]], device: torch.device
    ) -> None:
        self.name = f"features/{name}"
        self.spec = features[0].spec
        self._features, self._rows = features, rows
        self._pin = device.type == "cuda"
        basis = features[0].basis
        self._shared = {
            "step": self.spec.step,
            "mean": torch.from_numpy(np.ascontiguousarray(basis.mean)),
            "basis": torch.from_numpy(np.ascontiguousarray(basis.basis)),
        }

    def describe(self) -> list[str]:
        """The hash of each cache's feature."""
        return [feature.spec.hash for feature in self._features]

    def open(self, source: int, shard: int, workspace: Workspace, inputs: Any) -> FeatureShard:
        codes = self._features[source].read_codes(shard, into=workspace)
        vectors, n = self.spec.vectors, self._rows[source][shard]
        rows = codes["rows"]
        first = np.searchsorted(rows, np.arange(n + 1) * vectors)
        return FeatureShard(codes["codes"], codes["scale"], codes["exact_rows"], codes["exact"], rows % vectors, first)

    def gather(self, parts: Sequence[tuple[FeatureShard, Ints, Ints]]) -> HiddenTargets:
        vectors, width = self.spec.vectors, self.spec.width
        chosen, index, exact_rows, exact, done = [], [], [], [], 0
        for shard, here, there in parts:
            counts = shard.first[here + 1] - shard.first[here]
            ends = np.cumsum(counts)
            total = int(ends[-1]) if len(ends) else 0
            some = np.repeat(shard.first[here] - (ends - counts), counts) + np.arange(total)
            index.append(np.repeat(there * vectors, counts) + shard.vector[some])
            slot = np.searchsorted(shard.exact_rows, some)
            slot[slot == len(shard.exact_rows)] = 0
            is_exact = shard.exact_rows[slot] == some if len(shard.exact_rows) else np.zeros(total, bool)
            exact_rows.append(done + np.flatnonzero(is_exact))
            exact.append(shard.exact[slot[is_exact]])
            chosen.append((shard, some))
            done += total
        codes = torch.empty(done, width, dtype=torch.int16, pin_memory=self._pin)
        scale = torch.empty(done, dtype=torch.float32, pin_memory=self._pin)
        at = 0
        for shard, some in chosen:
            # mode: "raise" would need a copy
            np.take(shard.codes, some, axis=0, out=codes.numpy()[at : at + len(some)], mode="clip")
            np.take(shard.scale, some, out=scale.numpy()[at : at + len(some)], mode="clip")
            at += len(some)
        return HiddenTargets(
            codes=codes,
            scale=scale,
            exact_rows=self._tensor(np.concatenate([np.zeros(0, np.int64), *exact_rows])),
            exact=self._tensor(np.concatenate([np.zeros((0, width), np.float32), *exact])),
            index=self._tensor(np.concatenate([np.zeros(0, np.int64), *index])),
            **self._shared,
        )

    def row_bytes(self) -> int:
        # codes, scale, the vector's number, and the row's first vector; rows that are stored exactly are few
        return int(self.spec.vectors) * (2 * int(self.spec.width) + 4 + 8) + 8

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin else tensor


def open_feature(name: str, tables: Sequence[ShardTable], device: torch.device) -> FeatureSignal:
    """A feature of the caches of a loader, for the shards that it reads.

    Raises StreamError if a cache has no such feature, or shards of it are missing, or belong to other shards than the
    cache now has; and if the features of a mixture have different settings.
    """
    features, rows = [], []
    for table in tables:
        feature = _find(name, table)
        _check_shards(name, feature, table)
        features.append(feature)
        manifest = table.cache.manifest
        numbers, positions = (manifest.column(n).to_pylist() for n in ("shard", "positions"))
        rows.append(dict(zip(numbers, positions, strict=True)))
    first = features[0].spec
    for table, feature in zip(tables, features, strict=True):
        ours = feature.spec
        for field in fields(ours):
            if field.name not in _OWN and getattr(ours, field.name) != getattr(first, field.name):
                raise StreamError(
                    f"features: got {name!r} with {field.name} {getattr(first, field.name)!r} in {tables[0].cache!r} "
                    f"and {getattr(ours, field.name)!r} in {table.cache!r}; expected the same settings and basis in "
                    "all caches of a mixture. Leave the feature out, or train from one of them."
                )
    return FeatureSignal(name, features, rows, device)


def _find(name: str, table: ShardTable) -> Any:
    cache = table.cache
    try:
        feature = cache.features[name]
    except KeyError as error:
        try:
            there = ", ".join(cache.features) or "none"
        except StoreError:  # a web server lists nothing
            there = "others"
        raise StreamError(
            f"features: got {name!r}, and {cache!r} has {there}. Run its capture again with --features {name}, which "
            "adds them to the cache."
        ) from error
    except CacheError as error:
        raise StreamError(f"features: {name!r} of {cache!r} cannot be read ({error})") from error
    if feature.spec.base != cache.spec.hash:
        raise StreamError(
            f"features: {name!r} in {cache!r} belongs to a cache of spec {feature.spec.base[:12]}…; expected "
            f"{cache.spec.hash[:12]}…, this one's. Drop the feature, and capture it again."
        )
    return feature


def _check_shards(name: str, feature: Any, table: ShardTable) -> None:
    missing = np.setdiff1d(table.shard, np.array(feature.shards, np.int64))
    if len(missing):
        raise StreamError(
            f"features: {len(missing)} of the {len(table.shard)} shards of {name!r} in {table.cache!r} "
            f"{'is' if len(missing) == 1 else 'are'} missing (the first is {missing[0]}). Run its capture again "
            f"with --features {name}, which writes only "
            "what is missing."
        )
    manifest, base = feature.manifest, table.cache.manifest
    of = dict(zip(manifest.column("shard").to_pylist(), manifest.column("base_sha256").to_pylist(), strict=True))
    now = dict(zip(base.column("shard").to_pylist(), base.column("content_sha256").to_pylist(), strict=True))
    if others := [shard for shard in table.shard.tolist() if of[shard] != now[shard]]:
        raise StreamError(
            f"features: shard {others[0]} of {name!r} in {table.cache!r} is of another shard than the cache now has "
            f"({len(others)} such shards): the cache was captured again, maybe by another plan. Drop the feature, and "
            "capture it again."
        )
