"""Losses between a student's and a teacher's features: one file each. Imports no torch.

Belongs here: modules named after a loss, which define the names that `FeatureLoss` lists, and helpers named `_*`. Does
not: which rows are compared, projectors, weights (fastkd/train).
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ...errors import KDError

INPUTS = ("states", "attention", "maps")


@dataclass(frozen=True)
class FeatureLoss:
    """A loss between what a student and a teacher compute inside.

    A file of this folder, or a module given to `register_feature_loss`, defines INPUTS, PROJECTOR, SEGMENTS, `loss` and
    `oracle`. `loss(student, teacher, num_items, ...)` returns a 0-d tensor: a sum over rows (of vectors, of query
    positions, of examples), divided by num_items, the number of teacher vectors in the whole optimizer step; None: in
    this call. `oracle` takes the same arguments and is the same loss in obvious lines, to be run in float64 and
    differentiated by autograd.

    INPUTS: what is compared.
        "states": student `[N, D]` at the rows of a `HiddenTargets`, or of a tensor `[N, W]` of coordinates.
        "attention": `QueriesKeysValues` of both, for the same N positions.
        "maps": student `[B, C, H, W]` and the `HiddenTargets` of feature maps, with `shape=` of the teacher's value:
            `(C, H, W)` or, of attention-transfer maps, `(H, W)`.
    PROJECTOR: whether the student's vectors need the teacher's width (by a projector).
    SEGMENTS: whether rows are compared with other rows: `loss` then takes `segments=`, a `Segments`, which keeps those
        of different segments apart.
    DENSE: (False where it is not defined) whether vectors are compared in the teacher's own components (`units()`), and
        not in coordinates.
    """

    name: str
    inputs: str
    projector: bool
    segments: bool
    loss: Callable[..., Any]
    oracle: Callable[..., Any]
    dense: bool = False


# Each loss by its name; what is not imported yet is None.
_known: dict[str, FeatureLoss | None] = {}


def register_feature_loss(name: str, definition: Any) -> None:
    """Add a loss that is defined outside of this folder. definition: a module, or any object with the names that
    `FeatureLoss` lists. Raises KDError if one is missing or wrong."""
    _known[name] = _read(name, definition)


def feature_loss_names() -> tuple[str, ...]:
    """The names of all losses, the registered ones included."""
    return tuple(_known)


def find_feature_loss(name: str) -> FeatureLoss:
    """The loss of this name; imports its module. Raises KDError if it is unknown, or its definition is not complete."""
    if not isinstance(name, str) or name not in _known:
        raise KDError(f"feature loss: got {name!r}; expected one of {', '.join(_known)}.")
    found = _known[name]
    if found is None:
        try:
            module = import_module(f"{__name__}.{name}")
        except Exception as error:
            raise KDError(
                f"feature loss: got {name!r}, whose definition is not complete: importing it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        found = _known[name] = _read(name, module)
    return found


def _read(name: str, definition: Any) -> FeatureLoss:
    names = ("INPUTS", "PROJECTOR", "SEGMENTS", "loss", "oracle")
    problem = ""
    if missing := [x for x in names if not hasattr(definition, x)]:
        problem = f"got no {', '.join(missing)}; expected {', '.join(names)}."
    elif definition.INPUTS not in INPUTS:
        problem = f"INPUTS: got {definition.INPUTS!r}; expected one of {', '.join(INPUTS)}."
    else:
        for x in ("PROJECTOR", "SEGMENTS"):
            if not isinstance(getattr(definition, x), bool):
                problem = f"{x}: got {getattr(definition, x)!r}; expected True or False."
        for x in ("loss", "oracle"):
            if not callable(getattr(definition, x)):
                problem = f"{x}: got {getattr(definition, x)!r}; expected a function."
    if problem:
        raise KDError(f"feature loss: got {name!r}, whose definition is not complete: {problem}")
    return FeatureLoss(
        name,
        inputs=definition.INPUTS,
        projector=definition.PROJECTOR,
        segments=definition.SEGMENTS,
        loss=definition.loss,
        oracle=definition.oracle,
        dense=bool(getattr(definition, "DENSE", False)),
    )


for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    if not _module.name.startswith("_"):
        _known[_module.name] = None
if TYPE_CHECKING:
    FeatureLossName = str
else:
    FeatureLossName = Literal[feature_loss_names()] if _known else str  # for command lines
