"""Live teachers: what a step costs with a teacher beside the student, with a cache written on the way, with an average
of the student as its teacher, and with two students that teach each other.

    fastkd bench live
    python bench/bench_live.py        # --sections live ema mutual; five minutes on two cores

Students and teacher are those of bench_train.py, on random tokens. The runs of a section alternate in one process, and
each is a whole epoch: `teacher` is the teacher's forward with all logits, as anyone would write it; `cached` trains
from a finished cache; `live` has the teacher beside the student; `live, cache written` leaves a new cache every time.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastkd
from fastkd.bench.bench_train import SIZES, VOCAB, model_of
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run, Timings, figure, interleaved
from fastkd.kernels import LossConfig, TopKConfig
from fastkd.live import LiveSource
from fastkd.settings import CaptureSettings, MutualSettings, TrainSettings
from fastkd.stream.batch import BatchSource
from fastkd.stream.cached import CachedSource
from fastkd.teachers.load import as_data, as_teacher
from fastkd.train.ema import AveragedTeacher
from fastkd.train.exchange import Exchange, everyone
from fastkd.train.objective import TokenKD
from fastkd.train.optimizer import make_optimizer
from fastkd.train.peers import Peers
from fastkd.train.student import LoadedStudent, Student, of_transformers

STEPS = 4  # of an epoch


class Epochs:
    """A teacher, its data, and students that are trained for an epoch of a source."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder, self.numbers = torch.device(device), folder, count()
        size = SIZES[device]
        self.rows, self.length = size["rows"], size["length"]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        network = model_of(size["teacher"], device, dtype).eval().requires_grad_(False)
        self.network = network

        def states(tokens: Tensor) -> Any:
            found = network.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            return fastkd.teachers.Hidden(found, fastkd.teachers.LMHead(network.lm_head.weight))

        states.device = self.device  # type: ignore[attr-defined]
        self.teacher = as_teacher(states, fingerprint="random", vocab_size=VOCAB)
        random = np.random.default_rng(0)
        documents = [random.integers(0, VOCAB, self.length) for _ in range(STEPS * self.rows)]
        self.data = as_data(documents, self.teacher)
        self.capture = CaptureSettings(
            context=self.length, held_out=0.0, shard_positions=self.rows * self.length,
            batch_tokens=self.rows * self.length,
        )  # fmt: skip
        self.options: dict[str, Any] = {"batch_size": self.rows, "device": self.device, "threads": 1}
        fastkd.capture(self.teacher, self.data, folder / "cache", self.capture)
        self.cached = CachedSource(folder / "cache", **self.options)
        self.student = self.new_student()
        self.optimizer = self.optimizer_of(self.student)

    def new_student(self, seed: int = 0) -> Student:
        """A student; other seeds have other weights."""
        made = of_transformers(model_of(SIZES[self.device.type]["student"], self.device.type), f"student {seed}")
        if seed:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(seed)
                for parameter in made.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        made.autocast = torch.bfloat16 if self.device.type == "cuda" else None
        made.read(TokenKD())
        return made

    def optimizer_of(self, student: Student) -> torch.optim.AdamW:
        return make_optimizer(student, TrainSettings(), self.device)

    def forward_teacher(self) -> Tensor:
        """The teacher's forward over the epoch, all logits."""
        last = torch.zeros(())
        with torch.inference_mode():
            self.unanswered.seek(0, 0)
            for step in self.unanswered.steps(epochs=1):
                for batch in step.micro_batches:
                    last = self.network(input_ids=batch.input_ids, use_cache=False).logits[0, 0, 0]
        return last

    @cached_property
    def unanswered(self) -> LiveSource:
        """The micro-batches without targets."""
        return LiveSource(self.data, None, self.capture, vocab_size=VOCAB, **self.options)

    @cached_property
    def live(self) -> LiveSource:
        """The micro-batches with the teacher's answers."""
        return LiveSource(self.data, self.teacher, self.capture, **self.options)

    def written(self) -> LiveSource:
        """A source that writes a cache which is not there yet."""
        place = self.folder / f"written-{next(self.numbers)}"
        return LiveSource(self.data, self.teacher, self.capture, write_cache=place, **self.options)

    def train(self, source: Callable[[], BatchSource], student: Student | None = None, optimizer: Any = None) -> None:
        """Train for an epoch."""
        student, optimizer = student or self.student, optimizer or self.optimizer
        opened = source()
        opened.seek(0, 0)
        steps = opened.steps()
        scheduled = student.objective.schedule(0, 1)
        scalars = {name: torch.tensor(value, device=self.device) for name, value in scheduled.items()}
        for number in range(1, STEPS + 1):
            step = next(steps)
            for batch in step.micro_batches:
                student(batch, num_items=step.count, **scalars)["loss"].backward()
            student.clip_(1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if student.live is not None:
                student.live.after_step(student, number)
        opened.close()


def _rows(table: Table, times: Timings, positions: int) -> None:
    for name in times:
        table.value(f"{name}: a position", times.time(name).scaled(1e3 / positions), "us")


def live(table: Table, rounds: int) -> None:
    """With a teacher beside the student, against the teacher's forward and a step from a cache."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Epochs(table.device, Path(folder))

        def written() -> None:
            jobs.train(jobs.written)
            for place in Path(folder).glob("written-*"):
                shutil.rmtree(place)

        runs: dict[str, Run] = {
            "teacher": jobs.forward_teacher,
            "cached": partial(jobs.train, lambda: jobs.cached),
            "live": partial(jobs.train, lambda: jobs.live),
            "live, cache written": written,
        }
        times = interleaved(runs, device=table.device, rounds=rounds, warmup=1, core_time=table.device == "cpu")
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (jobs.network, jobs.student)]
    table.title(
        f"a teacher of {sizes[0]:.0f}M parameters beside a student of {sizes[1]:.0f}M, {STEPS} steps of "
        f"{jobs.rows * jobs.length} positions"
    )
    _rows(table, times, STEPS * jobs.rows * jobs.length)
    both = [a + b for a, b in zip(times.rounds["teacher"], times.rounds["cached"], strict=True)]
    for name, limit in (("live", "<= 1.05"), ("live, cache written", "<= 1.10")):
        ratio = figure([a / b for a, b in zip(times.rounds[name], both, strict=True)])
        table.ratio(name, ratio, "teacher and cached, one after the other", limit)


def ema(table: Table, rounds: int) -> None:
    """With an average of the student as the teacher, against a teacher of the same size that stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Epochs(table.device, Path(folder))
        runs = {}
        for name, decay in (("a copy that stays", 1.0), ("an average", 0.999)):
            student = jobs.new_student()
            student.live = AveragedTeacher(student, jobs.capture, decay=decay)
            runs[name] = partial(jobs.train, lambda: jobs.unanswered, student, jobs.optimizer_of(student))
        times = interleaved(runs, device=table.device, rounds=rounds, warmup=1, core_time=table.device == "cpu")
    table.title(f"the student's average as its teacher, {STEPS} steps of {jobs.rows * jobs.length} positions")
    _rows(table, times, STEPS * jobs.rows * jobs.length)
    table.ratio("an average", times.ratio("an average", "a copy that stays"), "a copy that stays", "<= 1.03")


def mutual(table: Table, rounds: int) -> None:
    """Two students that teach each other, against both alone on labels."""
    names = ("A", "B")
    with tempfile.TemporaryDirectory() as folder:
        jobs = Epochs(table.device, Path(folder))
        runs: dict[str, Run] = {}
        for number, name in enumerate(names):
            student = jobs.new_student(number)
            student.read(TokenKD(LossConfig(alpha=1.0)))
            runs[f"{name} alone"] = partial(jobs.train, lambda: jobs.unanswered, student, jobs.optimizer_of(student))
        made = {name: LoadedStudent(jobs.new_student(number), None) for number, name in enumerate(names)}
        topk = TopKConfig(k=MutualSettings().k, draws=MutualSettings().draws)
        peers = Peers(made, Exchange(everyone(names), topk))
        peers.autocast = made["A"].student.autocast
        peers.read(TokenKD())
        runs["A and B"] = partial(jobs.train, lambda: jobs.unanswered, peers, jobs.optimizer_of(peers))
        times = interleaved(runs, device=table.device, rounds=rounds, warmup=1, core_time=table.device == "cpu")
    table.title(f"two students that teach each other, {STEPS} steps of {jobs.rows * jobs.length} positions")
    _rows(table, times, STEPS * jobs.rows * jobs.length)
    both = [a + b for a, b in zip(times.rounds["A alone"], times.rounds["B alone"], strict=True)]
    ratio = figure([a / b for a, b in zip(times.rounds["A and B"], both, strict=True)])
    table.ratio("A and B", ratio, "both alone, one after the other", "<= 1.08")


def sections(rounds: int) -> dict[str, Case]:
    """The cases by name."""
    return {
        "live": Case("a teacher beside the student", partial(live, rounds=rounds)),
        "ema": Case("an average as the teacher", partial(ema, rounds=rounds)),
        "mutual": Case("two students", partial(mutual, rounds=rounds)),
    }


def cases(ask: RunConfig) -> Sequence[Case]:
    """All sections."""
    return list(sections(ask.times(3, 7)).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["live", "ema", "mutual"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table("cuda" if torch.cuda.is_available() else "cpu", "live")
    found = sections(args.rounds)
    run_cases([found[name] for name in found if name in args.sections], table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
