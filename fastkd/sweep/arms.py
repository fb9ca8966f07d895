"""The arms of a sweep: what each of them changes in the settings, and which of them can share a memory.

Pure but for `free_memory`; `sweep.py` trains them.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cache.spec import CacheSpec
from ..errors import TrainError
from ..settings import TrainSettings
from ..train.settings_check import check_settings
from ..train.student import Student
from ..utils.text import size_text

FIELDS = ("alpha", "temperature", "divergence", "treatment", "rate")
_TEXTS = ("divergence", "treatment")


@dataclass(frozen=True)
class Arm:
    """Changes of some settings, in the order of FIELDS."""

    changes: tuple[tuple[str, float | str], ...]

    @property
    def name(self) -> str:
        """For people, and for the folder: "alpha=0.5,rate=0.001"."""
        return ",".join(f"{name}={_text(value)}" for name, value in self.changes) or "unchanged"

    def of(self, settings: TrainSettings, seed: int) -> TrainSettings:
        """The settings of one of its trainings."""
        changes: dict[str, Any] = dict(self.changes)
        return replace(settings, seed=seed, **changes)


def make_arms(arms: Any, settings: TrainSettings, spec: CacheSpec) -> tuple[list[Arm], list[str]]:
    """The arms, and what a person should know of them.

    arms: a mapping {setting: values}, whose grid is taken; or a list of mappings {setting: value}, an arm each.
    Of a grid, combinations that cannot be, and those that come to the same as another (alpha=1 has no use for a
    temperature), are left out and noted. Raises TrainError where an arm of a list cannot be, where every arm with one
    of a grid's values is such, and where two arms are the same.
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


def _grid(values: Mapping[str, Any], settings: TrainSettings, spec: CacheSpec) -> tuple[list[Arm], list[str]]:
    given = {name: [x] if isinstance(x, str) or not isinstance(x, Sequence) else list(x) for name, x in values.items()}
    given = {name: some for name, some in given.items() if some}
    found = [_arm(dict(zip(given, some, strict=True))) for some in itertools.product(*given.values())] if given else []
    _check_each_once(found)
    problems = {arm: problem for arm in found if (problem := _problem(arm, settings, spec))}
    kept = [arm for arm in found if arm not in problems]
    for change in {change for arm in problems for change in arm.changes} - {c for arm in kept for c in arm.changes}:
        # a value that goes with no other is no matter of combinations
        raise TrainError(f"arms: {next(text for arm, text in problems.items() if change in arm.changes)}")
    notes = [f"arm {arm.name} cannot be, and is left out: {problem}" for arm, problem in problems.items()]
    first: dict[Any, Arm] = {}
    for arm in list(kept):
        own = arm.of(settings, settings.seed)
        if own.alpha == 1.0 and own.alpha_end in (None, 1.0) and first.setdefault(own.rate, arm) is not arm:
            kept.remove(arm)
            notes.append(f"arm {arm.name} is left out: without a soft loss it comes to {first[own.rate].name}")
    return kept, notes


def _arm(changes: Mapping[str, Any]) -> Arm:
    if unknown := [name for name in changes if name not in FIELDS]:
        raise TrainError(f"arms: got {unknown[0]!r}; an arm may change {', '.join(FIELDS)}. Give others to all arms.")
    return Arm(tuple((name, _value(name, changes[name])) for name in FIELDS if name in changes))


def _value(name: str, value: Any) -> float | str:
    if name in _TEXTS:
        possible = TrainSettings.__annotations__[name].__args__
        if value in possible:
            return str(value)
        raise TrainError(f"arms: got {name}={value!r}; expected one of {', '.join(possible)}.")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TrainError(f"arms: got {name}={value!r}; expected a number.")
    return float(value)


def _check_each_once(arms: Sequence[Arm]) -> None:
    if not arms:
        raise TrainError(f"arms: found none. Give values of some of {', '.join(FIELDS)}.")
    for arm in arms:
        if arms.count(arm) > 1:
            raise TrainError(f"arms: {arm.name} is there {arms.count(arm)} times. Name each value once; seeds repeat.")


def _problem(arm: Arm, settings: TrainSettings, spec: CacheSpec) -> str:
    """What is wrong with an arm; empty where nothing is."""
    try:
        check_settings(arm.of(settings, settings.seed), spec)
    except TrainError as error:
        return str(error)
    return ""


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return short if float(short := f"{value:g}") == value else repr(value)


@dataclass(frozen=True)
class Memory:
    """Bytes that arms take. each: an arm's weights and its optimizer's state (AdamW's two numbers a weight). beside:
    the gradients of the arm whose turn it is. Activations are one student's, and not in it. free: of the device."""

    each: int
    beside: int
    free: int

    @classmethod
    def of(cls, student: Student, device: torch.device) -> "Memory":
        """Of arms like this student."""
        trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
        return cls(student.parameters_and_bytes[1] + 2 * trained, trained, free_memory(device))

    def at_once(self, arms: int) -> int:
        """Bytes of so many arms."""
        return arms * self.each + self.beside

    def check(self, arms: int, at_once: int | None, student: Student, device: torch.device) -> None:
        """TrainError where they do not fit; a single arm is not refused."""
        together = min(arms, at_once or arms)
        if together == 1 or self.at_once(together) <= self.free:
            return
        fit = max(1, (self.free - self.beside) // self.each)
        raise TrainError(
            f"arms: got {arms}, {together} of them at once, of a student of {student.parameters_and_bytes[0]:,} "
            f"parameters: {size_text(self.at_once(together))} (weights and AdamW's state, {size_text(self.each)} an "
            f"arm, and one arm's gradients), and {size_text(self.free)} are free on {device}. Train {fit} at once "
            f"(--at-once {fit}: {-(-arms // fit)} reads of the cache a seed), or give fewer values."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be had: of the GPU, or of the machine and the control group that this process is in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # not such a system, or no limit
        pass
    return max(0, min(found))
