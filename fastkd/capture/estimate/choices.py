"""What other settings would cost: the top-k of some of a slice's rows, again and otherwise."""

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ...cache import CacheSpec
from ...kernels import KDError, SparseTargets
from ...models.protocol import Hidden, Logits
from ...settings import CaptureSettings
from ...teachers.protocol import Teacher
from ..answers import FIELDS, TopKConfig, joined, targets_of, topk_config
from ..rows import ShardRows
from ..window_plan import WindowPlan
from .costs import Clock
from .measure import Kept, Said, Slice
from .sizes import TARGETS, measure_sizes

KS, MASSES, DRAWS, DRAWS_ALONE = (16, 32, 48, 64, 128), (0.9, 0.95, 0.99), (0, 16, 32), (16, 32, 50)
_LEAST_ROWS = 256
_REPEATS = 2  # the faster counts: the first may have to compile, or to find its memory


class Keeping(NamedTuple):
    """What is kept of a row."""

    k: int
    draws: int
    mass: float | None


@dataclass(frozen=True)
class Choice:
    """What another k, mass or number of draws would cost, from the same slice.

    asked: it is the one that was asked for. bytes_per_position, bytes: of the shards. mass_1, mass_2: the part of the
    probability that heads hold at T = 1 and T = 2, on average; None where that temperature is not to be had.
    topk_seconds: of head and top-k, of a position that counts. hours, cost: of the whole capture.
    """

    k: int
    draws: int
    mass: float | None
    asked: bool
    bytes_per_position: float
    bytes: float
    mass_1: float
    mass_2: float | None
    topk_seconds: float
    hours: float
    cost: float | None


def _others(asked: Keeping, vocab_size: int) -> list[Keeping]:
    """What was asked for, and what might have been."""
    found = [asked]
    found += [asked._replace(k=k) for k in KS]
    found += [asked._replace(mass=mass) for mass in MASSES if asked.k]
    found += [asked._replace(draws=draws) for draws in DRAWS if asked.k]
    found += [Keeping(0, draws, None) for draws in DRAWS_ALONE]
    return [c for c in dict.fromkeys(found) if c == asked or c.k <= vocab_size]


def choices(
    teacher: Teacher,
    spec: CacheSpec,
    settings: CaptureSettings,
    found: Slice,
    plan: WindowPlan,
    of_all: dict[str, float],
    base: tuple[float, float],
    clock: Clock,
    seconds: float,
    progress: bool = False,
) -> list[Choice]:
    """A row for each of the settings, the one asked for first.

    base: seconds a position, of running and of encoding. seconds: to spend, about, but for 256 rows at least.
    """
    if not found.kept:
        return []
    asked = Keeping(settings.k, settings.draws, settings.mass)
    keepings = _others(asked, spec.vocab_size)
    counts = np.concatenate([said.some.counts for said in found.said])
    share = float(counts.mean())
    shard = max(plan.totals["positions"] / plan.shards * share, 1.0)
    rows = sum(len(some.numbers) for some in found.kept)
    kept = [some.every(-(-rows // _LEAST_ROWS)) for some in found.kept]
    first = _tried(teacher, spec, settings, asked, kept, shard)
    afford = min(rows, int(seconds / max(_REPEATS * sum(first.seconds) * len(keepings), 1e-9)))
    if afford > _LEAST_ROWS:
        kept = [some.every(-(-rows // afford)) for some in found.kept]
        first = _tried(teacher, spec, settings, asked, kept, shard)
    total, positions = sum(of_all.values()), plan.totals["positions"]
    targets = sum(size for name, size in of_all.items() if name.startswith(TARGETS))
    found_so: list[Choice] = []
    for keeping in tqdm(keepings, desc="other settings", disable=not progress):
        tried = first if keeping == asked else _tried(teacher, spec, settings, keeping, kept, shard)
        size = total + targets * (tried.bytes / first.bytes - 1)
        run, encode = (
            before + max((now - then) * share, -0.9 * before)  # a slow moment may not make it free
            for before, now, then in zip(base, tried.seconds, first.seconds, strict=True)
        )
        each = clock.position(run, encode)
        found_so.append(
            Choice(
                **keeping._asdict(),
                asked=keeping == asked,
                bytes_per_position=size / positions,
                bytes=size,
                mass_1=tried.mass_1,
                mass_2=tried.mass_2,
                topk_seconds=tried.seconds[0],
                hours=clock.hours(each),
                cost=clock.cost(each),
            )
        )
    return found_so


class _Tried(NamedTuple):
    """bytes: of the targets of a position that counts. seconds: of head and top-k, and of encoding, of such a one."""

    bytes: float
    mass_1: float
    mass_2: float | None
    seconds: tuple[float, float]


def _tried(
    teacher: Teacher, spec: CacheSpec, settings: CaptureSettings, keeping: Keeping, kept: list[Kept], shard: float
) -> _Tried:
    """The rows that were kept, kept so. shard: positions that count, of a shard."""
    ask = topk_config(settings, keeping)
    spent = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        targets = _said_again(teacher, ask, kept)
        spent.append(time.perf_counter() - begun)
    n = len(targets)
    ones = np.ones(n, np.uint32)
    inputs = {name: np.concatenate([some.inputs[name] for some in kept]) for name in spec.inputs}
    some = ShardRows(inputs, np.ones(n, bool), ones, ones, np.zeros(n, np.int64), np.zeros(n, np.int64), 0)
    arrays = {name: t.numpy() for name in FIELDS if (t := getattr(targets, name)) is not None}
    sizes = measure_sizes(replace(spec, **keeping._asdict()), Said(some, arrays), shard)
    taken = sizes.of(np.array([round(shard)]))
    return _Tried(
        sum(size for name, size in taken.items() if name.startswith(TARGETS)) / shard,
        _mass(targets, 1.0) or 0.0,
        _mass(targets, 2.0),
        (min(spent) / n, sizes.seconds),
    )


@torch.inference_mode()
def _said_again(teacher: Teacher, ask: TopKConfig, kept: list[Kept]) -> SparseTargets:
    """The targets of all rows that were kept, on the host."""
    parts = []
    for some in kept:
        output, n = some.output, len(some.numbers)
        if isinstance(output, Hidden):
            output = Hidden(output.states.to(teacher.device), output.lm_head)
        else:
            output = Logits(output.values.to(teacher.device))
        flat, numbers = torch.arange(n, device=teacher.device), torch.from_numpy(some.numbers).to(teacher.device)
        parts.append(targets_of(output, flat, numbers, ask, torch.Size([n]), teacher.vocab_size).to("cpu"))
    return joined(parts)


def _mass(targets: SparseTargets, temperature: float) -> float | None:
    """What heads hold of the probability at a temperature, on average."""
    used = targets.logprobs > -torch.inf
    head = used if targets.draws is None else used & (targets.draws == 0)
    if not bool(head.any()):
        return 0.0
    try:
        tail = targets.at(temperature, "bucket").log_q_tail
    except KDError:  # too few temperatures are stored to say anything of this one
        return None
    return float(1 - tail.exp().mean())
