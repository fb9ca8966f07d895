"""Instructions a logit of the loss's and top-k's kernels, and the time that a GPU would take: a prediction.

    fastkd bench sass [--full]
    python -m fastkd.bench.bench_sass --arch 90 --vocab 128256 --kernel loss    # while writing a kernel
    python -m fastkd.bench.bench_sass --check                                   # against bench/recorded/sass.json
    python -m fastkd.bench.bench_sass --record                                  # write it anew

Needs triton, and no GPU. The kernels are compiled as they would be launched, and what they execute is read out of their
SASS. A time is what issuing these instructions, computing these functions (exponentials, logarithms, reciprocals) or
moving these bytes takes, if nothing else is waited for: a bound from below, to compare kernels with. The ratios are
over the floor. For the loss: issue alone, over one read and one write of the logits; what the kernel takes at least,
the largest of the three, is in the note. For top-k: the sum of each kernel's largest, over one read.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastkd.bench.cases import GRID
from fastkd.bench.check import FOLDER, recording_files
from fastkd.bench.compiled import Launch, loss_launch, topk_launches
from fastkd.bench.hardware import cores
from fastkd.bench.sass import WARP, Count, Counted, count_kernel, count_loss
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table, load
from fastkd.errors import BenchError
from fastkd.kernels import TopKConfig

VOCABULARIES = (32000, 49152, 50257, 128256, 151936, 262144)
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 3.3, 4.0)
SOFTCAP = 30.0
RECORD = FOLDER / "sass.json"
TIED = 4  # tokens of a row, and groups, that tie with its k-th best one
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Gpu:
    """What a time is computed from. clock: GHz under load. copy: TB/s, read plus written, of a large copy. slots: of
    threads' instructions an SM issues in a clock. special: results of exponentials and reciprocals of the same."""

    name: str
    arch: int
    sms: int
    clock: float
    copy: float
    slots: int = 128
    special: int = 16

    def issue(self, logit: Count) -> float:
        """Picoseconds to issue the instructions of a logit."""
        return logit.issued / (self.sms * self.slots * self.clock * 1e-3)

    def functions(self, logit: Count) -> float:
        """Picoseconds for the exponentials, logarithms and reciprocals of a logit."""
        return logit.special / (self.sms * self.special * self.clock * 1e-3)

    def memory(self, size: float) -> float:
        """Picoseconds to move `size` bytes."""
        return size / self.copy


# The H100's copy is what a plain copy kernel reached on one (3.0 of its peak of 3.35 TB/s), not a rate of the kernels
# here, which no GPU has run; the others are taken to reach the same share of their peaks, 8 and 2.04 TB/s. Clocks lie
# below the highest: a card that moves memory at this rate is at its power limit. Left out: units that take fewer than
# 128 threads a clock (integers and comparisons, 64; float32 on the A100, 64), which would bind if more than half of the
# instructions were theirs.
GPUS = (Gpu("H100", 90, 132, 1.70, 3.0), Gpu("B200", 100, 148, 1.85, 7.2), Gpu("A100", 80, 108, 1.41, 1.8))


@dataclass(frozen=True)
class LossCase:
    """A loss to count. treatment: of the tail; the divergence is forward KL."""

    vocab: int
    dtype: torch.dtype = BF16
    temperature: float = 2.0
    treatment: str = "bucket"
    softcap: float | None = None

    @property
    def name(self) -> str:
        """For a table or the record."""
        cap = f" softcap={self.softcap:g}" if self.softcap else ""
        return f"loss {self.treatment} {str(self.dtype)[6:]} V={self.vocab} T={self.temperature:g}{cap}"

    @property
    def measured(self) -> tuple[str, str]:
        """The suite and the name of the row that measures it."""
        cap = f", softcap {self.softcap:g}" if self.softcap else ""
        return "loss", f"in place forward_kl {self.treatment} T={self.temperature}{cap}"

    def limit(self, gpu: Gpu) -> str:
        """The goal for the time to issue its instructions, over the floor."""
        if self.dtype != BF16 or self.temperature != 2.0:
            return ""
        if gpu.name == "B200":
            return "<= 1.0" if self.vocab == 128256 and not self.softcap else ""
        if gpu.name != "H100":
            return ""
        return "<= 0.80" if self.softcap else "<= 0.65" if self.vocab < 49152 else "<= 0.55"

    def jobs(self, arch: int) -> list[Callable[[], Counted]]:
        """What counts its kernel."""
        launch = loss_launch(self.vocab, self.dtype, arch, treatment=self.treatment, softcap=self.softcap)
        return [lambda: count_loss(launch, arch, self.temperature)]


@dataclass(frozen=True)
class TopKCase:
    """Targets to count, at the four temperatures of the benchmarks."""

    vocab: int
    dtype: torch.dtype = BF16
    k: int = 64
    draws: int = 0
    softcap: float | None = None

    @property
    def name(self) -> str:
        """For a table or the record."""
        cap = f" softcap={self.softcap:g}" if self.softcap else ""
        return f"topk k={self.k} draws={self.draws} {str(self.dtype)[6:]} V={self.vocab}{cap}"

    @property
    def measured(self) -> tuple[str, str]:
        """The suite and the name of the row that measures it."""
        what = f", {self.k} entries and {self.draws} draws" if self.draws else ", softcap" if self.softcap else ""
        return "topk", f"fastkd{what}"

    def limit(self, gpu: Gpu) -> str:
        """The goal for its kernels' time, over the floor."""
        goal = gpu.name == "H100" and self.vocab == 128256 and self.k == 64 and not (self.draws or self.softcap)
        return "<= 2.0" if goal and self.dtype == BF16 else ""

    def jobs(self, arch: int) -> list[Callable[[], Counted]]:
        """What counts its kernels."""
        config = TopKConfig(k=self.k, draws=self.draws, temperatures=GRID)
        launches = topk_launches(self.vocab, self.dtype, arch, softcap=self.softcap, config=config)
        return [partial(count_kernel, launch, arch, self.trips(launch)) for launch in launches]

    def trips(self, launch: Launch) -> float:
        """Iterations of a kernel's loops that depend on the data, in a row of a language model."""
        candidates = self.k + TIED
        if launch.name == "_select":  # over the groups that it reads again
            return math.ceil(candidates / launch.values["TILE"])
        if launch.name == "_sift_ties":  # which has nothing to do
            return 0.0
        if launch.name == "_finish":  # exchanges of a sort
            stages = math.ceil(math.log2(candidates))
            return stages * (stages + 1) / 2
        return 1.0


AnyCase = LossCase | TopKCase
LOSS_RATIO = (
    "loss: time to issue its instructions alone, over one read and one write of the logits; the kernel takes at least "
    "the largest of issue, functions and memory"
)
TOPK_RATIO = "top-k: sum over its kernels of the largest of issue, functions and memory, over one read of the logits"
FUNCTIONS = "functions: exponentials, logarithms and reciprocals on the special-function units"


def add_rows(table: Table, case: AnyCase, gpu: Gpu, found: Sequence[Counted], measured: float | None) -> None:
    """A row for the loss's time to issue its instructions, or for top-k's time, since its kernels run one after the
    other: the sum of each one's longest. And a row for what a card took."""
    is_loss = isinstance(case, LossCase)
    floor = gpu.memory((2 if is_loss else 1) * case.dtype.itemsize)
    over = "one read and one write" if is_loss else "one read"
    logits = [counted.total * (WARP / case.vocab) for counted in found]
    logit = sum(logits, Count())
    times = [
        (gpu.issue(one) / floor, gpu.functions(one) / floor, gpu.memory(counted.bytes / case.vocab) / floor)
        for one, counted in zip(logits, found, strict=True)
    ]
    issue, functions, memory = (sum(column) for column in zip(*times, strict=True))
    if is_loss:
        parts = {name: (part * (WARP / case.vocab)).issued for name, part in found[0].parts.items()}
    else:
        parts = {counted.kernel: one.issued for counted, one in zip(found, logits, strict=True)}
    stack = max(counted.stack for counted in found)
    longest = sum(map(max, times))
    note = (
        (f"issue alone; the kernel takes at least {longest:.2f}x; " if is_loss else "each kernel's largest, in sum; ")
        + f"{logit.issued:.2f} instructions a logit ({', '.join(f'{name} {n:.2f}' for name, n in parts.items())}), "
        f"{logit.exponentials:.2f} exponentials; issue {issue:.2f}x, functions {functions:.2f}x, memory {memory:.2f}x; "
        f"{max(counted.registers for counted in found)} registers, "
        + (f"{stack} BYTES OF SPILLS a thread" if stack else "no spills")
    )
    table.ratio(
        case.name, issue if is_loss else longest, over, case.limit(gpu), better="", note=note,
        line=f"{gpu.name}, predicted", at={"V": case.vocab},
    )  # fmt: skip
    if measured is not None:
        table.ratio(f"{case.name}: measured on {gpu.name}", measured, over, better="")


def measured_on(gpu: Gpu, case: AnyCase) -> float | None:
    """The ratio that a card of this name took, from the recordings; None if there is none."""
    suite, name = case.measured
    for file in recording_files():
        for recording in load(file):
            if recording.suite == suite and gpu.name in str(recording.hardware.get("name", "")):
                for row in recording.rows:
                    at = all(part in row.case for part in (f" V={case.vocab} ", " k=64 ", str(case.dtype)[6:]))
                    if row.name == name and at and not row.case.startswith("a certain student"):
                        return row.ratio
    return None


def count_all(cases: Iterable[AnyCase], arch: int) -> dict[str, list[Counted]]:
    """The kernels of the cases by name, compiled on all cores."""
    # launches are recorded before that, since what pretends to be a GPU is global
    jobs = [(case.name, job) for case in cases for job in case.jobs(arch)]
    found: dict[str, list[Counted]] = {}
    with ThreadPoolExecutor(cores()) as pool:
        counted = list(pool.map(lambda job: job[1](), jobs))
    for (name, _), one in zip(jobs, counted, strict=True):
        found.setdefault(name, []).append(one)
    return found


def _bench(table: Table, title: str, gpu: Gpu, some: Sequence[AnyCase]) -> None:
    ratio = LOSS_RATIO if isinstance(some[0], LossCase) else TOPK_RATIO
    table.title(f"predicted for {gpu.name}, sm_{gpu.arch}: {title}", ratio, FUNCTIONS)
    found = count_all(some, gpu.arch)
    for case in some:
        add_rows(table, case, gpu, found[case.name], measured_on(gpu, case))


def cases(ask: RunConfig) -> Sequence[Case]:
    """For every GPU: the loss at several sizes and temperatures, in other types and treatments, and top-k."""
    if find_spec("triton") is None:
        raise BenchError("sass: triton is not installed; it is built for Linux.")
    found = []
    for gpu in GPUS:
        parts: dict[str, list[AnyCase]] = {
            "loss, sizes": [LossCase(vocab) for vocab in VOCABULARIES],
            "loss, temperatures": [LossCase(128256, temperature=t) for t in TEMPERATURES],
            "loss, draws": [LossCase(vocab, treatment="sampled") for vocab in ask.size((49152,), VOCABULARIES)],
            "loss, softcap": [LossCase(vocab, softcap=SOFTCAP) for vocab in ask.size((128256,), VOCABULARIES)],
            "loss, float32": [LossCase(vocab, FP32) for vocab in ask.size((128256,), VOCABULARIES)],
            "top-k and four tails": [TopKCase(vocab) for vocab in VOCABULARIES],
            "top-k, four tails and draws": [
                TopKCase(vocab, k=48, draws=16) for vocab in ask.size((128256,), VOCABULARIES)
            ],
            "top-k, softcap": [TopKCase(vocab, softcap=SOFTCAP) for vocab in ask.size((128256,), VOCABULARIES)],
            "top-k, float32": [TopKCase(vocab, FP32) for vocab in ask.size((128256,), VOCABULARIES)],
        }
        if ask.full:
            parts["loss, sizes at other temperatures"] = [
                LossCase(v, dtype, t, cap)
                for dtype in (BF16, FP32)
                for cap in ("bucket", "sampled")
                for v in VOCABULARIES
                for t in (1.0, 3.3, 4.0)
            ]
        for title, some in parts.items():
            found.append(Case(f"{gpu.name}, {title}", partial(_bench, title=title, gpu=gpu, some=some)))
    return found


# The default configurations, which `make check` compiles: one of every group of sizes that gets the same kernel.
CHECKED: tuple[AnyCase, ...] = (
    *(LossCase(32000 if t == 2.0 else 128256, temperature=t) for t in (1.0, 2.0, 3.3)),
    *(LossCase(vocab) for vocab in (49152, 50257, 128256, 151936)),
    LossCase(128256, treatment="sampled"),
    LossCase(128256, softcap=SOFTCAP),
    LossCase(128256, FP32),
    TopKCase(128256),
    TopKCase(128256, k=48, draws=16),
)
CHECKED_ARCH = 90


def counts(some: Sequence[AnyCase] = CHECKED) -> dict[str, dict[str, int]]:
    """By case and kernel: instructions that a row's warps execute, registers and bytes of spills a thread."""
    return {
        f"{name}: {kernel.kernel}": {
            "instructions": round(kernel.total.issued),
            "registers": kernel.registers,
            "spills": kernel.stack,
        }
        for name, kernels in count_all(some, CHECKED_ARCH).items()
        for kernel in kernels
    }


def compare(record: dict[str, Any], found: dict[str, dict[str, int]]) -> tuple[list[str], list[str]]:
    """What is worse than recorded, and what is better."""
    worse, better = list[str](), list[str]()
    for name, now in found.items():
        before = record["kernels"].get(name)
        if before is None:
            worse.append(f"{name}: not recorded")
            continue
        for what in ("instructions", "spills"):
            if now[what] != before[what]:
                line = f"{name}: {what}: got {now[what]}; the record has {before[what]}"
                (worse if now[what] > before[what] else better).append(line)
    worse += [f"{name}: no longer counted" for name in record["kernels"] if name not in found]
    return worse, better


def check(path: Path = RECORD) -> int:
    """Print the comparison with the record; 1 if a kernel executes more instructions or spills more than recorded."""
    update = "python -m fastkd.bench.bench_sass --record"
    if find_spec("triton") is None:
        print("sass: triton is not installed, so that nothing can be compiled.")
        return 0
    record = json.loads(path.read_text())
    if record["triton"] != version("triton"):
        print(f"sass: the record is of triton {record['triton']}; {version('triton')} cannot be compared with it.")
        return 0
    found = counts()
    worse, better = compare(record, found)
    for line in worse:
        print(f"sass: {line}")
    if worse:
        print(f"sass: kernels are worse than recorded. If that is meant: {update}")
        return 1
    print(f"sass: {len(found)} kernels execute no more instructions, and spill no more, than recorded.")
    if better:
        print(f"sass: {len(better)} numbers are lower. To record them: {update}")
    return 0


def write_record(path: Path = RECORD) -> int:
    """Count anew, and write the record. Returns 0."""
    found = counts()
    rows = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(now)}" for name, now in found.items())
    head = f'"triton": {json.dumps(version("triton"))}, "arch": {CHECKED_ARCH}'
    path.write_text(f'{{{head}, "kernels": {{\n  {rows}\n}}}}\n')
    print(f"sass: {len(found)} kernels, in {path}")
    for name, now in found.items():
        if now["spills"]:
            print(f"sass: {name} spills {now['spills']} bytes a thread")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the default configurations with the record")
    parser.add_argument("--record", action="store_true", help="write the record")
    archs = ", ".join(f"{gpu.arch}: {gpu.name}" for gpu in GPUS)
    parser.add_argument(
        "--arch", type=int, default=90, choices=[gpu.arch for gpu in GPUS], help=f"GPU ({archs}); default 90"
    )
    parser.add_argument("--kernel", choices=("loss", "topk"), default="loss", help="what to count; default loss")
    parser.add_argument(
        "--vocab", type=int, nargs="+", default=[128256], metavar="V", help="vocabulary sizes; default 128256"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float16"),
        default="bfloat16",
        help="of the logits; default bfloat16",
    )
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=TEMPERATURES, metavar="T",
        help="of the loss; default " + " ".join(f"{t:g}" for t in TEMPERATURES),
    )  # fmt: skip
    parser.add_argument(
        "--treatment", choices=("bucket", "sampled", "renormalize"), default="bucket",
        help="of the tail, in the loss; default bucket",
    )  # fmt: skip
    parser.add_argument("--k", type=int, default=64, help="top-k entries a row; default 64")
    parser.add_argument("--draws", type=int, default=0, help="tokens drawn from the tail a row, in top-k; default 0")
    parser.add_argument("--softcap", type=float, help="softcap of the logits; default none")
    args = parser.parse_args()
    if args.check or args.record:
        sys.exit(check() if args.check else write_record())
    dtype = getattr(torch, args.dtype)
    some: list[AnyCase] = []
    for vocab in args.vocab:
        if args.kernel == "loss":
            some += [LossCase(vocab, dtype, t, args.treatment, args.softcap) for t in args.temperature]
        else:
            some.append(TopKCase(vocab, dtype, args.k, args.draws, args.softcap))
    _bench(Table("cpu", "sass"), args.kernel, next(gpu for gpu in GPUS if gpu.arch == args.arch), some)


if __name__ == "__main__":
    main()
