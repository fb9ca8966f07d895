"""What features of a capture will take, from the states of a sample."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cache import Basis, CacheSpec, FeatureSpec, encode_hidden
from ...cache.features.layout import encode_shard, page_of
from ...cache.shard.container import pack
from ...data.documents import Documents
from ...data.examples import Examples
from ...settings import CaptureSettings
from ...teachers.protocol import Teacher
from ...utils.numbers import size_text
from ..feature_places import Place
from ..feature_settings import ALL, COUNTED, positions_text, step_of
from ..window_plan import WindowPlan
from .prepare import basis_on, feature_spec
from .step import find_step

_VECTORS = 2**14  # that are encoded
_ATTRIBUTES = 550  # bytes of a shard's


@dataclass(frozen=True)
class FeatureCost:
    """What a feature takes: bytes of all of its objects; positions with a value, and bytes_per_position of these.

    step: of its codes. kl: what the step costs, in nats, if it was found by that.
    """

    bytes: float
    positions: float
    bytes_per_position: float
    step: float
    kl: float | None

    @property
    def text(self) -> str:
        """One line for a person."""
        each = f"{self.bytes_per_position:.1f} bytes for each of {self.positions:,.0f} positions"
        kl = "" if self.kl is None else f" (KL {self.kl:.2g})"
        return f"{size_text(self.bytes)}, {each}, step {self.step:g}{kl}"


def estimate_features(
    teacher: Teacher,
    data: Documents | Examples,
    plan: WindowPlan,
    base: CacheSpec,
    settings: CaptureSettings,
    places: Sequence[Place],
    states: Sequence[Sequence[NDArray[np.float32]]],
    eligible: float,
) -> tuple[dict[str, FeatureCost], float]:
    """What each feature takes, and the seconds of a core to encode all of them, for a position of the plan.

    states: at each place, of a sample. eligible: the fraction of the positions that may be stored. Half of a sample's
    states make up the basis, and the others are encoded in it.
    """
    found, seconds = {}, 0.0
    positions = positions_text(settings)
    share = eligible * (1.0 if positions in (ALL, COUNTED) else float(positions))
    stored = share * plan.totals["positions"]
    for place, parts in zip(places, states, strict=True):
        vectors = np.concatenate(parts)
        pairs = len(vectors) // 2 if len(vectors) > 1 else len(vectors)
        basis = Basis.learn(vectors[0::2])
        step, kl = step_of(settings), None
        if settings.feature_kl is not None:
            on_device = basis_on(basis, teacher.device)
            search = find_step(teacher, data, plan, place, on_device, positions, settings.feature_kl)
            step, kl = search.step, search.kl
        spec = feature_spec(place, base.hash, basis.sha256, step=step)
        some = vectors[1::2][:_VECTORS] if pairs < len(vectors) else vectors
        # of whole positions: all pixels of a map
        some = some[: max(len(some) // place.vectors, 1) * place.vectors]
        begun = time.perf_counter()
        whole = _encoded(spec, basis, some)
        each = (time.perf_counter() - begun) / len(some)
        half = _encoded(spec, basis, some[: max(len(some) // (2 * place.vectors), 1) * place.vectors])
        slope = (whole[0] - half[0]) / max(whole[1] - half[1], 1)
        slope = slope if whole[1] > half[1] else whole[0] / whole[1]
        fixed = max(whole[0] - slope * whole[1], 0.0)
        size = slope * stored * place.vectors + (fixed + _ATTRIBUTES) * plan.shards + len(basis.to_bytes())
        found[place.name] = FeatureCost(size, stored, size / max(stored, 1), step, kl)
        seconds += each * place.vectors * share
    return found, seconds


def _encoded(spec: FeatureSpec, basis: Basis, vectors: NDArray[np.float32]) -> tuple[int, int]:
    """The bytes of these vectors as a shard, and their number."""
    positions = len(vectors) // spec.vectors
    arrays = encode_hidden(vectors, basis, spec.step)
    streams = encode_shard(spec, basis.scale, positions, arrays, None)
    return len(pack(streams, {}, spec, positions, {"codes": page_of(streams["codes"])})), len(vectors)
