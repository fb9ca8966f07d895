"""Quality of students by the targets they are trained on, at equal tokens, and the storage that the targets take.

    fastkd bench quality                  # T = 1 and 2: 48 students; seven minutes on two busy cores
    fastkd bench quality --full           # T in {1, 2, 4}, T_d in {1, 1.5, 2}, three times the steps and positions
    python bench/bench_quality.py [--steps 192] [--layer 24] [--vocabulary 4096]

The teacher is SmolLM2-135M over English prose, with a vocabulary of the tokens in the text and the most likely others.
A student maps the teacher's hidden states after an early layer to its last ones (quality_student.py): one epoch, soft
loss alone, the same rate for all. Each seed has its own order, weights and draws. KL and cross-entropy are measured on
held-out windows; ± is a 95% interval over seeds, paired with the student of the live teacher at the same T. Before
that, the error of the gradient is measured, which needs no training (treatments.py).
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastkd import SparseTargets
from fastkd.bench import treatments
from fastkd.bench.quality_problem import LENGTH, Problem, read_problem
from fastkd.bench.quality_student import (
    BATCH,
    Arm,
    Score,
    Shape,
    Student,
    evaluate,
    train,
)
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import figure, interval
from fastkd.cache import CacheSpec, create_cache
from fastkd.kernels.treatment import sampled_reach

TOP, HYBRID = Shape(64), Shape(48, 16)  # with equal numbers of entries; HYBRID has the defaults of `fastkd capture`
ALONE = (64, 256)  # draws alone: as many as the entries above, and as many as take the same bytes
LAYER, HELD, SEEDS = 24, 16, 3
Make = Callable[[], Problem]


def arms_of(temperatures: Sequence[float], drawn_at: Sequence[float], alone_at: Sequence[float]) -> list[Arm]:
    """For every temperature: the live teacher, top-k entries, draws alone, both; and labels once.

    drawn_at, alone_at: T_d of the hybrid and of draws alone.
    """
    found = [Arm(1.0, "labels")]
    for t in temperatures:
        found += [Arm(t, "dense"), Arm(t, "bucket", TOP), Arm(t, "renormalize", TOP)]
        found += [Arm(t, "sampled", Shape(0, ALONE[0], t_d)) for t_d in alone_at]
        found += [Arm(t, "sampled", Shape(0, ALONE[1]))]
        found += [Arm(t, "sampled", Shape(HYBRID.k, HYBRID.draws, t_d)) for t_d in drawn_at]
        if t > sampled_reach(HYBRID.t_d):
            found.append(Arm(t, "bucket", HYBRID))
    return found


def name_of(arm: Arm) -> str:
    """The name of an arm in a row."""
    if arm.shape is None:
        return {"dense": "live teacher, dense", "labels": "labels alone"}[arm.treatment]
    auto = arm.shape == HYBRID and arm.treatment == ("sampled" if arm.temperature <= sampled_reach(1.0) else "bucket")
    return f"{shape_name(arm.shape)}, {arm.treatment}{' (auto)' * auto}"


def shape_name(shape: Shape) -> str:
    """What a shape keeps of a position, as text."""
    drawn = f"{shape.draws} draws at T_d = {shape.t_d:g}" if shape.draws else ""
    return " + ".join(filter(None, [f"{shape.k}" if drawn else f"top {shape.k}", drawn] if shape.k else [drawn]))


def scores_of(problem: Problem, arms: Sequence[Arm], seeds: int) -> Mapping[Arm, Sequence[Score]]:
    """The scores of every arm, one per seed."""
    found: dict[Arm, list[Score]] = {arm: [] for arm in arms}
    with tqdm(total=len(arms) * seeds, unit="student", disable=None) as bar:
        for seed in range(seeds):
            cached = cache(lambda shape, seed=seed: shape.targets(problem, seed))  # the same for all temperatures
            for arm in arms:
                targets = cached(arm.shape) if arm.shape else None
                found[arm].append(evaluate(problem, train(problem, arm, targets, seed=seed)))
                bar.update()
    return found


def students(table: Table, make: Make, arms: Sequence[Arm], seeds: int) -> None:
    """Add two rows per arm."""
    problem = make()
    scores = scores_of(problem, arms, seeds)
    begin = evaluate(problem, Student(problem, 0))
    says = f"{problem.trained // BATCH} steps of {BATCH} positions, V={len(problem.head_VD)}, {seeds} seeds"
    for t in sorted({arm.temperature for arm in arms}):
        table.title(f"students, T={t:g}: {says}")
        table.value("before training: KL", begin.kl, "nats", note=f"cross-entropy {begin.ce:.3f}")
        dense = scores[Arm(t, "dense")]
        for arm in arms:
            if arm.temperature != t and arm.treatment != "labels":
                continue
            name = name_of(arm)
            for what in Score._fields:
                values = [getattr(score, what) for score in scores[arm]]
                over = interval([x - getattr(y, what) for x, y in zip(values, dense, strict=True)])
                note = "" if arm.treatment == "dense" else f"{over.mean:+.4f} ± {over.half:.4f} to the live teacher"
                more: dict[str, Any] = {"line": name.removesuffix(" (auto)"), "at": {"T": t}} if what == "kl" else {}
                title = {"kl": "KL", "ce": "cross-entropy"}[what]
                table.value(f"{name}: {title}", figure(values), "nats", better="lower", note=note, **more)


def storage(table: Table, make: Make, arms: Sequence[Arm]) -> None:
    """Add a row per shape."""
    problem = make()
    n = min(problem.trained, 16 * LENGTH)
    mass = f"{problem.mass:.3f} of the teacher's probability"
    table.title(f"stored, {n} positions, tokens and four tails included, V={len(problem.head_VD)} ({mass})")
    for shape in dict.fromkeys(arm.shape for arm in arms if arm.shape):
        targets = shape.targets(problem, 0)[:n]
        kept = float((targets.logprobs > -torch.inf).sum(1).float().mean())
        size = stored_bytes(problem, shape, targets) / n
        table.value(shape_name(shape), size, "bytes", better="lower", note=f"{kept:.1f} entries a position")


def stored_bytes(problem: Problem, shape: Shape, targets: SparseTargets) -> int:
    """Bytes per position of a cache of the first positions."""
    n, size = len(targets), len(problem.head_VD)
    spec = CacheSpec(size, shape.k, shape.draws, shape.t_d, temperatures=targets.temperatures, shard_positions=n)
    with tempfile.TemporaryDirectory() as folder:
        with create_cache(Path(folder) / "cache", spec) as writer:
            writer.write_shard(
                0,
                inputs={"tokens": problem.labels_N[:n].numpy()},
                ids=targets.ids.numpy(),
                logprobs=targets.logprobs.numpy(),
                tail=targets.tail.numpy(),
                outcomes=targets.outcomes.numpy(),
                draws=None if targets.draws is None else targets.draws.numpy(),
                sequence_lengths=[LENGTH] * (n // LENGTH),
            )
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@torch.no_grad()
def gradient_problem(make: Make, rows: int) -> treatments.Problem:
    """An untrained student, at evenly spaced held-out positions."""
    problem = make()
    at = torch.linspace(problem.trained, len(problem.states_ND) - 1, rows).long()
    hidden_ND = Student(problem, 0)(problem.inputs_ND[at])
    return treatments.Problem(problem.logits(at), hidden_ND, problem.head_VD, None)


def sections(make: Make, arms: Sequence[Arm], *, seeds: int, rows: int, sets: int) -> list[Case]:
    """Cases: the gradient, the storage, the students. rows, sets: positions and draw sets for the gradient."""
    cells = sorted({(arm.shape.t_d, arm.temperature) for arm in arms if arm.shape and arm.shape.draws})
    gradient = partial(
        treatments.bench, make=partial(gradient_problem, make, rows), what="gradient", k=HYBRID.k, draws=HYBRID.draws,
        sets=sets, cells=cells,
    )  # fmt: skip
    return [
        Case("the gradient", gradient),
        Case("what is stored", partial(storage, make=make, arms=arms)),
        Case("students", partial(students, make=make, arms=arms, seeds=seeds)),
    ]


def sized(
    ask: RunConfig, *, teacher: Path | None = None, layer: int = LAYER, steps: int | None = None,
    vocabulary: int | None = None, seeds: int = SEEDS,
) -> list[Case]:  # fmt: skip
    """The problem at the small or full size, or at other sizes."""
    windows = (steps or ask.size(64, 192)) * BATCH // LENGTH
    make = cache(
        partial(
            read_problem, teacher, windows=windows, held=ask.size(HELD, 2 * HELD), layer=layer,
            vocabulary=vocabulary or ask.size(4096, 8192),
        )
    )  # fmt: skip
    arms = arms_of((1.0, 2.0, 4.0), (1.0, 1.5, 2.0), (1.0, 1.5, 2.0)) if ask.full else arms_of(
        (1.0, 2.0), (1.0, 1.5), (1.0,)
    )  # fmt: skip
    return sections(make, arms, seeds=seeds, rows=ask.size(64, 256), sets=ask.size(8, 32))


def cases(ask: RunConfig) -> Sequence[Case]:
    """T = 1 and 2; full: the whole grid."""
    return sized(ask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a folder that transformers can load, or a GGUF file")
    parser.add_argument("--full", action="store_true", help="the whole grid")
    parser.add_argument(
        "--layer",
        type=int,
        default=LAYER,
        help="layer whose hidden states the students get; earlier ones make worse students",
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--vocabulary", type=int, help="tokens")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    ask = RunConfig("cpu", full=args.full)
    table = Table("cpu", "quality", size=ask.size("small", "full"))
    found = sized(
        ask, teacher=args.teacher, layer=args.layer, steps=args.steps, vocabulary=args.vocabulary, seeds=args.seeds
    )
    run_cases(found, table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
