"""Treatments: how a loss treats the teacher's probability outside the top-k entries. Imports no torch.

bucket       the rest of the vocabulary is one more outcome
sampled      the stored draws stand for it (Anshumann et al., Sparse Logit Sampling, 2025)
renormalize  it is left out, and the top-k entries are scaled to sum to 1
auto         sampled where there are draws, the divergence takes them and the temperature is near enough to the one
             that they were drawn at; otherwise bucket
"""

from typing import TYPE_CHECKING, Literal

from . import divergences
from .errors import KDError

TREATMENTS = ("auto", *divergences.TREATMENTS)
if TYPE_CHECKING:
    TreatmentName = str
else:
    TreatmentName = Literal[TREATMENTS]  # for command lines

# Up to this multiple of their own temperature, `auto` uses the draws: beyond it their variance costs more than the bias
# of the bucket (measured in the gradient through a real LM head).
SAMPLED_REACH = 1.5


def sampled_reach(draw_temperature: float) -> float:
    """The highest temperature at which `auto` uses draws that were made at `draw_temperature`."""
    from .tail import ON_GRID  # needs NumPy, unlike the names above

    return SAMPLED_REACH * draw_temperature * (1 + ON_GRID)


def resolve_treatment(
    treatment: str,
    temperature: float | None,
    *,
    has_draws: bool,
    draw_temperature: float = 1.0,
    has_topk: bool = True,
    divergence: str = "forward_kl",
) -> str:
    """The treatment that a loss applies: "bucket", "sampled" or "renormalize".

    temperature: None where it is not known on the host. Then the result is "auto" if it depends on the temperature.
    has_draws, has_topk: whether the targets hold draws, and top-k entries. "sampled" of targets without draws is
        "bucket", as it is for every row without draws.

    Raises KDError for an unknown treatment, for one that the divergence does not take, and where targets that hold
    draws alone would need top-k entries.
    """
    if treatment not in TREATMENTS:
        raise KDError(f"treatment: got {treatment!r}; expected one of {', '.join(TREATMENTS)}.")
    takes = divergences.find_divergence(divergence).treatments
    if treatment not in ("auto", *takes):
        raise KDError(
            f"treatment: got {treatment!r} with divergence {divergence!r}, which needs the teacher's probability "
            "wherever the student puts mass; use treatment 'bucket' (or 'auto'), or divergence 'forward_kl'."
        )
    resolved = treatment
    if treatment == "sampled" and not has_draws:
        resolved = "bucket"
    elif treatment == "auto":
        if not has_draws or "sampled" not in takes:
            resolved = "bucket"
        elif temperature is not None:
            resolved = "sampled" if temperature <= sampled_reach(draw_temperature) else "bucket"
    if has_draws and not has_topk and resolved in ("bucket", "renormalize"):
        reach = f" (auto is that up to a temperature of {sampled_reach(draw_temperature):g})"
        raise KDError(
            f"treatment: got {treatment!r}{'' if resolved == treatment else f', here {resolved!r},'} for targets that "
            f"hold draws and no top-k entries; use treatment 'sampled'{reach if treatment == 'auto' else ''}."
        )
    return resolved
