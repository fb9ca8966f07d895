"""Compares the stored features of a shard with the teacher's states now: their distance, and what the codec allows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache import Cache, CacheError, Feature
from ...cache.features.spec import vector_numbers
from ...data.examples import Examples
from ...teachers.protocol import Teacher
from ..feature_collect import States
from ..feature_places import Place, find_places
from ..rows import Ints, ShardRows
from .prepare import feature_spec

_ROUNDING = 1e-3  # what float32 and the rounding of a scale to float16 add, in units of the rms
_ULPS = 64  # of the teacher's dtype, by which other hardware may differ


@dataclass
class FeatureDifference:
    """A summary of the deviations of a feature, in units of each vector's root mean square.

    compared: how many vectors. largest: the largest distance of a coordinate. bound: what the codec allows, half a
    step; over: how many exceed it. excess: by how much, at most. tolerance: what a coordinate may exceed it by, as
    other hardware rounds differently.
    """

    bound: float
    tolerance: float
    compared: int = 0
    largest: float = 0.0
    over: int = 0
    excess: float = 0.0


@dataclass(eq=False)
class FeatureCheck:
    """A feature of a cache, compared with the teacher. worst: a description of the largest excess."""

    place: Place
    feature: Feature
    difference: FeatureDifference
    worst: str = ""
    _shard: int = -1
    _codes: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def read(self, shard: int) -> bool:
        """Read a shard; whether it is there."""
        if shard not in self.feature.shards:
            return False
        if shard != self._shard:
            self._codes, self._shard = self.feature.read_codes(shard), shard
        return True

    def collector(self, rows: ShardRows, of_shard: Ints) -> States:
        """What records the states of some rows of the shard that are stored. of_shard: the number of each there."""
        stored = self._codes["rows"][:: self.place.vectors] // self.place.vectors
        return States(self.place, rows, np.isin(of_shard, stored))

    def compare(self, states: States, of_shard: Ints) -> None:
        """Compare the recorded states with the stored ones."""
        p, spec, basis, total = self.place.vectors, self.feature.spec, self.feature.basis, self.difference
        chosen = of_shard[states.mask]
        if not len(chosen):
            return
        now, codes = states.vectors(), self._codes
        vectors = vector_numbers(chosen, p)
        at = np.searchsorted(codes["rows"], vectors)
        exact = np.isin(at, codes["exact_rows"])
        scale = np.where(codes["scale"][at] > 0, codes["scale"][at], 1.0)[:, None]
        stored_z = codes["codes"][at] * np.float32(spec.step)
        now_z = (now / scale - basis.mean) @ basis.basis
        distance = np.abs(now_z - stored_z).max(1)
        kept = np.searchsorted(codes["exact_rows"], at[exact])
        distance[exact] = np.abs((now[exact] - codes["exact"][kept]) / scale[exact]).max(1, initial=0)
        allowed = np.where(exact, 0.0, total.bound) * (1 + 2e-3) + _ROUNDING
        excess = np.maximum(distance - allowed, 0)
        worst = int(excess.argmax())
        total.compared += len(at)
        total.largest = max(total.largest, float(distance[~exact].max(initial=0)))
        total.over += int(np.count_nonzero(excess))
        if excess[worst] > total.excess:
            total.excess = float(excess[worst])
            self.worst = (
                f"shard {self._shard}, row {vectors[worst] // p}: feature {spec.name} is {distance[worst]:.3g} of its "
                f"rms from the teacher's; the codec explains {allowed[worst]:.2g}"
            )

    def problem(self) -> str | None:
        """The problem, if a deviation is larger than the tolerance."""
        if self.difference.excess <= self.difference.tolerance:
            return None
        return f"{self.worst}, and the tolerance is {self.difference.tolerance:.2g}"


def feature_checks(cache: Cache, teacher: Teacher, data: Examples | None) -> list[FeatureCheck]:
    """The features of a cache, and where they are in its teacher. Raises TeacherError and CacheError if the teacher has
    none of that name or shape."""
    features = [cache.features[name] for name in cache.features]
    places = find_places(teacher, data, [feature.name for feature in features])
    found = []
    for place, feature in zip(places, features, strict=True):
        ours = feature_spec(place, feature.spec.base, feature.spec.basis)
        for name in ("kind", "shape", "layers"):
            here, there = getattr(ours, name), getattr(feature.spec, name)
            if here != there:
                raise CacheError(f"feature {place.name}: {name}: got {here} of this teacher; expected {there}.")
        eps = torch.finfo(place.dtype).eps
        tolerance = max(_ROUNDING, _ULPS * eps if eps > 1e-5 else 0.0)
        found.append(FeatureCheck(place, feature, FeatureDifference(feature.spec.step / 2, tolerance)))
    return found


def read_all(checks: Sequence[FeatureCheck], shard: int) -> list[FeatureCheck]:
    """Those whose part of a shard is there, read."""
    return [check for check in checks if check.read(shard)]
