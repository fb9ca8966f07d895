"""The results of a sweep: its arms ranked, and whether the best one is significantly better.

The difference between two arms is compared with two kinds of noise, each by its 95% interval:

    seeds    the effect of other initial weights and another order. All arms are trained with the same seeds, so what a
             seed changes for all of them cancels; the rest, pooled over all arms (assumed to be equally noisy), is the
             noise. Infinite with one seed.
    windows  the effect of other held-out text: over pairs of windows, of the mean over the seeds; `evaluate.compare`.

An arm is distinguishable from the best if the difference is larger than both. Each pair is judged by itself, without
a correction for the number of arms: the best of many equal arms looks better than it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ..errors import StreamError, TrainError
from ..evaluate.api import Evaluation, compare
from ..evaluate.measures import SWEEP as SHOWN
from ..evaluate.measures import distinct, explained, printed_in, sign_of
from ..evaluate.result import Windows
from ..settings import TrainSettings
from ..train.held_out import EVALUATION, EVALUATIONS, means
from ..train.result import RUN
from ..train.settings_check import check_same, stated
from ..utils.atomic import read_sealed
from ..utils.intervals import NO_INTERVAL, Interval, t_quantile
from ..utils.numbers import duration
from ..utils.signals import DONE, WORK_REMAINS
from ..utils.text import format_table
from ..utils.words import KINDS, counted
from .arms import Arm

SWEEP, FAILED = "sweep.json", "diverged.json"
STOPPED = "stopped early"  # how the reason of a training begins that a scheduler stopped


@dataclass(frozen=True, eq=False)
class Result:
    """A training that is finished. run: its run.json. evaluations: on the held-out split, one for each cache. failed:
    why it has no result, or empty. stopped: the step after which it was stopped, as it was worse than another; or 0."""

    run: Mapping[str, Any]
    evaluations: Sequence[Evaluation] = ()
    failed: str = ""
    stopped: int = 0


@dataclass(frozen=True)
class Behind:
    """How far an arm is behind the best, in the measure's units. by_seeds, by_windows: half its 95% intervals, or None
    if they are infinite."""

    distance: float
    by_seeds: float | None
    by_windows: float | None

    @property
    def half(self) -> float | None:
        """Half the wider interval; None if it is infinite."""
        return None if self.by_seeds is None or self.by_windows is None else max(self.by_seeds, self.by_windows)

    @property
    def told_apart(self) -> bool:
        """Whether the distance is larger than both intervals."""
        return Interval(self.distance, math.inf if self.half is None else self.half).excludes_zero

    @property
    def why(self) -> list[str]:
        """Why an interval is not known."""
        found = ["no interval between seeds, as there is only one"] if self.by_seeds is None else []
        return found + ([NO_INTERVAL] if self.by_windows is None else [])

    def noise(self, windows: str) -> str:
        """Both intervals, or why there is none. windows: the word for what is held out."""
        halves = {"seeds": self.by_seeds, windows: self.by_windows}
        known = [f"± {half:.4f} between {name}" for name, half in halves.items() if half is not None]
        return "; ".join([*([", ".join(known)] if known else []), *self.why])

    def to_json(self) -> dict[str, Any]:
        found = asdict(self) | {"told_apart": self.told_apart}
        return found | ({"why": "; ".join(self.why)} if self.why else {})


@dataclass(frozen=True)
class ArmResult:
    """The results of an arm. changes: its settings. folders: its runs, one per seed. values: of each measure, one per
    finished seed. diverged: by seed, the error message, or that a scheduler stopped it early. behind: its distance to
    the best arm, None for the best itself and without a ranking. stopped: by seed, the step after which it was stopped,
    as it was worse than hard labels alone."""

    name: str
    changes: dict[str, float | str]
    folders: list[str]
    values: dict[str, list[float]] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    behind: Behind | None = None
    stopped: dict[str, int] = field(default_factory=dict)

    def mean(self, measure: str) -> float:
        """Mean over the seeds; NaN if the measure is missing."""
        return fmean(self.values[measure]) if self.values.get(measure) else math.nan

    def spread(self, measure: str) -> float | None:
        """Standard deviation between the seeds; None with one seed."""
        values = self.values.get(measure, [])
        return stdev(values) if len(values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        measures = {n: {"mean": self.mean(n), "spread": self.spread(n)} for n in self.values}
        found = asdict(self) | {"measures": measures, "behind": self.behind and self.behind.to_json()}
        if not self.stopped:
            del found["stopped"]
        return found


@dataclass(frozen=True)
class SweepReport:
    """What `fastkd.sweep` returns.

    complete: whether all trainings are finished, or diverged. seeds: their numbers. arms: ranked, the best first.
    measure: what they are ranked by, on the held-out split. best: the name of the best arm, None without an evaluation
    and while work remains. margin: of the best over the next one. alike: names of the arms that are not distinguishable
    from the best. In this call: trainings (that were started or resumed), seconds (of their steps, with waiting),
    waiting (fraction of them without a batch). plot: path of the PNG, or None.
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
    trainings: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    plot: str | None = None
    kind: str = "text"

    @property
    def status(self) -> int:
        return DONE if self.complete else WORK_REMAINS

    @property
    def verdict(self) -> str:
        """Which arm is the best, and whether that is significant, in a sentence or two."""
        if self.best is None:
            return "No ranking: there was no evaluation on held-out data." if self.complete else ""
        text = f"Best by {self.measure}: {self.best}"
        if self.margin is None:
            return f"{text}, the only one."
        noise = self.margin.noise(self._windows)
        text += f", {self.margin.distance:.4f} ahead of the next ({noise})."
        if not self.alike:
            return f"{text} It is distinguishable from all others."
        why = " More than one seed is needed to distinguish any." if len(self.seeds) == 1 else ""
        return f"{text} Not distinguishable from it: {'; '.join(self.alike)}.{why}"

    @property
    def _windows(self) -> str:
        return KINDS[self.kind].windows

    def to_json(self) -> dict[str, Any]:
        own = {"format": "fastkd-sweep", "version": 1, "verdict": self.verdict, "status": self.status}
        margin = self.margin and self.margin.to_json()
        return own | asdict(self) | {"arms": [arm.to_json() for arm in self.arms], "margin": margin}


def read_result(folder: Path) -> Result | None:
    """The result of a training, or None if it is not finished. Raises TrainError if its files are damaged."""
    try:
        if (failed := read_document(folder / FAILED)) is not None:
            return Result({}, failed=str(failed["error"]))
        if (document := read_document(folder / RUN)) is None or not document["report"]["complete"]:
            return None
        one, several = read_document(folder / EVALUATION), read_document(folder / EVALUATIONS)
        stopped = document["report"]["step"] if "stopped_worse" in document["report"] else 0
        found = [Evaluation.from_json(found) for found in several or ([one] if one else [])]
        return Result(document, found, stopped=stopped)
    except (KeyError, TypeError, StreamError) as error:
        raise TrainError(f"{folder}: {error!r}. Its results are damaged: delete it, and sweep again.") from error


def check_finished(folder: Path, done: Result, settings: TrainSettings, student: Any, caches: Sequence[Any]) -> None:
    """Raise TrainError if a finished training is not the one that is wanted. student: name and parameters; caches:
    their `train.result.describe_cache`."""
    run = done.run
    theirs, ours = ([(c["spec"], c["positions"]) for c in some] for some in (run["caches"], caches))
    other = "cache" if theirs != ours else ""
    other = "student" if any(run["student"][name] != value for name, value in student.items()) else other
    if other:
        raise TrainError(
            f"{folder}: it was trained with another {other}. Sweep into another folder, or delete this one to train "
            "it again."
        )
    check_same(stated(run["settings"]), stated(asdict(settings)), str(folder))


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
    """The report, from the result of each training. weights: of the caches. measure: to rank by; perplexity is ranked
    by its logarithm. Raises TrainError if all arms diverged, or the evaluations lack the measure."""
    results, evaluations = [], {}
    for arm in arms:
        mine = [(seed, result) for seed in seeds if (result := found[arm, seed]) is not None]
        # of a part of the steps, there is nothing to compare
        done = [result.evaluations for _, result in mine if result.evaluations and not result.stopped]
        evaluations[arm.name] = done
        each = [means(one, weights) for one in done]
        results.append(
            ArmResult(
                arm.name,
                dict(arm.changes),
                [str(out / arm.name / f"seed={seed}") for seed in seeds],
                {name: [values[name] for values in each] for name in (each[0] if each else ())},
                {str(seed): result.failed for seed, result in mine if result.failed},
                stopped={str(seed): result.stopped for seed, result in mine if result.stopped},
            )
        )
    complete = None not in found.values()
    measure = "cross_entropy" if measure == "perplexity" else measure
    kinds = [one[0].kind for done in evaluations.values() for one in done if one]
    kind = kinds[0] if kinds else "text"
    report = SweepReport(str(out), complete, list(seeds), measure, results, notes=list(notes), kind=kind)
    if complete and all(len(arm.diverged) == len(seeds) for arm in results):
        raise TrainError(f"sweep: all {len(arms)} arms diverged. The first: {results[0].diverged[str(seeds[0])]}")
    return ranked(report, evaluations, weights) if complete and any(evaluations.values()) else report


def ranked(
    report: SweepReport, evaluations: Mapping[str, Sequence[Sequence[Evaluation]]], weights: Sequence[float]
) -> SweepReport:
    """The arms of a complete sweep, the best first, compared with it. Arms that were stopped with any seed, and then
    those that diverged, come last."""
    measure = report.measure
    whole = [arm for arm in report.arms if not arm.diverged and not arm.stopped]
    if missing := [arm for arm in whole if measure not in arm.values]:
        raise TrainError(f"best: got {measure!r}; expected one of {', '.join(missing[0].values)}.")
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
        arms=held + sorted((arm for arm in report.arms if arm.diverged or arm.stopped), key=lambda a: bool(a.diverged)),
        best=best.name,
        margin=held[1].behind if len(held) > 1 else None,
        alike=[arm.name for arm in held if arm.behind is not None and not arm.behind.told_apart],
    )


def seed_noise(values: Sequence[Sequence[float]]) -> float:
    """Half the 95% interval of the difference between two arms' means over the seeds, from values `[arms, seeds]`: the
    residual after the effects of arms and seeds, pooled. Infinite with one seed or one arm."""
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
    """Half the 95% interval, over held-out windows, of the difference between two arms, each averaged over its seeds.
    ours, theirs: by seed, then by cache."""
    halves = [
        compare(_mean(a), _mean(b))[measure].half
        for a, b in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    return math.hypot(*(half * weight / sum(weights) for half, weight in zip(halves, weights, strict=True)))


def sweep_text(report: SweepReport) -> str:
    if not report.complete:
        return (
            f"{report.out}: stopped. Finished trainings are kept, and a checkpoint of the one that was stopped. Run "
            "the same command again to resume."
        )
    one = distinct({name: arm.mean(name) for name in arm.values} for arm in report.arms)
    names = [m.name for m in printed_in(SHOWN) if m.name in one]
    rows = [["arm", *names, "behind the best"]]
    for arm in report.arms:
        cells = [_with_spread(arm.mean(n), arm.spread(n)) if n in arm.values else "" for n in names]
        behind = "best" if arm.name == report.best else ""
        if arm.behind is not None:
            behind = f"{arm.behind.distance:.4f}{' ' if arm.behind.told_apart else '?'}"
        if arm.diverged:
            early = all(text.startswith(STOPPED) for text in arm.diverged.values())
            what = STOPPED if early else "diverged"
            cells, behind = [""] * len(names), f"{what} with seed {', '.join(arm.diverged)}"
        elif arm.stopped:
            steps = ", ".join(f"step {step} (seed {seed})" for seed, step in arm.stopped.items())
            cells, behind = [""] * len(names), f"worse than hard labels, stopped after {steps}"
        rows.append([arm.name, *cells, behind])
    lines = [f"note: {note}" for note in report.notes]
    count = len(report.seeds)
    over = f"mean over {count} seeds ± standard deviation" if count > 1 else "one seed"
    lines += [f"held out: {over}"] * bool(names)
    lines += format_table(rows)
    lines += explained(names, KINDS[report.kind])
    lines += ["?: not distinguishable from the best"] * bool(report.alike)
    lines.append(report.verdict)
    if report.seconds:
        spent = f"{duration(report.seconds)}, {report.waiting:.1%} of it waiting for data"
        lines.append(f"{counted(report.trainings, 'training')}, {spent}")
    plot = f", {report.plot}" if report.plot else ""
    return "\n".join([*lines, f"{report.out}/{SWEEP}{plot}; ARM/seed=S is the folder of a run"])


def _mean(evaluations: Sequence[Evaluation]) -> Evaluation:
    windows = [one.student for one in evaluations]
    sums = {name: np.mean([one.sums[name] for one in windows], 0) for name in windows[0].sums}
    bins = [one.bins for one in windows if one.bins is not None]
    mean = Windows(windows[0].counts, sums, np.mean(bins, 0) if bins else None)
    return replace(evaluations[0], student=mean)


def read_document(path: Path) -> Any:
    """A JSON document, or None if there is no such file."""
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise TrainError(f"{path}: cannot be read ({error}). Delete {path.parent}, and run the sweep again.") from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
