"""A training step that matches features against the same step without, its memory, and the loader with a feature.

    python bench/bench_match.py       # --sections step memory loader; two minutes on two cores

A student of 29M parameters on batches of 1,024 positions; the teacher's states have 576 components, as SmolLM2-135M's.
All steps are forward, backward, clipping and AdamW, in alternation within one run. `mse` matches one state through a
linear projector, `gram` the cosines of the states of a segment, and `attention` the maps of a layer, the teacher's
recomputed from its state in every step.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastkd
from fastkd.bench.bench_train import VOCAB, batch_of, model_of
from fastkd.bench.cases import known_targets
from fastkd.bench.harness import peak_bytes
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import interleaved
from fastkd.cache import Basis, FeatureSpec, create_feature, encode_hidden, open_cache
from fastkd.kernels import HiddenTargets
from fastkd.models.attention import read_attention
from fastkd.settings import TrainSettings
from fastkd.stream.cached import DistillLoader
from fastkd.train.objective import Objective, TokenKD, WeightedSum
from fastkd.train.objectives.attention import AttentionKD
from fastkd.train.objectives.hidden import HiddenKD
from fastkd.train.objectives.projector import LinearProjector
from fastkd.train.optimizer import clip_all_, make_optimizer
from fastkd.train.student import of_transformers

STUDENT = (384, 6, 6, 3, 1024)  # hidden, layers, heads, key-value heads, inner
WIDTH = 576
ROWS, LENGTH = {"cpu": 4, "cuda": 16}, {"cpu": 256, "cuda": 1024}
LAYER = 3
TEACHER = (WIDTH, 1, 9, 3, 1536)
LIMITS = {"mse": "<= 1.05", "gram": "<= 1.10", "attention": "<= 1.10"}


class Step:
    """A student with its optimizer, and a step of it with or without a loss on features."""

    def __init__(self, device: str, loss: str | None) -> None:
        self.student = of_transformers(model_of(STUDENT, device), "student").to(device)
        self.student.autocast = torch.bfloat16 if device == "cuda" else None
        n = ROWS[device] * LENGTH[device]
        self.batch = batch_of(ROWS[device], LENGTH[device], known_targets(n, VOCAB, 48, 16, device), device)
        terms: dict[str, Objective] = {"token": TokenKD()}
        if loss is not None:
            states = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
            targets = HiddenTargets.from_states(states, index=torch.arange(n, device=device))
            signals, counts = {"features/20": targets}, {"targets": self.batch.count, "features/20": n}
            self.batch = replace(self.batch, signals=signals, counts=counts)
            if loss == "attention":
                block = read_attention(model_of(TEACHER, device).eval(), 0).block()
                terms["hidden"] = AttentionKD("20", f"attention:{LAYER}", block)
            else:
                projector = LinearProjector(STUDENT[0], WIDTH) if loss == "mse" else None
                terms["hidden"] = HiddenKD("20", f"state:{LAYER}", loss, projector=projector).to(device)
        self.student.read(WeightedSum(terms, {"hidden": 0.1} if loss else None))
        self.optimizer = make_optimizer(self.student, TrainSettings(), torch.device(device))
        self.scalars = {"alpha": torch.tensor(0.5, device=device), "temperature": torch.tensor(1.0, device=device)}

    def __call__(self) -> list[Tensor]:
        self.student(self.batch, num_items=self.batch.count, **self.scalars)["loss"].backward()
        norm = clip_all_(self.student, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [norm]


def step(table: Table, rounds: int, losses: Sequence[str] = tuple(LIMITS)) -> None:
    """Time of a step."""
    runs: dict[str, Any] = {"without": Step(table.device, None)}
    runs |= {loss: Step(table.device, loss) for loss in losses}
    times = interleaved(runs, device=table.device, rounds=rounds, core_time=table.device == "cpu")
    table.title(f"a step of {runs['without'].batch.positions} positions, V = {VOCAB}, one state of {WIDTH} components")
    for name in times:
        table.value(name, times.time(name), "ms")
    for loss in losses:
        table.ratio(loss, times.ratio(loss, "without"), "without features", LIMITS[loss])


def memory(table: Table, losses: Sequence[str] = tuple(LIMITS)) -> None:
    """Peak memory of a step beyond weights, optimizer state and batch."""
    table.title("peak memory of such a step")
    peaks = {}
    for name in (None, *losses):
        run = Step(table.device, name)
        run()  # creates the optimizer's state
        peaks[name] = peak_bytes(run, table.device)
        table.value(name or "without", peaks[name] / 1e6, "MB")
    for loss in losses:
        table.ratio(loss, peaks[loss] / peaks[None], "without features", "<= 1.10")


def loader(table: Table, rounds: int, positions: int) -> None:
    """Assembled batches of a cache with a feature, of made-up states, against those of the targets alone."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 1000, 512) for _ in range(positions // 512)]
    teacher = model_of((64, 1, 2, 1, 128), "cpu").eval()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "cache"
        fastkd.capture(
            lambda tokens: teacher(input_ids=tokens, use_cache=False).logits, documents, place, vocab_size=VOCAB,
            fingerprint="random", context=512, held_out=0, shard_positions=8192, batch_tokens=2048,
        )  # fmt: skip
        cache = open_cache(place)
        mixing = (random.standard_normal((WIDTH, WIDTH)) * np.exp(-np.arange(WIDTH) / 300)).astype(np.float32)
        states = random.standard_normal((8192, WIDTH)).astype(np.float32) @ mixing
        basis = Basis.learn(states)
        spec = FeatureSpec(
            base=cache.spec.hash, name="20", kind="state", layer=20, layers=30, shape=(WIDTH,), step=0.2,
            positions="all", seed=0, dtype="float32", basis=basis.sha256,
        )  # fmt: skip
        with create_feature(place, spec, basis) as writer:
            for index in cache.shards:
                rows = len(cache.read_shard(index)["tokens"])
                writer.write_shard(index, encode_hidden(states[:rows], basis, spec.step))
            writer.seal()
        cache = open_cache(place)
        total = int(cache.manifest.column("positions").to_numpy().sum())

        def consume(source: DistillLoader) -> None:
            for _ in source:
                pass

        # one loader each, epoch after epoch: the memory of shards is touched before
        options: dict[str, Any] = {"batch_size": 16, "threads": 1}
        runs = {
            "targets": partial(consume, DistillLoader(cache, **options)),
            "with a feature": partial(consume, DistillLoader(cache, features=("20",), **options)),
        }
        times = interleaved(runs, device="cpu", rounds=rounds, warmup=1, core_time=True)
    table.title(f"assembled batches of {total} positions, of one core's time")
    for name in times:
        table.value(name, times.time(name).inverse(total / 1e3), "M positions/s")
    alone = [b - a for a, b in zip(times.rounds["targets"], times.rounds["with a feature"], strict=True)]
    table.value("the feature alone", total / 1e3 / float(np.median(alone)), "M positions/s", ">= 0.4")


def sections(rounds: int, positions: int) -> dict[str, Case]:
    """The cases by name."""
    return {
        "step": Case("a step", partial(step, rounds=rounds)),
        "memory": Case("memory", memory),
        "loader": Case("the loader", partial(loader, rounds=rounds, positions=positions)),
    }


def cases(ask: RunConfig) -> Sequence[Case]:
    """All sections."""
    return list(sections(ask.times(5, 9), ask.size(2**15, 2**17)).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["step", "memory", "loader"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--positions", type=int, default=2**15)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table("cuda" if torch.cuda.is_available() else "cpu", "match")
    found = sections(args.rounds, args.positions)
    run_cases([found[name] for name in found if name in args.sections], table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
