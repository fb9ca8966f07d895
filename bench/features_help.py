"""Whether features help a student: the same training with and without them, in settings where they do and do not.

    fastkd bench features                 # after the codec's figures: four minutes on two cores
    python bench/features_help.py         # these alone

Each seed is a student with other weights and another order; a difference is of the same seed, ± its 95% interval over
seeds. LOG.md has the settings that were tried.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import fastkd
from fastkd.bench.features_problem import COPIES, LENGTH, Problem, bytes_problem, digits_problem
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import figure, interval
from fastkd.errors import DataError
from fastkd.utils.intervals import Interval

MEASURES = {"kl_bucket": "KL from the teacher", "cross_entropy": "cross-entropy"}
DIGITS: dict[str, Any] = {"alpha": 0.1, "temperature": 2.0, "rate": 2e-2, "weight_decay": 0.01, "batch_size": 32}
BYTES: dict[str, Any] = {"alpha": 0.1, "rate": 5e-3, "weight_decay": 0.05, "batch_size": 16}


@dataclass(frozen=True)
class Setting:
    """Students of a problem.

    make: the problem. arms: what each arm with features matches. changes: settings of the training. helps: the arms
    whose KL is to be lower than without features, beyond the noise of seeds; the others are only printed.
    """

    name: str
    make: Callable[[], Problem]
    arms: Mapping[str, tuple[str, ...]]
    changes: Mapping[str, Any]
    seeds: int = 5
    helps: tuple[str, ...] = ()


def score(problem: Problem, setting: Setting, match: Sequence[str], seed: int) -> dict[str, float]:
    """The held-out measures of a student."""
    steps = setting.changes["steps"]
    with tempfile.TemporaryDirectory() as folder:
        report = fastkd.train(
            partial(problem.student, 1000 + seed), problem.cache, Path(folder) / "run", data=problem.data,
            seed=seed, match=tuple(match), evaluate_every=steps, device="cpu", **setting.changes,
        )  # fmt: skip
    return report.evaluation


def differences(with_: Sequence[dict[str, float]], without: Sequence[dict[str, float]]) -> dict[str, Interval]:
    """Of each measure, with features minus without, paired by seed."""
    return {
        name: interval([a[name] - b[name] for a, b in zip(with_, without, strict=True)])
        for name in MEASURES
        if name in with_[0]
    }


def verdict(difference: Interval) -> str:
    """Of a measure that is better when lower."""
    if abs(difference.mean) <= difference.half:
        return "no difference"
    return "features help" if difference.mean < 0 else "features do harm"


def run(table: Table, setting: Setting, seeds: int) -> None:
    """Train all students of a setting, and add rows for each measure."""
    try:
        problem = setting.make()
    except DataError as error:  # a package is missing
        table.title(setting.name)
        table.absent("with and without features", str(error))
        return
    arms = {"without features": (), **setting.arms}
    scores = {name: [score(problem, setting, match, seed) for seed in range(seeds)] for name, match in arms.items()}
    without = scores["without features"]
    table.title(f"{setting.name}: {problem.says}, {setting.changes['steps']} steps, {seeds} seeds")
    for arm, found in scores.items():
        minus = differences(found, without)
        for measure, name in MEASURES.items():
            values, note = [one[measure] for one in found], ""
            if arm in setting.arms:
                mean, half = minus[measure]
                note = f"{', '.join(arms[arm])}: {mean:+.4f} ± {half:.4f}, {verdict(minus[measure])}"
            table.value(f"{arm}: {name}", figure(values), "nats", note=note)
            if arm in setting.helps and measure == "kl_bucket":
                table.value(f"{arm}: {name}, upper end of the difference", minus[measure].high, "nats", "<= 0")


def settings_of(digits: Callable[[], Problem], text: Callable[[], Problem]) -> list[Setting]:
    """What is trained."""
    alike, where = {"similarity": ("layers.6:layers.6:sp:2000",)}, {"attention transfer": ("layers.6:layers.6:at:100",)}
    states = {"states": ("2:1:mse:1", "-1:-1:mse:1")}
    few = {"max_positions": 50 * COPIES, "steps": 200}
    return [
        Setting("50 digits", digits, alike | where, DIGITS | few, helps=("similarity",)),
        Setting("all digits", digits, alike, DIGITS | {"steps": 450}, seeds=3),
        Setting("64 documents", text, states, BYTES | {"max_positions": 64 * LENGTH, "steps": 200}, helps=("states",)),
    ]


def cases(ask: RunConfig) -> Sequence[Case]:
    """A case for each setting. A problem is made once, in memory."""
    digits, text = cache(digits_problem), cache(bytes_problem)
    return [
        Case(f"students: {one.name}", partial(run, setting=one, seeds=ask.rounds or ask.size(one.seeds, 10)))
        for one in settings_of(digits, text)
    ]


def main() -> None:
    """Only these cases."""
    table = Table("cpu", "features")
    run_cases(cases(RunConfig("cpu")), table, to_stderr)


if __name__ == "__main__":
    main()
