"""Divergences between the teacher's and the student's distribution: one file each. Imports neither torch nor triton.

Belongs here: modules named after a divergence, which define the names that `Divergence` lists, and helpers named `_*`.
Does not: sums over outcomes, gradients in the logits, temperatures and treatments (../loss, ../treatment.py).
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from ..errors import KDError

TREATMENTS = ("bucket", "sampled", "renormalize")  # what they are: ../treatment.py


@dataclass(frozen=True)
class Parameter:
    """A number that a divergence depends on, with low < number < high."""

    name: str
    default: float
    low: float
    high: float

    def check(self, value: Any, argument: str) -> None:
        """Raise KDError, naming the argument that it came from, unless the value is in range."""
        if not isinstance(value, Real) or not self.low < float(value) < self.high:
            bounds = f"{self.low:g} and {self.high:g}"
            raise KDError(f"{argument}: got {value!r}; expected a number strictly between {bounds}.")


@dataclass(frozen=True)
class Divergence:
    """A divergence `Σ_i f(q_i, p_i)` over the outcomes i of a position: each top-k entry, and the tail as one.

    A file of this folder, or a module given to `register_divergence`, defines all fields but the name: PARAMETER,
    TREATMENTS and three functions. These are elementwise and take `(weight, log_q, log_p, parameter)`: the weight of
    the outcome, which is q unless the treatment estimates it; log-probabilities of the teacher (q) and of the student
    (p), either of which may be −inf; and the value of PARAMETER.

    PARAMETER: its parameter, or None.
    TREATMENTS: those that it takes. "bucket" always; "sampled" and "renormalize" only where every term is the weight
        times something, so that an outcome of weight 0 adds nothing and an unbiased weight gives an unbiased sum.
    torch_terms: `(term, slope)` as tensors, with slope = p · df/dp.
    triton_terms: the same in Triton, not decorated; `tl` is triton.language and `tm` is kernels/triton_math.py.
    oracle_terms: the term alone, to be differentiated by autograd, written as in the literature.
    """

    name: str
    parameter: Parameter | None
    treatments: tuple[str, ...]
    torch_terms: Callable[..., Any]
    triton_terms: Callable[..., Any]
    oracle_terms: Callable[..., Any]


# Each divergence by its name, or what is wrong with its definition.
_known: dict[str, Divergence | str] = {}


def register_divergence(name: str, definition: Any) -> None:
    """Add a divergence that is defined outside of this folder. definition: a module, or any object with the names that
    `Divergence` lists. Raises KDError if one is missing or wrong."""
    found = _read(name, definition)
    if isinstance(found, str):
        raise KDError(f"divergence: got {name!r}, whose definition is not complete: {found}")
    _known[name] = found


def divergence_names() -> tuple[str, ...]:
    """The names of all divergences, the registered ones included."""
    return tuple(_known)


def divergence_parameters() -> list[Parameter]:
    """The parameters of all divergences."""
    return [d.parameter for d in _known.values() if isinstance(d, Divergence) and d.parameter is not None]


def find_divergence(name: str) -> Divergence:
    """The divergence of this name. Raises KDError if it is unknown, or its definition is not complete."""
    found = _known.get(name) if isinstance(name, str) else None
    if found is None:
        raise KDError(f"divergence: got {name!r}; expected one of {', '.join(_known)}.")
    if isinstance(found, str):
        raise KDError(f"divergence: got {name!r}, whose definition is not complete: {found}")
    return found


def load_folder() -> None:
    """Read every divergence of this package's folder (and of others that were added to its `__path__`)."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        if not module.name.startswith("_"):
            try:
                _known[module.name] = _read(module.name, import_module(f"{__name__}.{module.name}"))
            except Exception as error:  # raised when it is named: the other divergences still work
                _known[module.name] = f"importing it raised {type(error).__name__}: {error}"


def _read(name: str, definition: Any) -> Divergence | str:
    names = ("PARAMETER", "TREATMENTS", "torch_terms", "triton_terms", "oracle_terms")
    missing = [x for x in names if not hasattr(definition, x)]
    if missing:
        return f"got no {', '.join(missing)}; expected {', '.join(names)}."
    parameter, treatments, *functions = (getattr(definition, x) for x in names)
    for x, function in zip(names[2:], functions, strict=True):
        if not callable(function):
            return f"{x}: got {function!r}; expected a function."
    if parameter is not None and not isinstance(parameter, Parameter):
        return f"PARAMETER: got {parameter!r}; expected a fastkd.kernels.divergences.Parameter, or None."
    if not isinstance(treatments, tuple) or "bucket" not in treatments or not {*treatments} <= {*TREATMENTS}:
        return f"TREATMENTS: got {treatments!r}; expected a tuple with 'bucket' of {', '.join(TREATMENTS)}."
    return Divergence(name, parameter, treatments, *functions)


load_folder()
if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[divergence_names()]  # for command lines
