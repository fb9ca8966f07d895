"""The arms of a sweep: which settings each of them changes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..cache.spec import CacheSpec
from ..errors import TrainError
from ..settings import TrainSettings
from ..train.settings_check import check_settings
from ..utils.similar import did_you_mean

FIELDS = ("alpha", "temperature", "divergence", "treatment", "rate")


AUTO: tuple[dict[str, Any], ...] = (
    *({"alpha": a, "temperature": t, "divergence": "forward_kl"} for t in (1.0, 2.0) for a in (0.0, 0.2, 0.5, 0.8)),
    {"alpha": 0.5, "temperature": 4.0, "divergence": "forward_kl"},
    *(
        {"alpha": a, "temperature": t, "divergence": name}
        for name in ("reverse_kl", "jsd")
        for a, t in ((0.0, 1.0), (0.5, 1.0), (0.5, 2.0))
    ),
)
"""The arms of `--auto` if no values are given, besides the hard labels alone and the settings as they are."""


@dataclass(frozen=True)
class Arm:
    """Values of some settings, in the order of FIELDS."""

    changes: tuple[tuple[str, float | str], ...]

    @property
    def name(self) -> str:
        """For messages, and of its folder: "alpha=0.5,rate=0.001"."""
        return ",".join(f"{name}={_text(value)}" for name, value in self.changes) or "unchanged"

    def of(self, settings: TrainSettings, seed: int) -> TrainSettings:
        changes: dict[str, Any] = dict(self.changes)
        return replace(settings, seed=seed, **changes)


def make_arms(arms: Any, settings: TrainSettings, spec: CacheSpec) -> tuple[list[Arm], list[str]]:
    """The arms, and notes on those that were left out.

    arms: a mapping {setting: values}, for the grid of all combinations; or a list of mappings {setting: value}, one for
    each arm. Combinations of a grid that are not possible, and those equivalent to another one (with alpha=1 the
    temperature has no effect), are left out. Raises TrainError if an arm of a list is not possible, if a value of a
    grid is not possible in any combination, and for duplicates.
    """
    if isinstance(arms, Mapping):
        return _grid(arms, settings, spec)
    if isinstance(arms, str) or not isinstance(arms, Sequence) or not all(isinstance(a, Mapping) for a in arms):
        raise TrainError(f"arms: got {arms!r}; expected {{setting: values}}, or a list of {{setting: value}}.")
    found = [_arm(changes) for changes in arms]
    _check_each_once(found)
    for arm in found:
        if problem := _problem(arm, settings, spec):
            raise TrainError(f"arm {arm.name}: {problem}")
    return found, []


def auto_arms(arms: Any, settings: TrainSettings, spec: CacheSpec) -> tuple[list[Arm], Arm, Arm, list[str]]:
    """The arms of `--auto`; two of them, the settings as they are and the hard labels alone; and notes.

    arms: as for `make_arms`; empty for AUTO, as far as the cache supports it.
    """
    if arms and any(arms.values() if isinstance(arms, Mapping) else arms):
        found, notes = make_arms(arms, settings, spec)
    else:
        given = [_arm(changes) for changes in AUTO]
        problems = {arm: problem for arm in given if (problem := _problem(arm, settings, spec))}
        found = [arm for arm in given if arm not in problems]
        notes = [f"arm {arm.name} is not possible, and is left out: {problem}" for arm, problem in problems.items()]
    names = dict.fromkeys(name for name in FIELDS if any(name in dict(arm.changes) for arm in found))
    own = {name: getattr(settings, name) for name in names or ("alpha",)}
    for changes in ({**own}, {**own, "alpha": 1.0}):
        if problem := _problem(_arm(changes), settings, spec):
            raise TrainError(f"auto: the settings as they are, which are among the arms, are not possible: {problem}")
        found.append(_arm(changes))
    first: dict[Any, Arm] = {}
    for arm in found:
        first.setdefault(_effect(arm, settings), arm)
    default, hard = (first[_effect(arm, settings)] for arm in found[-2:])
    return list(first.values()), default, hard, notes


def is_hard(settings: TrainSettings) -> bool:
    """Whether a training is on hard labels alone."""
    return settings.alpha == 1.0 and settings.alpha_end in (None, 1.0)


def _effect(arm: Arm, settings: TrainSettings) -> Any:
    """Equal for arms of the same effect: without a soft loss only the rate has one."""
    own = arm.of(settings, settings.seed)
    return ("hard", own.rate) if is_hard(own) else own


def _grid(values: Mapping[str, Any], settings: TrainSettings, spec: CacheSpec) -> tuple[list[Arm], list[str]]:
    given = {name: [x] if isinstance(x, str) or not isinstance(x, Sequence) else list(x) for name, x in values.items()}
    given = {name: some for name, some in given.items() if some}
    combinations = itertools.product(*given.values()) if given else ()
    found = [_arm(dict(zip(given, some, strict=True))) for some in combinations]
    _check_each_once(found)
    problems = {arm: problem for arm in found if (problem := _problem(arm, settings, spec))}
    kept = [arm for arm in found if arm not in problems]
    for change in {change for arm in problems for change in arm.changes} - {c for arm in kept for c in arm.changes}:
        # this value is not possible in any combination
        raise TrainError(f"arms: {next(text for arm, text in problems.items() if change in arm.changes)}")
    notes = [f"arm {arm.name} is not possible, and is left out: {problem}" for arm, problem in problems.items()]
    first: dict[Any, Arm] = {}
    for arm in list(kept):
        own = arm.of(settings, settings.seed)
        if is_hard(own) and first.setdefault(own.rate, arm) is not arm:
            kept.remove(arm)
            notes.append(f"arm {arm.name} is left out: without a soft loss it is the same as {first[own.rate].name}")
    return kept, notes


def _arm(changes: Mapping[str, Any]) -> Arm:
    if unknown := [name for name in changes if name not in FIELDS]:
        raise TrainError(
            f"arms: got {unknown[0]!r}; expected some of {', '.join(FIELDS)}. Other settings are shared by all arms."
            + did_you_mean(unknown[0], FIELDS)
        )
    return Arm(tuple((name, _value(name, changes[name])) for name in FIELDS if name in changes))


def _value(name: str, value: Any) -> float | str:
    if isinstance(getattr(TrainSettings, name), str):
        return str(value)  # checked with the other settings
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TrainError(f"arms: got {name}={value!r}; expected a number.")
    return float(value)


def _check_each_once(arms: Sequence[Arm]) -> None:
    if not arms:
        raise TrainError(f"arms: got none; expected values of some of {', '.join(FIELDS)}.")
    if twice := [arm for arm in arms if arms.count(arm) > 1]:
        count = arms.count(twice[0])
        raise TrainError(f"arms: got {twice[0].name} {count} times; expected each once. Use seeds for repetitions.")


def _problem(arm: Arm, settings: TrainSettings, spec: CacheSpec) -> str:
    """Why an arm is not possible, or an empty text."""
    try:
        check_settings(arm.of(settings, settings.seed), spec)
    except TrainError as error:
        return str(error)
    return ""


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return short if float(short := f"{value:g}") == value else repr(value)
