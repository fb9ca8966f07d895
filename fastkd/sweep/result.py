"""What a sweep comes to: its arms side by side, and whether the best is the best.

A difference between two arms is held against two kinds of noise, each by its 95% interval:

    seeds    would other first weights and another order say the same? The arms share their seeds, so what a seed does
             to all of them drops out; what is left, pooled over all arms (they are taken to be equally noisy), is the
             noise. Infinite with one seed.
    windows  would other held-out text say the same? Pairs of windows, the mean over the seeds: `evaluate.compare`.

An arm is told apart from the best where its distance is beyond both. Each pair is judged by itself: of many arms that
are all alike, the best of them looks better than it is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ..errors import TrainError
from ..evaluate.api import Evaluation, compare
from ..evaluate.measures import SWEEP as SHOWN
from ..evaluate.measures import printed_in, sign_of
from ..evaluate.windows import Windows
from ..train.api import means
from ..train.result import RUN
from ..utils.intervals import t_quantile
from ..utils.signals import DONE, WORK_REMAINS
from ..utils.text import size_text
from .arms import Arm

SWEEP, FAILED = "sweep.json", "diverged.json"
EVALUATION, EVALUATIONS = "evaluation.json", "evaluations.json"  # of one cache; a list, of a mixture


@dataclass(frozen=True, eq=False)
class Result:
    """What a training left. identity: of its student. failed: why it has no result; empty where it has one."""

    identity: Mapping[str, Any]
    evaluations: Sequence[Evaluation] = ()
    failed: str = ""


@dataclass(frozen=True)
class Behind:
    """How far an arm is behind the best, in the measure's units, never below 0 but for a measure's noise; by_seeds,
    by_windows: half the 95% intervals of it; None where they are infinite."""

    distance: float
    by_seeds: float | None
    by_windows: float | None

    @property
    def told_apart(self) -> bool:
        """Whether it is beyond both."""
        return all(half is not None and self.distance > half for half in (self.by_seeds, self.by_windows))


@dataclass(frozen=True)
class ArmResult:
    """An arm. changes: of the settings. folders: of its runs, one a seed. values: of each measure, one a finished seed.
    diverged: why, by seed. behind: the best; None of the best itself, and where it cannot be compared."""

    name: str
    changes: dict[str, float | str]
    folders: list[str]
    values: dict[str, list[float]] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    behind: Behind | None = None

    def mean(self, measure: str) -> float:
        """Over the seeds; NaN where it was not measured."""
        return fmean(self.values[measure]) if self.values.get(measure) else math.nan

    def spread(self, measure: str) -> float | None:
        """Standard deviation between the seeds; None of one."""
        values = self.values.get(measure, [])
        return stdev(values) if len(values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """All of it, and mean and spread of each measure."""
        measures = {n: {"mean": self.mean(n), "spread": self.spread(n)} for n in self.values}
        behind = self.behind and asdict(self.behind) | {"told_apart": self.behind.told_apart}
        return asdict(self) | {"measures": measures, "behind": behind}


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did.

    complete: whether all trainings are at their ends, or diverged. seeds: their numbers. arms: the best first, where
    they can be ranked. measure: that they are ranked by, on the held-out split. best: an arm's name, None where nothing
    was held out, or while work remains. margin: of the best over the next one. alike: names of those that are not told
    apart from the best. at_once, bytes_at_once: arms in memory, and what their weights and optimizers take. Of this
    call: passes (reads of the cache), seconds (of the steps, with waiting), step_seconds (the arms' own part of them),
    waiting (share of the seconds in which there was no batch). plot: the PNG, None where there is none.
    """

    out: str
    complete: bool
    seeds: list[int]
    measure: str
    arms: list[ArmResult]
    best: str | None = None
    margin: Behind | None = None
    alike: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    at_once: int = 0
    bytes_at_once: int = 0
    passes: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    waiting: float = 0.0
    plot: str | None = None

    @property
    def status(self) -> int:
        """Exit status: 0, or 75 where work remains."""
        return DONE if self.complete else WORK_REMAINS

    @property
    def verdict(self) -> str:
        """Which arm is the best, and how sure that is; a sentence or two."""
        if self.best is None:
            return "No arm is named the best: nothing was measured on held-out windows." if self.complete else ""
        text = f"Best by {self.measure}: {self.best}"
        if self.margin is None:
            return f"{text}, the only one."
        noise = f"± {_number(self.margin.by_seeds)} between seeds, ± {_number(self.margin.by_windows)} between windows"
        text += f", {self.margin.distance:.4f} ahead of the next ({noise})."
        if not self.alike:
            return f"{text} It is told apart from all others."
        why = " With one seed nothing can be: give more." if len(self.seeds) == 1 else ""
        return f"{text} Not distinguishable from it: {'; '.join(self.alike)}.{why}"

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        own = {"format": "fastkd-sweep", "version": 1, "verdict": self.verdict, "status": self.status}
        margin = self.margin and asdict(self.margin) | {"told_apart": self.margin.told_apart}
        return own | asdict(self) | {"arms": [arm.to_json() for arm in self.arms], "margin": margin}


def read_result(folder: Path) -> Result | None:
    """What a training of a sweep left; None where it is not done. Raises TrainError where that is damaged."""
    if (folder / FAILED).exists():
        return Result({}, failed=str(_read(folder / FAILED)["error"]))
    if not (folder / RUN).exists() or not (document := _read(folder / RUN))["report"]["complete"]:
        return None
    found = [_read(folder / EVALUATION)] if (folder / EVALUATION).exists() else []
    found = _read(folder / EVALUATIONS) if (folder / EVALUATIONS).exists() else found
    evaluations = [Evaluation.from_json(one) for one in found]
    return Result({name: document["student"][name] for name in ("name", "parameters")}, evaluations)


def make_report(
    out: Path,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    found: Mapping[tuple[Arm, int], Result | None],
    weights: Sequence[float],
    *,
    measure: str,
    notes: Sequence[str] = (),
) -> SweepReport:
    """Arms from what their trainings left. weights: of the caches. measure: to rank by; perplexity is ranked by its
    logarithm. Raises TrainError where all arms diverged, or the measure was not taken."""
    measure = "cross_entropy" if measure == "perplexity" else measure
    results = []
    evaluations: dict[str, list[Sequence[Evaluation]]] = {}
    for arm in arms:
        mine = [(seed, found[arm, seed]) for seed in seeds]
        done = [one.evaluations for _, one in mine if one is not None and one.evaluations]
        each = [means(one, weights) for one in done]
        results.append(
            ArmResult(
                arm.name,
                dict(arm.changes),
                [str(out / arm.name / f"seed={seed}") for seed in seeds],
                {name: [values[name] for values in each] for name in (each[0] if each else ())},
                {str(seed): one.failed for seed, one in mine if one is not None and one.failed},
            )
        )
        evaluations[arm.name] = done
    complete = all(one is not None for one in found.values())
    report = SweepReport(str(out), complete, list(seeds), measure, results, notes=list(notes))
    if complete and all(len(arm.diverged) == len(seeds) for arm in results):
        raise TrainError(f"sweep: all {len(arms)} arms diverged. The first: {results[0].diverged[str(seeds[0])]}")
    if not complete or not any(evaluations.values()):
        return report
    return ranked(report, evaluations, weights)


def ranked(
    report: SweepReport, evaluations: Mapping[str, Sequence[Sequence[Evaluation]]], weights: Sequence[float]
) -> SweepReport:
    """The arms of a complete sweep, the best first, held against it. Those that diverged with any seed come last."""
    measure = report.measure
    whole = [arm for arm in report.arms if not arm.diverged]
    if missing := [arm for arm in whole if measure not in arm.values]:
        raise TrainError(f"best: got {measure!r}; the evaluation has {', '.join(missing[0].values)}.")
    whole.sort(key=lambda arm: sign_of(measure) * arm.mean(measure))
    if not whole:
        return report
    best = whole[0]
    by_seeds = seed_noise([arm.values[measure] for arm in whole])
    held = [best]
    for arm in whole[1:]:
        half = window_noise(evaluations[arm.name], evaluations[best.name], weights, measure)
        behind = Behind(abs(arm.mean(measure) - best.mean(measure)), *(_finite(x) for x in (by_seeds, half)))
        held.append(replace(arm, behind=behind))
    return replace(
        report,
        arms=held + [arm for arm in report.arms if arm.diverged],
        best=best.name,
        margin=held[1].behind if len(held) > 1 else None,
        alike=[arm.name for arm in held if arm.behind is not None and not arm.behind.told_apart],
    )


def seed_noise(values: Sequence[Sequence[float]]) -> float:
    """Half the 95% interval of the difference between two arms' means over the seeds, from values `[arms, seeds]`:
    what neither the arm nor the seed explains, pooled. Infinite with one seed or one arm."""
    x = np.asarray(values, np.float64)
    arms, seeds = x.shape
    freedom = (arms - 1) * (seeds - 1)
    if freedom < 1:
        return math.inf
    rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    return t_quantile(freedom) * math.sqrt(2 / seeds * float((rest**2).sum()) / freedom)


def window_noise(
    ours: Sequence[Sequence[Evaluation]], theirs: Sequence[Sequence[Evaluation]], weights: Sequence[float], measure: str
) -> float:
    """Half the 95% interval, over held-out windows, of the difference between two arms, each the mean over its seeds.
    ours, theirs: by seed, then by cache."""
    halves = [
        compare(_mean(a), _mean(b))[measure].half
        for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    return math.hypot(*(half * weight / sum(weights) for half, weight in zip(halves, weights, strict=True)))


def sweep_text(report: SweepReport) -> str:
    """The report for a person."""
    if not report.complete:
        return f"{report.out}: stopped; every arm has a checkpoint. The same command again goes on."
    lines = [f"note: {note}" for note in report.notes]
    names = [m.name for m in printed_in(SHOWN) if any(m.name in arm.values for arm in report.arms)]
    width = max(len("arm"), *(len(arm.name) for arm in report.arms)) + 2
    if names:
        lines.append(f"held out: mean over {len(report.seeds)} seeds ± their standard deviation")
        lines.append(f"{'arm':<{width}}" + "".join(f"{name:>18}" for name in names) + f"{'behind the best':>18}")
    for arm in report.arms:
        if arm.diverged:
            lines.append(f"{arm.name:<{width}}diverged with seed {', '.join(arm.diverged)}")
            continue
        cells = "".join(
            f"{f'{arm.mean(n):.4f} ± {_number(arm.spread(n))}' if n in arm.values else '':>18}" for n in names
        )
        behind = "" if arm.behind is None else f"{arm.behind.distance:.4f}{' ' if arm.behind.told_apart else '?'}"
        lines.append(f"{arm.name:<{width}}{cells}{'best' if arm.name == report.best else behind:>18}")
    if report.alike:
        lines.append("?: not distinguishable from the best")
    lines.append(report.verdict)
    if report.step_seconds:
        lines.append(
            f"{report.passes} reads of the cache, {report.at_once} arms at once in {size_text(report.bytes_at_once)} "
            f"(weights and optimizers); {report.seconds / report.step_seconds:.3f} of the arms' own step times, "
            f"{report.waiting:.1%} of the time waiting for data"
        )
    lines.append(
        f"{report.out}/{SWEEP}" + (f", {report.plot}" if report.plot else "") + "; ARM/seed=S is a run's folder"
    )
    return "\n".join(lines)


def _mean(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One whose windows are the means of several's."""
    windows = [one.student for one in evaluations]
    sums = {name: np.mean([one.sums[name] for one in windows], 0) for name in windows[0].sums}
    bins = [one.bins for one in windows if one.bins is not None]
    mean = Windows(windows[0].counts, sums, np.mean(bins, 0) if bins else None)
    return replace(evaluations[0], student=mean)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainError(f"{path}: cannot be read ({error}). Delete {path.parent}, and sweep again.") from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
