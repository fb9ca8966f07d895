"""Checks of training settings: before anything is loaded, and when a run is resumed with other ones."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..cache.spec import CacheSpec
from ..errors import TrainError
from ..evaluate.measures import LOG, MEASURES, printed_in
from ..settings import TrainSettings
from ..utils.similar import did_you_mean
from ..utils.text import HASH
from .checkpoint import Checkpoint, read, steps_of
from .matching import parse
from .metrics import check_tracker
from .objective import Objective, TokenKD, check_objective
from .unused import check_used

# Settings that may change when a run is resumed: they affect speed, memory, rounding or what is kept.
RESUME_MAY_CHANGE = {
    "steps", "epochs", "micro_tokens", "layout", "parallel", "activation_checkpointing", "compile", "device",
    "timeout_minutes", "evaluate_every", "evaluate_positions", "log", "checkpoint_every", "checkpoint_minutes", "keep",
    "export", "export_exit", "export_teacher", "lora_merge",
    "threads", "allow_partial", "tokenizer", "allow_other_tokenizer", "revision", "attention", "trust_remote_code",
}  # fmt: skip
_OF_QUANTIZE = ("quantize", "quantize_after")
_OF_LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout")
_LONGER = (
    " A run cannot be made longer, as schedules such as that of the learning rate are laid over all of its steps. To "
    "go on from its result, give its folder student/ as the student of a new run, which warms up again."
)
_RANGES = {
    **dict.fromkeys(("rate_floor", "warmup", "decay", "alpha", "alpha_end", "exit_alpha", "lora_dropout"), (0.0, 1.0)),
    **dict.fromkeys(
        ("weight_decay", "rate", "epochs", "checkpoint_minutes", "match_rate", "exit_weight"), (0.0, math.inf)
    ),
    "timeout_minutes": (0.0, 1e6),  # a timedelta has an end
}
_COUNTS = {
    **dict.fromkeys(
        ("steps", "batch_tokens", "batch_size", "micro_tokens", "checkpoint_every", "keep", "lora_rank",
         "max_positions", "evaluate_positions", "shards_open", "threads"), 1,
    ),
    **dict.fromkeys(("evaluate_every", "skip", "seed"), 0),
}  # fmt: skip
"""The least value of settings that are integers."""
_MOST = 2**63 - 1  # of an integer: of torch's and numpy's
HIGH_RATE = 0.1
"""A learning rate with which AdamW moves every weight by so much a step."""


def check_settings(settings: TrainSettings, spec: CacheSpec | None, objective: Objective | None = None) -> None:
    """Raise TrainError, naming it, for a setting that is not possible, or not with this cache or objective.

    spec: of the cache, or None for another source. objective: None for the `TokenKD` of the settings.
    """
    for field in fields(TrainSettings):
        if get_origin(field.type) is Literal and (value := getattr(settings, field.name)) not in get_args(field.type):
            why = " (float16 loses small gradients; bfloat16 needs no scaling of the loss)" * (value == "float16")
            expected = ", ".join(get_args(field.type))
            hint = did_you_mean(str(value), get_args(field.type))
            raise TrainError(f"{field.name}: got {value!r}; expected one of {expected}{why}.{hint}")
    check_tracker(settings.log)
    for name, (low, high) in _RANGES.items():
        number = getattr(settings, name)
        if number is not None and not (low <= number <= high and math.isfinite(number)):
            raise TrainError(f"{name}: got {number!r}; expected a number from {low:g} to {high:g}.")
    if settings.steps is None and settings.epochs == 0:
        raise TrainError("epochs: got 0; expected a number above 0, as nothing would be trained.")
    for name, least in _COUNTS.items():
        count = getattr(settings, name)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise TrainError(f"{name}: got {count!r}; expected an integer from {least} on.")
        if count is not None and count > _MOST:
            raise TrainError(f"{name}: got {count!r}; expected an integer from {least} to {_MOST}.")
    betas = settings.adam_betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise TrainError(f"adam_betas: got {betas!r}; expected two numbers from 0 to below 1.")
    if not 0 < settings.adam_eps < math.inf:
        raise TrainError(f"adam_eps: got {settings.adam_eps!r}; expected a positive number.")
    if settings.clip is not None and not settings.clip > 0:
        raise TrainError(f"clip: got {settings.clip!r}; expected a positive number, or None for none.")
    if settings.lora_rank is None:
        check_used(settings, _OF_LORA, "without lora_rank")
    check_quantize(settings)
    if settings.lora_alpha is not None and not (settings.lora_alpha > 0 and math.isfinite(settings.lora_alpha)):
        raise TrainError(f"lora_alpha: got {settings.lora_alpha!r}; expected a positive number.")
    if isinstance(settings.match, str):
        raise TrainError(f"match: got {settings.match!r}; expected a tuple of entries.")
    for entry in settings.match:
        parse(entry)
    if wrong := [n for n in settings.exits if not isinstance(n, int) or n < 1]:
        raise TrainError(f"exits: got {wrong[0]!r}; expected numbers of layers from 1 on, such as 6,12.")
    if len(set(settings.exits)) < len(settings.exits):
        raise TrainError(f"exits: got {', '.join(map(str, settings.exits))}; expected each layer once.")
    if settings.export_exit is not None and settings.export_exit not in settings.exits:
        raise TrainError(
            f"export_exit: got {settings.export_exit}; expected one of the exits that are trained "
            f"({', '.join(map(str, settings.exits)) or 'none'})."
        )
    objective = TokenKD.from_settings(settings) if objective is None else objective
    check_objective(objective)
    if spec is not None and isinstance(objective, TokenKD):
        objective.check_cache(spec)


def doubtful(settings: TrainSettings, spec: CacheSpec | None) -> list[str]:
    """Warnings for values that are possible and hardly meant. spec: of the cache, or None for a source without one."""
    found = []
    if settings.rate >= HIGH_RATE:
        found.append(f"rate {settings.rate:g} is very high for AdamW: 3e-4 is the default, and 1e-3 is high.")
    if settings.rate == 0:
        found.append("rate 0 trains nothing: the student stays as it is.")
    soft = settings.alpha < 1 or settings.alpha_end not in (None, 1.0)
    end = settings.temperature_end
    highest = settings.temperature if end is None else max(settings.temperature, end)
    if spec is not None and soft and highest > max(spec.temperatures) * (1 + 1e-6):
        found.append(
            f"temperature {highest:g} is above the highest at which tails are stored, {max(spec.temperatures):g}: the "
            "mass outside the stored entries is interpolated there. Capture with it among --temperatures."
        )
    return found


def check_quantize(settings: TrainSettings) -> None:
    """Raise TrainError for settings of quantisation that are not possible, whatever the student."""
    after = settings.quantize_after
    if settings.quantize == "none":
        check_used(settings, ("quantize_after",), "without quantize")
    elif settings.lora_rank is not None:
        raise TrainError(
            f"quantize: got {settings.quantize!r} with lora_rank; expected one of them. Train the adapter first, with "
            "lora_merge, and then the merged student with quantize."
        )
    if after is not None and (isinstance(after, bool) or not isinstance(after, int) or after < 0):
        raise TrainError(f"quantize_after: got {after!r}; expected a number of steps from 0 on.")
    if after is not None and settings.steps is not None:
        check_quantize_after(after, settings.steps)


def check_quantize_after(after: int, steps: int) -> None:
    """Raise TrainError if no step of the training would be made with quantised weights."""
    if after >= steps:
        raise TrainError(
            f"quantize_after: got {after}; expected less than the {steps} steps of the training, so that some are made "
            "with quantised weights."
        )


def check_best(settings: TrainSettings) -> None:
    """Raise TrainError for a measure that no evaluation of fastkd's has. One of a part is NAME/MEASURE."""
    if settings.best.rpartition("/")[2] not in MEASURES:
        raise TrainError(f"best: got {settings.best!r}; expected one of {', '.join(m.name for m in printed_in(LOG))}.")


def check_begun(run: Path, settings: TrainSettings, data: Mapping[str, Any] | None = None) -> None:
    """Raise TrainError, before a student is loaded, if the newest checkpoint of a run is of other settings. What they
    come to on this machine and with this data, such as the steps of an epoch, is compared when it is loaded.

    data: what is known of the source's fingerprint before anything is loaded. What differs there has its own check, and
    is named here as well if settings differ, so that a user learns of all at once."""
    steps = steps_of(run)
    found = read(run, steps[-1], verify=False) if steps else None
    theirs = found.state.get("settings") if isinstance(found, Checkpoint) else None
    if not isinstance(found, Checkpoint) or not isinstance(theirs, dict):
        return  # none, or a damaged one
    ours = stated(asdict(settings))
    known = (theirs.keys() | ours.keys()) - {"precision", "objective", "live"}
    # without these settings the data decide, or what the run was begun with
    known -= {name for name in ("steps", "batch_tokens") if getattr(settings, name) is None}
    loader, data = found.state.get("loader"), data or {}
    there = loader.get("fingerprint") if isinstance(loader, dict) else None
    both = data.keys() & there.keys() if isinstance(there, dict) else ()
    sources = [{n: one[n] for n in both} for one in (there or {}, json.loads(json.dumps(data)))]
    check_same({n: theirs.get(n) for n in known}, {n: ours.get(n) for n in known}, str(found.folder), sources=sources)


def resume_fingerprint(settings: TrainSettings, steps: int, autocast: Any) -> dict[str, Any]:
    """The settings with an effect on the trained student, as JSON. steps: in all. autocast: the type of matrix products
    on this machine, or None."""
    found = stated(asdict(settings)) | {"steps": steps}
    return found | {"precision": "float32" if autocast is None else str(autocast).removeprefix("torch.")}


def stated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with an effect on the trained student, as they were given. settings: as in run.json."""
    known = {field.name for field in fields(TrainSettings)} - RESUME_MAY_CHANGE
    # runs from before there was matching, or exits, or LoRA, or quantisation, have none of their settings
    known -= {"match", "match_projector", "match_init", "match_rate"} if not settings.get("match") else set()
    known -= {"exits", "exit_weight", "exit_alpha"} if not settings.get("exits") else set()
    known -= set(_OF_QUANTIZE) if settings.get("quantize", "none") == "none" else set()
    known -= set(_OF_LORA) if settings.get("lora_rank") is None else set()
    found = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items() if name in known}
    return {"steps": settings["steps"] or f"{settings['epochs']} epochs"} | found


def check_same(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str, *, sources: Sequence[Mapping[str, Any]] = ({}, {})
) -> None:
    """Raise TrainError, naming them, if settings differ from those that a run was begun with.

    sources: what decides the steps of its source and of this one, which has its own check: named as well if settings
    differ, so that a user learns of all at once.
    """
    found = differences(theirs, ours)
    if found:
        found |= differences(*sources)
        raise TrainError(
            f"{where}: it was begun with other settings ({'; '.join(found.values())}). Resume with those, or train "
            f"into another folder.{_LONGER * ('steps' in found)}"
        )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """What differs, by name, in words."""
    names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    return {name: HASH.sub(r"\1…", f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here") for name in names}
