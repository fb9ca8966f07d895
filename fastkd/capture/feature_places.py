"""Where the features of a capture are in its teacher, and what a row of each is: found with a probe."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..cache.features.spec import vectors_and_width
from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import TeacherError
from ..models.hub import brief
from ..models.taps import Tap, Taps, resolve
from ..teachers.protocol import Teacher

Kind = Literal["state", "map", "attention_map"]
_PROBE = (2, 5)  # rows and tokens


@dataclass(frozen=True, eq=False)
class Place:
    """A feature of a teacher: a tensor that its forward passes through.

    tap: where. kind: "state" `(D,)` a position (or an example), "map" `(C, H, W)` or "attention_map" `(H, W)` an
    example. shape: of a row's value. dtype: of the teacher's tensor.

    A row's value is coded as `vectors` vectors of `width` components: a state is one, a map's pixels are H · W of C,
    an attention-transfer map is one of H · W.
    """

    tap: Tap
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The feature's name in a cache."""
        return self.tap.feature

    @property
    def vectors(self) -> int:
        """P, the vectors of a row."""
        return vectors_and_width(self.kind, self.shape)[0]

    @property
    def width(self) -> int:
        """W, the components of a vector."""
        return vectors_and_width(self.kind, self.shape)[1]

    @property
    def what(self) -> str:
        """What it is, for messages."""
        if self.tap.layer is None:
            return f"the output of module {self.tap.path}"
        return "the state that enters " + ("the final norm" if self.name == "-1" else f"layer {self.name}")

    def vectors_of(self, value: Tensor, flat_M: Tensor) -> Tensor:
        """The vectors `[m · P, W]` of some rows. value: the teacher's tensor. flat_M: int64 `[m]`, rows of it, or of
        its flattened `[B, L]`."""
        rows = value.reshape(-1, *self.shape)[flat_M]
        if self.kind == "map":
            rows = rows.movedim(1, -1)
        return rows.reshape(-1, self.width)

    def value_of(self, vectors: Tensor, like: Tensor) -> Tensor:
        """The teacher's tensor, of all rows, from its vectors; its shape and type are those of `like`."""
        if self.kind == "map":
            vectors = vectors.reshape(-1, *self.shape[1:], self.width).movedim(-1, 1)
        return vectors.reshape(like.shape).to(like.dtype)

    def check(self, value: Tensor, shape: Sequence[int]) -> None:
        """TeacherError unless the tensor has a row for each of the batch. shape: `[B, L]` or `[B]`."""
        expected = (*shape, *self.shape)
        if tuple(value.shape) != expected:
            raise TeacherError(
                f"feature {self.name}: got {self.what} of shape {tuple(value.shape)}; expected {expected}, as with the "
                "first inputs."
            )


def network_of(teacher: Teacher) -> nn.Module:
    """The torch module of a teacher. TeacherError if it has none: a server, or a function."""
    for candidate in (getattr(teacher, "model", None), teacher):
        if isinstance(candidate, nn.Module):
            return candidate
    raise TeacherError(
        f"features: got a {type(teacher).__name__}, whose layers are not in this process; expected a torch module or a "
        "model of transformers (a Teacher of yours needs the module as its attribute `model`). Leave --features out."
    )


def find_places(teacher: Teacher, data: Documents | Examples | None, names: Sequence[str]) -> list[Place]:
    """The places that these names stand for (see `models.taps.resolve`), in their order, each once; none without names.

    data: what the teacher is run on; of a cache of tokens, None will do.
    Raises TeacherError for a layer or a module that is not there, or one whose tensor is no feature, before anything is
    written.
    """
    if not names:
        return []
    network = network_of(teacher)
    taps = list({tap.feature: tap for tap in resolve(network, names)}.values())
    if isinstance(data, Examples):
        inputs = torch.cat([data.first()] * _PROBE[0])
    else:
        inputs = torch.zeros((_PROBE[0], min(_PROBE[1], teacher.max_positions or _PROBE[1])), dtype=torch.int64)
    calls = dict.fromkeys((tap.path for tap in taps), 0)
    with Taps(network, taps) as recorded, _counted(taps, calls), torch.inference_mode():
        try:
            teacher(inputs.to(teacher.device))
            values = recorded.take()
        except (RuntimeError, TypeError) as error:
            raise TeacherError(f"features: the teacher's tensors cannot be recorded ({brief(error)}).") from error
    if again := [tap for tap in taps if calls[tap.path] > 1]:
        raise TeacherError(
            f"feature {again[0].name}: the teacher calls {again[0].path} {calls[again[0].path]} times in a forward; "
            "expected a module that it calls once. Name the module around it."
        )
    return [_place(tap, values[tap.name], inputs, isinstance(data, Examples)) for tap in taps]


@contextmanager
def _counted(taps: Sequence[Tap], calls: dict[str, int]) -> Iterator[None]:
    """Context manager: counts the calls of each tap's module, by its path."""

    def counter(path: str) -> Any:
        def hook(*arguments: Any) -> None:
            calls[path] += 1

        return hook

    handles = [module.register_forward_hook(counter(path)) for path, module in {t.path: t.module for t in taps}.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(tap: Tap, value: Tensor, inputs: Tensor, examples: bool) -> Place:
    """The place of a tap, by the tensor that it recorded for some inputs."""
    batch = (len(inputs),) if examples else tuple(inputs.shape)
    if not value.is_floating_point() or tuple(value.shape[: len(batch)]) != batch:
        raise _no_feature(tap, value, examples)
    shape = tuple(value.shape[len(batch) :])
    kinds: dict[tuple[int, bool], Kind] = {(1, False): "state"} if tap.layer is not None else {}
    if examples:
        kinds |= {(3, False): "map", (2, True): "attention_map"}
    if (kind := kinds.get((len(shape), tap.squared))) is None or 0 in shape:
        raise _no_feature(tap, value, examples)
    return Place(tap, kind, shape, value.dtype)


def _no_feature(tap: Tap, value: Tensor, examples: bool) -> TeacherError:
    expected = "the state that enters a layer, [B, L, D], for text"
    if examples:
        expected = "a map [B, C, H, W]" + (" before the mean over C" if tap.squared else "")
    return TeacherError(
        f"feature {tap.name}: got {value.dtype} of shape {tuple(value.shape)} at {tap.path}; expected {expected}. Name "
        "another layer or module."
    )
