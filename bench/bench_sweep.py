"""Four arms from one read of a cache, against the sum of their own steps, and against four trainings that each read.

    python bench/bench_sweep.py                   # two to four minutes on one core

A round is an epoch of the cache: shards are read and decoded, micro-batches put together, and each of them given to
every arm. `own` are the same steps of the same arms on batches that lie in memory already. Times are of the cores that
the process used, on all its threads, with one for the arithmetic: what other jobs do to the machine is no part of it,
and reading ahead hides nothing. Two students: as little arithmetic a position as a student with a head of 49,152
outcomes can have, where a read weighs most, and a larger one. The steps of the arms are most of both sides of the first
ratio, and what they differ by from round to round is most of its spread; the second has the read by itself.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.bench.bench_train import VOCAB, model_of
from fastkd.bench.cases import GRID, known_targets
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.cache import Cache, CacheSpec, create_cache, open_cache
from fastkd.settings import TrainSettings
from fastkd.stream.cached import DistillLoader
from fastkd.sweep.api import Member, Together
from fastkd.sweep.arms import make_arms
from fastkd.train.api import make_loader
from fastkd.train.load_student import make_student
from fastkd.train.trainer import Trainer
from fastkd.utils.distributed import Processes
from fastkd.utils.timing import figure, interleaved

WINDOW, WINDOWS, SHARDS, STEP = 256, 4, 4, 1024
ARMS = {"alpha": [0.0, 0.5], "temperature": [1.0, 2.0]}
# hidden, layers, heads, key-value heads, inner
STUDENTS = {"16 wide, 1 layer": (16, 1, 2, 1, 32), "96 wide, 2 layers": (96, 2, 6, 3, 256)}
CPU = Processes(0, 1, torch.device("cpu"))


def make(place: Path) -> Cache:
    """A cache of known targets, 48 exact entries and 16 drawn."""
    spec = CacheSpec(
        vocab_size=VOCAB, k=48, draws=16, temperatures=GRID, teacher="known", tokenizer="none", dataset="none",
        inputs=("tokens", "loss_mask"), shard_positions=WINDOW * WINDOWS,
    )  # fmt: skip
    random = np.random.default_rng(0)
    with create_cache(place, spec) as writer:
        for index in range(SHARDS):
            n = WINDOW * WINDOWS
            t = known_targets(n, VOCAB, 48, 16, "cpu", seed=index)
            assert t.draws is not None
            counts = np.ones(n, bool)
            ids, draws = t.ids.numpy().copy(), t.draws.numpy().copy()
            # drawn entries follow the head, best first, equal ones by their ids
            ids[:, 48:] = np.sort(ids[:, 48:], 1)
            writer.write_shard(
                index,
                ids=ids,
                logprobs=t.logprobs.numpy().copy(),
                draws=draws,
                tail=t.tail.numpy(),
                outcomes=np.asarray(t.outcomes),
                inputs={"tokens": random.integers(0, VOCAB, n, dtype=np.int32), "loss_mask": counts},
                sequence_lengths=[WINDOW] * WINDOWS,
                document_lengths=[WINDOW] * WINDOWS,
                first_sequence=index * WINDOWS,
            )
        writer.seal()
    return open_cache(place)


def trainers(size: tuple[int, ...], cache: Cache, loader: DistillLoader, folder: Path) -> list[Member]:
    """An arm each, ready."""
    settings = TrainSettings(batch_tokens=STEP, steps=10**6, evaluate_every=0, checkpoint_minutes=1e9)
    model = model_of(size, "cpu")
    members = []
    for arm in make_arms(ARMS, settings, cache.spec)[0]:
        own = arm.of(settings, 0)
        trainer = Trainer(make_student(model, cache.spec, own), loader, CPU, own, folder / arm.name)
        members.append(Member(trainer, arm, folder / arm.name, own))
    return members


def compare(table: Table, name: str, size: tuple[int, ...], cache: Cache, folder: Path, rounds: int) -> None:
    """One student."""
    loader = make_loader(cache, TrainSettings(batch_tokens=STEP), CPU)
    members = trainers(size, cache, loader, folder)
    together = Together(members, loader)
    held = list(loader)
    begin = loader.state_dict() | {"epoch": 0, "sequences": 0}

    def epoch() -> Any:
        loader.load_state_dict(begin)
        return iter(loader)

    def one_read() -> None:
        together._stream = epoch()
        for _ in held:
            together.step()
        loader.close()

    def own() -> None:
        for step in held:
            for member in members:
                member.trainer.take(step, begun=time.perf_counter(), waited=0.0)
        together.at = members[0].trainer.step

    def four_reads() -> None:
        for member in members:
            for step in epoch():
                member.trainer.take(step, begun=time.perf_counter(), waited=0.0)
        together.at = members[0].trainer.step

    def read() -> None:
        for _ in epoch():
            pass

    runs = {"read": read, "one read": one_read, "own": own, "four reads": four_reads}
    found = interleaved(runs, device="cpu", rounds=rounds, warmup=1, core_time=True)
    count = sum(p.numel() for p in members[0].trainer.student.parameters())
    per = found["own"] / len(held) / len(members)
    table.title(f"{name}: {count / 1e6:.1f} M parameters, {len(held)} steps of {STEP} positions")
    floor, note = "the sum of their own steps", f"{per:.0f} ms each arm's step"
    table.ratio("four arms from one read", found.ratio("one read", "own"), floor, "<= 1.02", note=note)
    read_alone = figure([1 + a / b for a, b in zip(found.rounds["read"], found.rounds["own"], strict=True)])
    table.ratio("own steps and the read alone", read_alone, floor, "<= 1.02")
    table.ratio("four arms from four reads", found.ratio("four reads", "own"), floor)
    for member in members:
        member.trainer.close()


def student(table: Table, name: str, rounds: int) -> None:
    """One student, from a cache made for it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(table, name, STUDENTS[name], make(Path(folder) / "cache"), Path(folder) / "runs", rounds)


def sections(names: Sequence[str], rounds: int) -> list[Case]:
    """A case a student."""
    return [Case(name, partial(student, name=name, rounds=rounds)) for name in names]


def cases(ask: RunConfig) -> Sequence[Case]:
    """The small student, where a read weighs most; in full both."""
    return sections(list(STUDENTS)[: ask.size(1, 2)], ask.times(3, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("cpu", "sweep")
    run_cases(sections(list(STUDENTS), args.rounds), table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
