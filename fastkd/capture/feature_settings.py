"""Settings of features: what is possible, and what their text means."""

from ..errors import DataError
from ..settings import CaptureSettings

ALL, COUNTED = "all", "counted"
STEP = 0.2
"""The step without one in the settings: some 1e-2 nats from a language model's state."""


def check_feature_settings(settings: CaptureSettings) -> None:
    """DataError for settings of features that are invalid for every teacher and dataset."""
    chosen = {
        "feature_step": settings.feature_step is not None,
        "feature_kl": settings.feature_kl is not None,
        "feature_positions": settings.feature_positions != ALL,
        "feature_block": settings.feature_block,
    }
    if not settings.features and (unused := [name for name, given in chosen.items() if given]):
        raise DataError(f"{unused[0]}: got {getattr(settings, unused[0])!r} without features; expected --features.")
    if chosen["feature_step"] and chosen["feature_kl"]:
        raise DataError("feature_step: got feature_kl as well; expected one of them: the other follows from it.")
    for name, low, high in (("feature_step", 1e-4, 8.0), ("feature_kl", 1e-9, 10.0)):
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise DataError(f"{name}: got {value}; expected a number from {low:g} to {high:g}.")
    positions_text(settings)


def positions_text(settings: CaptureSettings) -> str:
    """`feature_positions` as a feature's spec has it: "all", "counted", or a fraction. DataError if it is neither."""
    text = settings.feature_positions
    if text in (ALL, COUNTED):
        return text
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 1e-6 <= fraction <= 1:
        raise DataError(f"feature_positions: got {text!r}; expected all, counted, or a fraction from 1e-6 to 1.")
    if round(fraction, 6) == 1:
        return COUNTED
    return f"{fraction:.6f}".rstrip("0")


def step_of(settings: CaptureSettings) -> float:
    """The step of the settings, unless it has to be found."""
    return STEP if settings.feature_step is None else settings.feature_step
