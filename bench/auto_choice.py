"""Whether `fastkd sweep --auto` chooses as well as the full grid would: regret over seeds, on handwritten digits.

    python -m fastkd.bench.auto_choice     # 16 arms in full for each seed, a few minutes on two cores

An arm of `--auto` is a full run that pauses, so one training of each arm, evaluated at the rungs, tells what every
scheme of halving would have chosen. Regret: the chosen arm's measure at the end minus that of the grid's best arm, and
minus that of the default settings; ± the 95% interval over seeds.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fastkd
from fastkd.bench.features_problem import COPIES, Problem, digits_problem
from fastkd.bench.timing import interval
from fastkd.settings import TrainSettings
from fastkd.sweep.arms import auto_arms
from fastkd.sweep.halving import Rung, going_on, plan_rungs, ranked
from fastkd.train.evaluations import read
from fastkd.train.trainer import Pause

MEASURE = "cross_entropy"
SETTINGS: dict[str, Any] = {"rate": 2e-2, "weight_decay": 0.01, "batch_size": 32, "steps": 192, "device": "cpu"}
Curves = Mapping[str, Mapping[int, float]]
"""The measure of each arm after each step at which it was evaluated."""


def curves_of(problem: Problem, seed: int, positions: int, arms: Sequence[Any], steps: Sequence[int]) -> Curves:
    """Train all arms of a seed to their end."""
    found = {}
    settings = TrainSettings(**SETTINGS, max_positions=positions, seed=seed, evaluate_positions=1440, threads=1)
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            fastkd.train(
                partial(problem.student, 1000 + seed), problem.cache, folder, arm.of(settings, seed),
                data=problem.data, pause=Pause(tuple(steps), steps[-1]),
            )  # fmt: skip
            found[arm.name] = {s: read(Path(folder), s)[0].intervals()[MEASURE].mean for s in steps}
    return found


def halved(curves: Curves, rungs: Sequence[Rung], groups: Mapping[str, Any]) -> str:
    """The arm that halving chooses. groups: of each arm; see `going_on`."""
    arms = list(curves)
    for number, rung in enumerate(rungs[:-1]):
        order = ranked({name: curves[name][rung.step] for name in arms}, 1)
        arms = going_on(order, rungs[number + 1].arms, groups)
    return arms[0]


def rows_of(all_curves: Sequence[Curves], choose: Callable[[Curves], str], default: str) -> list[str]:
    """Regret against the best of the grid and against the default, and what was chosen."""
    chosen = [choose(curves) for curves in all_curves]
    end = max(next(iter(all_curves[0].values())))
    ends = [{name: steps[end] for name, steps in curves.items()} for curves in all_curves]
    best = interval([one[name] - min(one.values()) for one, name in zip(ends, chosen, strict=True)])
    plain = interval([one[name] - one[default] for one, name in zip(ends, chosen, strict=True)])
    spread = interval([one[default] - min(one.values()) for one in ends])
    return [
        f"regret {best.mean:.4f} ± {best.half:.4f}; against the default {plain.mean:+.4f} ± {plain.half:.4f} "
        f"(default's own regret {spread.mean:.4f})",
        *(f"  seed {seed}: {name}" for seed, name in enumerate(chosen)),
    ]


def main(seeds: int = 3, images: Sequence[int] = (50, 400)) -> None:
    problem = digits_problem()
    settings = TrainSettings(**SETTINGS)
    arms, default, hard, _ = auto_arms({}, settings, problem.cache.spec)
    groups = {arm.name: "hard" if arm == hard else dict(arm.changes)["temperature"] for arm in arms}
    rungs = plan_rungs(len(arms), SETTINGS["steps"], len(set(groups.values())))
    plain = plan_rungs(len(arms), SETTINGS["steps"])
    steps = [rung.step for rung in rungs]
    schemes: Mapping[str, Callable[[Curves], str]] = {
        "--auto": lambda curves: halved(curves, rungs, groups),
        "halving without groups": lambda curves: halved(curves, plain, dict.fromkeys(groups, "")),
        "the best at the first rung": lambda curves: ranked({n: c[steps[0]] for n, c in curves.items()}, 1)[0],
        "hard labels alone": lambda curves: hard.name,
    }
    for count in images:
        found = [curves_of(problem, seed, count * COPIES, arms, steps) for seed in range(seeds)]
        print(
            f"{count} digits in {COPIES} copies, {SETTINGS['steps']} steps, {len(arms)} arms, {seeds} seeds: {MEASURE}"
        )
        for number, curves in enumerate(found):
            order = ranked({name: at[steps[-1]] for name, at in curves.items()}, 1)
            print(f"  seed {number}: {', '.join(f'{name} {curves[name][steps[-1]]:.4f}' for name in order)}")
        for says, choose in schemes.items():
            print(f"{says}: ", "\n".join(rows_of(found, choose, default.name)), sep="")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
