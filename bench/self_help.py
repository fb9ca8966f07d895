"""Whether a student's own answers help it: its average as its teacher, and early exits that learn from its last layer.

    python -m fastkd.bench.self_help                    # all, some minutes on a core
    python -m fastkd.bench.self_help --only "50 digits"

Each seed is a student with other weights and another order; a difference is of the same seed, ± its 95% interval over
seeds. All students learn from the same labels; no other teacher is there.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fastkd
from fastkd.bench.live_problem import STEPS, LiveProblem, few_bytes, few_digits
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case
from fastkd.bench.table import Table
from fastkd.bench.timing import figure, interval
from fastkd.utils.intervals import Interval

ALONE, SHORTER = "labels alone", "labels alone, a quarter of the steps"
NATS, RIGHT = "cross_entropy", "accuracy"
Scores = Mapping[str, Sequence[Mapping[str, float]]]
"""Held-out measures by arm and seed."""


@dataclass(frozen=True)
class Trial:
    """Students of one problem that differ in one thing.

    arms: settings of each. others: arms of other problems, such as shorter networks. pairs: what is compared, as (arm,
    measure, arm, measure): the first minus the second.
    """

    name: str
    make: Callable[[], LiveProblem]
    arms: Mapping[str, Mapping[str, Any]]
    pairs: Sequence[tuple[str, str, str, str]]
    others: Mapping[str, Callable[[], LiveProblem]] = field(default_factory=dict)


def score(problem: LiveProblem, seed: int, **changes: Any) -> dict[str, float]:
    """The held-out measures of a student."""
    settings = {**problem.changes, "alpha": 1.0, **changes}
    with tempfile.TemporaryDirectory() as folder:
        report = fastkd.train(
            partial(problem.student, 1000 + seed), out=Path(folder) / "run", data=problem.data, live=problem.live,
            seed=seed, evaluate_every=settings["steps"], device="cpu", **settings,
        )  # fmt: skip
    return report.evaluation


def scores_of(trial: Trial, seeds: int) -> Scores:
    """All students of a trial."""
    problem = trial.make()
    found = {name: [score(problem, n, **arm) for n in range(seeds)] for name, arm in trial.arms.items()}
    for name, make in trial.others.items():
        found[name] = [score(make(), n) for n in range(seeds)]
    return found


def difference(scores: Scores, one: str, measure: str, other: str, theirs: str) -> Interval:
    """A measure of an arm minus that of another, paired by seed."""
    return interval([a[measure] - b[theirs] for a, b in zip(scores[one], scores[other], strict=True)])


def verdict(measure: str, found: Interval) -> str:
    """Of a difference of a measure."""
    if abs(found.mean) <= found.half:
        return "within noise"
    return "better" if (found.mean < 0) == (measure.rpartition("/")[2] == NATS) else "worse"


def run(table: Table, trial: Trial, seeds: int) -> None:
    """Train all students, and add rows for them and for what is compared."""
    scores = scores_of(trial, seeds)
    table.title(f"{trial.name}: {trial.make().says}, {seeds} seeds")
    for arm, found in scores.items():
        for name in found[0]:
            if (measure := name.rpartition("/")[2]) in (NATS, RIGHT):
                unit = "nats" if measure == NATS else ""
                table.value(f"{arm}: {name}", figure([one[name] for one in found]), unit)
    for one, measure, other, theirs in trial.pairs:
        minus = difference(scores, one, measure, other, theirs)
        note = f"{minus.mean:+.4f} ± {minus.half:.4f}, {verdict(measure, minus)}"
        table.value(f"{one}: {measure} - {other}: {theirs}", figure([minus.mean]), "", note=note)


def average(name: str, make: Callable[[], LiveProblem]) -> Trial:
    """Students that learn from their average, against labels alone, also for a quarter of the steps: a student that
    fits its labels less is less sure of itself, whatever made it so."""
    arms: dict[str, dict[str, Any]] = {ALONE: {}, SHORTER: {"steps": STEPS // 4}}
    ours = []
    for decay, alpha in ((0.99, 0.5), (0.99, 0.1)):
        ours.append(arm := f"ema:{decay}, alpha {alpha}")
        arms[arm] = {"teacher": f"ema:{decay}", "alpha": alpha}
    pairs = [(arm, m, other, m) for arm in ours for other in (ALONE, SHORTER) for m in (NATS, RIGHT)]
    pairs += [(arm, f"ema/{m}", arm, m) for arm in ours for m in (NATS, RIGHT)]
    return Trial(name, make, arms, pairs)


def exits(name: str, documents: int, layers: int = 3) -> Trial:
    """A network with exits after each layer, against itself without them and against shorter networks."""
    inner = range(1, layers)
    arms: dict[str, dict[str, Any]] = {ALONE: {}}
    for weight, alpha in ((1.0, 0.5), (0.3, 0.5), (1.0, 1.0)):
        arms[f"exits, weight {weight}, alpha {alpha}"] = {
            "exits": tuple(inner), "exit_weight": weight, "exit_alpha": alpha,
        }  # fmt: skip
    ours = [arm for arm in arms if arm != ALONE]
    pairs = [(arm, m, ALONE, m) for arm in ours for m in (NATS, RIGHT)]
    pairs += [(arm, f"exit{n}/{NATS}", f"{n} layers alone", NATS) for arm in ours for n in inner]
    pairs += [(ours[0], f"exit{n}/{NATS}", ours[-1], f"exit{n}/{NATS}") for n in inner]
    others = {f"{n} layers alone": partial(few_bytes, documents, layers=n) for n in inner}
    return Trial(name, partial(few_bytes, documents, layers=layers), arms, pairs, others)


TRIALS = [
    average("50 digits", few_digits),
    average("512 documents", few_bytes),
    exits("exits", 2048),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help="one trial, by its name")
    parser.add_argument("--seeds", type=int, default=3)
    ask = parser.parse_args()
    table = Table("cpu", "self")
    chosen = [trial for trial in TRIALS if ask.only in (None, trial.name)]
    run_cases([Case(one.name, partial(run, trial=one, seeds=ask.seeds)) for one in chosen], table, to_stderr)


if __name__ == "__main__":
    main()
