"""LossConfig: what a distillation loss computes, as one object. Imports neither torch nor triton."""

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal, TypedDict

from ..arguments import is_number, whole_number
from ..divergences import DivergenceName, divergence_parameters, find_divergence
from ..errors import KDError
from ..treatment import TreatmentName, resolve_treatment

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")
SCHEDULED = ("alpha", "temperature")  # fields that may be 0-d tensors
PARAMETERS = ("beta", "skew")  # fields that are the parameter of a divergence
# Beyond it float32 has no digits left for the loss, whose error is 1e-7 T^2.
HIGHEST_TEMPERATURE = 1000.0

if TYPE_CHECKING:
    from torch import Tensor

    Number = float | Tensor
    ImplName = str
else:  # for command lines
    Number = float
    ImplName = Literal[IMPLEMENTATIONS]


@dataclass(frozen=True)
class LossConfig:
    """Settings of `kd_loss`, `linear_kd_loss` and `DistillationLoss`. The loss of a position is

        alpha * CE(student, label) + (1 - alpha) * T^2 * D(teacher at T, student at T)

    with T the temperature and D the divergence. Raises KDError for a value that is not valid for any input.
    """

    alpha: Number = 0.5
    """Weight of the hard loss, from 0 (soft loss alone) to 1 (hard loss alone). May be a 0-d tensor, so that a schedule
    neither recompiles nor synchronises."""
    temperature: Number = 1.0
    """Temperature T of teacher and student in the soft loss, at most 1000. May be a 0-d tensor, as alpha."""
    divergence: DivergenceName = "forward_kl"
    """Divergence between the teacher's and the student's distribution; each is a file of kernels/divergences."""
    treatment: TreatmentName = "auto"
    """Treatment of the teacher's probability outside the top-k entries: bucket (one more outcome), sampled (the
    stored draws stand for it), renormalize (dropped), or auto (see `resolve_treatment`)."""
    beta: float = 0.5
    """Parameter of the divergence jsd: the teacher's share of the mixture, between 0 and 1."""
    skew: float = 0.1
    """Parameter of the divergence skew_kl: the teacher's share of the mixture, between 0 and 1."""
    divergence_parameter: float | None = None
    """Parameter of a divergence that has no field of its own here. None: its default."""
    ignore_index: int = -100
    """Label of positions that do not count."""
    impl: ImplName = "auto"
    """Implementation: triton, torch, reference (dense, in float64), or auto (triton on a GPU, torch elsewhere and for
    float64)."""

    def __post_init__(self) -> None:
        check_numbers(self.alpha, self.temperature)
        if self.impl not in IMPLEMENTATIONS:
            raise KDError(f"impl: got {self.impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}.")
        resolve_treatment(self.treatment, None, has_draws=False, divergence=self.divergence)
        for parameter in divergence_parameters():
            if parameter.name in PARAMETERS:
                parameter.check(getattr(self, parameter.name), parameter.name)
        if self.divergence_parameter is not None:
            own = find_divergence(self.divergence).parameter
            if own is None or own.name in PARAMETERS:
                instead = "no parameter" if own is None else f"it as {own.name}"
                raise KDError(
                    f"divergence_parameter: got {self.divergence_parameter!r} with divergence {self.divergence!r}; "
                    f"expected {instead}."
                )
            own.check(self.divergence_parameter, "divergence_parameter")
        object.__setattr__(self, "ignore_index", whole_number("ignore_index", self.ignore_index, "an int"))

    @property
    def parameter(self) -> float:
        """The value of the divergence's parameter; 0 for a divergence that has none."""
        own = find_divergence(self.divergence).parameter
        if own is None:
            return 0.0
        value = getattr(self, own.name) if own.name in PARAMETERS else self.divergence_parameter
        return float(own.default if value is None else value)


class LossSettings(TypedDict, total=False):
    """The fields of LossConfig as keyword arguments."""

    alpha: Number
    temperature: Number
    divergence: str
    treatment: str
    beta: float
    skew: float
    divergence_parameter: float | None
    ignore_index: int
    impl: str


def check_numbers(alpha: Number, temperature: Number) -> None:
    """Raise KDError unless both are numbers in range, or 0-d tensors of real numbers (whose values are not read)."""
    if is_number("alpha", alpha) and not 0 <= alpha <= 1:
        raise KDError(f"alpha: got {alpha}; expected a number from 0 (soft loss alone) to 1 (hard loss alone).")
    if is_number("temperature", temperature):
        if not 0 < temperature < inf:
            raise KDError(f"temperature: got {temperature}; expected a positive, finite number.")
        if temperature > HIGHEST_TEMPERATURE:
            raise KDError(
                f"temperature: got {temperature}; expected at most {HIGHEST_TEMPERATURE:g}: beyond it the rounding of "
                "the loss, which grows with T^2, exceeds the loss."
            )
