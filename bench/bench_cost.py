"""Cost of n students from one cache against n students with a live teacher: the n from which the cache pays off.

    fastkd bench cost
    python bench/bench_cost.py [--device cuda] [--rounds 5]

All runs use the same positions and alternate. `capture` runs the teacher, computes targets, and commits them as a
shard; `cached` reads and decodes a shard and makes a step on it; `live` steps run the teacher on the step's tokens, and
use either all its outcomes (dense) or the same targets as the cache. Teacher and students are those of bench_train.py.
A student that is trained for e epochs counts as e students.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd import SparseTargets, linear_topk_targets
from fastkd.bench.bench_train import VOCAB, Steps
from fastkd.bench.cases import GRID
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run, Timings, interleaved
from fastkd.cache import CacheSpec, create_cache, open_cache
from fastkd.cache.writer import CacheWriter
from fastkd.demo.page import break_even

K, DRAWS = 48, 16
SHARDS = 4  # shards that are read in turn
STUDENTS = range(1, 11)
MILLION = 1e6  # positions that a student is trained on
LIVE = {"dense": "teacher live, all outcomes", "targets": "teacher live, the same targets"}


class Jobs(Steps):
    """A teacher and the students of bench_train.py: steps from a cache and with the live teacher, and a capture."""

    def __init__(self, device: str, folder: Path) -> None:
        super().__init__(device, 1.0)
        self.writer, self.shard = self._create(folder / "written"), count()
        with self._create(folder / "read") as writer:
            for number in range(SHARDS):
                self._write(writer, number)
            writer.seal()
        self.cache, self.numbers = open_cache(folder / "read"), cycle(range(SHARDS))

    def capture(self) -> None:
        """Capture the batch's positions as a shard."""
        self._write(self.writer, next(self.shard))

    def cached(self) -> list[Tensor]:
        """A step from the cache."""
        arrays = self.cache.read_shard(next(self.numbers))
        targets = SparseTargets.from_arrays(
            arrays, vocab_size=VOCAB, temperatures=GRID, draw_temperature=1.0, device=self.device
        )
        return self._distil(targets)

    def targets(self) -> list[Tensor]:
        """A step with a live teacher, on the targets that the cache has."""
        return self._distil(self._asked())

    def _distil(self, targets: SparseTargets) -> list[Tensor]:
        index = self.batch.targets.index
        assert index is not None
        return self.distil_from(replace(self.batch, targets=replace(targets[index], index=index)))

    @torch.no_grad()
    def _asked(self) -> SparseTargets:
        states = self.teacher.base_model(input_ids=self.batch.input_ids, use_cache=False).last_hidden_state
        return linear_topk_targets(states.flatten(0, 1), self.teacher.lm_head.weight, K, temperatures=GRID, draws=DRAWS)

    def _create(self, place: Path) -> CacheWriter:
        positions = self.batch.input_ids.numel()
        return create_cache(place, CacheSpec(VOCAB, K, DRAWS, temperatures=GRID, shard_positions=positions))

    def _write(self, writer: CacheWriter, number: int) -> None:
        rows, length = self.batch.input_ids.shape
        written: dict[str, Any] = {**self._asked().arrays()}
        writer.write_shard(
            number,
            inputs={"tokens": self.batch.input_ids.flatten().cpu().numpy()},
            **written,
            sequence_lengths=[length] * rows,
            first_sequence=number * rows,
        )


def measure(table: Table, rounds: int) -> None:
    """The cost per position, and then of n students."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(table.device, Path(folder))
        runs: dict[str, Run] = {
            "capture": jobs.capture,
            "cached": jobs.cached,
            "dense": jobs.live,
            "targets": jobs.targets,
        }
        times = interleaved(runs, device=table.device, rounds=rounds, warmup=1)
        jobs.writer.close()
        sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (jobs.teacher, jobs.student)]
        write(table, times, jobs.batch.input_ids.numel(), *sizes)


def write(table: Table, times: Timings, positions: int, teacher: float, student: float) -> None:
    """Add all rows. positions: of each run. teacher, student: millions of parameters."""
    table.title(f"a teacher of {teacher:.0f}M parameters, students of {student:.0f}M, {positions} positions a step")
    names = {"capture": "captured, once", "cached": "a step from the cache"}
    names |= {live: f"a step, {says}" for live, says in LIVE.items()}
    for run, name in names.items():
        table.value(f"{name}: a position", times.time(run).scaled(1e3 / positions), "us")
    per = {run: times[run] / 1e3 / positions for run in times}
    for live, says in LIVE.items():
        table.ratio(names["cached"], times.ratio("cached", live), says)
    for live, says in LIVE.items():
        even = break_even(capture=per["capture"], cached=per["cached"], live=per[live])
        name = f"the cache has paid for itself, against {says}"
        if even is None:
            table.absent(name, "never: a step from the cache takes no less")
        else:
            exact = per["capture"] / (per[live] - per["cached"])
            table.value(name, even, "students", better="lower", note=f"at {exact:.2f} of them the costs are equal")
    table.title("n students of a million positions each")
    for n in STUDENTS:
        at = {"students": float(n)}
        once = MILLION * (per["capture"] + n * per["cached"])
        table.value(f"{n}: one cache", once, "s", line="one cache", at=at)
        for live, says in LIVE.items():
            note = f"{MILLION * n * per[live] / once:.2f} of the time with one cache"
            table.value(f"{n}: {says}", MILLION * n * per[live], "s", line=says, at=at, note=note)


def cases(ask: RunConfig) -> Sequence[Case]:
    """One."""
    return [Case("cost", partial(measure, rounds=ask.times(3, 7)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    table = Table(args.device, "cost")
    run_cases([Case("cost", partial(measure, rounds=args.rounds))], table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
