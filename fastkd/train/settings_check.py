"""What is wrong with a training's settings before anything is loaded, and with going on after they were changed."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..cache.spec import CacheSpec
from ..errors import TrainError
from ..kernels import KDError
from ..kernels.tail import check_temperature
from ..kernels.treatment import sampled_reach
from ..settings import TrainSettings
from .schedule import RAMPS, RATES
from .trackers import check_tracker

# What may be another when a run goes on: it decides how fast, where and what is kept, or a rounding.
RESUME_MAY_CHANGE = {
    "steps", "epochs", "micro_tokens", "layout", "parallel", "activation_checkpointing", "compile", "device",
    "evaluate_every", "evaluate_positions", "log", "checkpoint_every", "checkpoint_minutes", "keep", "export",
    "threads", "allow_partial", "tokenizer", "allow_other_tokenizer", "revision", "attention",
    "trust_remote_code",
}  # fmt: skip


def check_settings(settings: TrainSettings, spec: CacheSpec) -> None:
    """TrainError, naming it, for a setting that cannot be, or that this cache does not serve."""
    for name, possible in (
        ("rate_schedule", RATES),
        ("alpha_schedule", RAMPS),
        ("temperature_schedule", RAMPS),
        ("precision", ("auto", "float32", "bfloat16")),
        ("parallel", ("ddp", "fsdp")),
        ("export", ("last", "best")),
    ):
        if (value := getattr(settings, name)) not in possible:
            why = " (float16 loses small gradients; bfloat16 needs no scaling of the loss)" * (value == "float16")
            raise TrainError(f"{name}: got {value!r}; expected one of {', '.join(possible)}{why}.")
    for name, low, high in (
        ("rate_floor", 0.0, 1.0),
        ("warmup", 0.0, 1.0),
        ("decay", 0.0, 1.0),
        ("alpha", 0.0, 1.0),
        ("alpha_end", 0.0, 1.0),
        ("weight_decay", 0.0, math.inf),
        ("rate", 0.0, math.inf),
        ("epochs", 0.0, math.inf),
        ("checkpoint_minutes", 0.0, math.inf),
    ):
        number = getattr(settings, name)
        if number is not None and not (low <= number <= high and math.isfinite(number)):
            raise TrainError(f"{name}: got {number!r}; expected a number from {low:g} to {high:g}.")
    for name, least in (("steps", 1), ("evaluate_every", 0), ("checkpoint_every", 1), ("keep", 1)):
        count = getattr(settings, name)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise TrainError(f"{name}: got {count!r}; expected an integer from {least} on.")
    if settings.clip is not None and not settings.clip > 0:
        raise TrainError(f"clip: got {settings.clip!r}; expected a positive number, or None for none.")
    check_tracker(settings.log)
    _check_teacher(settings, spec)


def _check_teacher(settings: TrainSettings, spec: CacheSpec) -> None:
    """Whether the cache serves the temperatures, under the treatment that they come to."""
    first = settings.temperature
    last = first if settings.temperature_end is None else settings.temperature_end
    # between them, too: off the grid more has to be stored
    found = {first, last} | ({(first + last) / 2, (2 * first + last) / 3} if first != last else set())
    for t in sorted(found):
        try:
            check_temperature(t, spec.temperatures)
        except KDError as error:
            raise TrainError(f"{error} The cache has tails at {spec.temperatures}.") from error
    if settings.divergence != "forward_kl" and settings.treatment not in ("auto", "bucket"):
        raise TrainError(
            f"treatment: got {settings.treatment!r} with divergence {settings.divergence!r}, which takes bucket."
        )
    auto = settings.treatment == "auto" and settings.divergence == "forward_kl"
    sampled = settings.treatment == "sampled" or (auto and max(found) <= sampled_reach(spec.draw_temperature))
    if spec.k == 0 and not sampled:
        raise TrainError(
            f"treatment: the cache holds draws alone, and no exact head, which takes treatment 'sampled' (auto is that "
            f"up to a temperature of {sampled_reach(spec.draw_temperature):g}); got {settings.treatment!r} at "
            f"temperatures up to {max(found):g}."
        )
    if settings.treatment == "sampled" and not spec.draws:
        raise TrainError("treatment: found 'sampled', and the cache holds no draws. Use auto, or capture with draws.")


def resume_fingerprint(settings: TrainSettings, steps: int, autocast: Any) -> dict[str, Any]:
    """The settings that decide what a student becomes, as JSON has them. steps: in all. autocast: the type that
    `precision` comes to on this machine, or None."""
    found = {name: value for name, value in asdict(settings).items() if name not in RESUME_MAY_CHANGE}
    found["precision"] = "float32" if autocast is None else str(autocast).removeprefix("torch.")
    return {"steps": steps} | {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}


def stated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a student becomes, as they were given. settings: of run.json, or the same."""
    found = {n: v for n, v in settings.items() if n not in RESUME_MAY_CHANGE}
    steps = settings["steps"] or f"{settings['epochs']} epochs"
    return {"steps": steps} | {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()}


def check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    """TrainError, naming them, where settings that decide are others than those a run was begun with."""
    names = sorted(theirs.keys() | ours.keys())
    if others := [name for name in names if theirs.get(name) != ours.get(name)]:
        listed = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in others)
        raise TrainError(
            f"{where}: it was begun with other settings ({listed}). Go on with those, or train into another folder."
        )
