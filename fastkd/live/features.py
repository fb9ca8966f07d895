"""Hidden states of a live teacher: coded on the device as a capture codes them, with the same basis and step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.workspace import Workspace
from ..capture.feature_collect import stored_rows
from ..capture.feature_places import network_of
from ..capture.features.prepare import Feature
from ..capture.rows import ShardRows
from ..errors import TeacherError
from ..kernels import HiddenTargets, KDError
from ..kernels.fields import Field, TensorFields
from ..models.taps import Taps
from ..teachers.protocol import Teacher

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StatePlaces(TensorFields):
    """Where a micro-batch has states of a feature, before the teacher runs. rows `[m]`: flattened positions of
    `[B, L]`, or numbers of examples. index `[m · P]`: of the vectors, as `HiddenTargets.index`."""

    rows: Tensor
    index: Tensor

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field("rows", torch.int64, 0, "M"), Field("index", torch.int64, 0, "N"),
    )  # fmt: skip
    NAME: ClassVar[str] = "state places"

    def __len__(self) -> int:
        return len(self.index)


class LiveFeatureSignal:
    """Where the states of a feature are; see `stream.signals.Signal`. A shard's are `mask(rows)`."""

    def __init__(self, feature: Feature) -> None:
        self.feature, self.name = feature, f"features/{feature.name}"

    def describe(self) -> str:
        return self.feature.spec.hash

    def mask(self, rows: ShardRows) -> NDArray[np.bool_]:
        """The rows of a shard with a state, `[n]`."""
        return stored_rows(rows, self.feature.spec.positions, self.feature.spec.seed)

    def open(self, source: int, shard: int, workspace: Workspace, inputs: Any) -> NDArray[np.bool_]:
        raise AssertionError("its source opens it, from the rows of the shard")

    def gather(self, parts: Sequence[tuple[NDArray[np.bool_], Ints, Ints]]) -> StatePlaces:
        rows = np.concatenate([np.zeros(0, np.int64), *(there[mask[here]] for mask, here, there in parts)])
        vectors = self.feature.place.vectors
        index = (rows[:, None] * vectors + np.arange(vectors)).reshape(-1)
        return StatePlaces(torch.from_numpy(rows), torch.from_numpy(index))

    def row_bytes(self) -> int:
        return 1


class States:
    """Records the tensors of the features in a teacher's forwards for a micro-batch, and codes them."""

    def __init__(self, teacher: Teacher | None, features: Sequence[Feature]) -> None:
        self._features = features
        self._taps = None
        if features and teacher is not None:
            self._taps = Taps(network_of(teacher), [feature.place.tap for feature in features])

    def recording(self) -> AbstractContextManager[Any]:
        """Context manager: forwards are recorded."""
        return nullcontext() if self._taps is None else self._taps

    def take(self, shape: torch.Size) -> dict[str, Tensor]:
        """The tensors of the last forward, by feature. shape: `[B, L]` or `[B]` of its inputs."""
        if self._taps is None:
            return {}
        values = self._taps.take()
        for feature in self._features:
            feature.place.check(values[feature.place.tap.name], shape)
        return {feature.name: values[feature.place.tap.name] for feature in self._features}

    def coded(self, values: dict[str, Tensor], places: dict[str, StatePlaces]) -> dict[str, HiddenTargets]:
        """The targets of a micro-batch, by the names of their signals. values: of all its rows. Raises TeacherError for
        states with NaN or infinity."""
        found = {}
        for feature in self._features:
            there = places[name := f"features/{feature.name}"]
            vectors = feature.place.vectors_of(values[feature.name], there.rows)
            try:
                made = HiddenTargets.from_states(vectors, feature.on_device, feature.spec.step)
            except KDError as error:
                raise TeacherError(
                    f"feature {feature.name}: {feature.place.what} cannot be coded ({error})."
                ) from error
            found[name] = replace(made, index=there.index)
        return found
