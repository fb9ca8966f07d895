"""Instructions a logit of the loss's and the top-k's kernels, and the time they would take: a model, not a measurement.

    fastkd bench sass [--full]
    python -m fastkd.bench.bench_sass --arch 90 --vocab 128256 --kernel loss      # while writing a kernel

Needs triton, no GPU.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastkd.bench.compiled import Launch, at_temperature, recorded
from fastkd.bench.sass import Count, Program, disassemble, resources
from fastkd.kernels import SparseTargets, TopKConfig, kd_loss, linear_kd_loss, topk_targets

LANES = 32
VOCABULARIES = (32000, 49152, 50257, 128256, 151936, 262144)
TEMPERATURES = (1.0, 2.0, 3.3, 4.0)
GRID = (1.0, 1.5, 2.0, 4.0)
SOFTCAP = 30.0
ROWS = 8  # of the call whose launches are recorded


@dataclass(frozen=True)
class Gpu:
    """What a time is computed from. clock: GHz under load. copy: TB/s of a large copy, read plus written.
    special: MUFU results an SM a clock."""

    name: str
    arch: int
    sms: int
    clock: float
    copy: float
    special: int = 16
    slots: int = 128

    def issue(self, instructions: float) -> float:
        """Picoseconds to issue so many instructions of one thread each."""
        return instructions / (self.sms * self.slots * self.clock * 1e-3)

    def functions(self, results: float) -> float:
        """Picoseconds for so many MUFU results."""
        return results / (self.sms * self.special * self.clock * 1e-3)

    def memory(self, size: float) -> float:
        """Picoseconds to move so many bytes."""
        return size / self.copy


# Clocks: what the cards hold under load. Copies: H100 as measured (DESIGN.md); the others' share of the peak rate is
# taken to be the same, 0.9.
GPUS = (
    Gpu("H100", 90, 132, 1.755, 3.0),
    Gpu("B200", 100, 148, 1.85, 7.2),
    Gpu("A100", 80, 108, 1.41, 1.8),
)


@dataclass(frozen=True)
class Pass:
    """A part of a kernel. a_logit: what is executed for a logit."""

    name: str
    a_logit: Count


@dataclass(frozen=True)
class Counted:
    """A launch. registers: a thread's. stack: bytes of spills a thread. passes: add up to the whole kernel."""

    kernel: str
    warps: int
    registers: int
    stack: int
    passes: tuple[Pass, ...]

    @property
    def total(self) -> Count:
        """Of all passes."""
        return sum((part.a_logit for part in self.passes), Count())


def _targets(rows: int, vocab: int, k: int, draws: int) -> SparseTargets:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return SparseTargets(
        ids=empty(rows, k + draws, dtype=torch.int32), logprobs=empty(rows, k + draws), tail=empty(rows, len(GRID)),
        outcomes=empty(rows, dtype=torch.int32), vocab_size=vocab,
        draws=empty(rows, k + draws, dtype=torch.int32) if draws else None, temperatures=GRID,
    )  # fmt: skip


def loss_launch(
    vocab: int, dtype: torch.dtype, arch: int | str, *, divergence: str = "forward_kl", treatment: str = "bucket",
    softcap: float | None = None, k: int = 64,
) -> Launch:  # fmt: skip
    """The launch of the loss's kernel. With a softcap: of the loss fused with the LM head, which alone has one."""
    draws = 16 if treatment == "sampled" else 0
    targets = _targets(ROWS, vocab, k - draws, draws)
    labels = torch.empty(ROWS, dtype=torch.int64, device="meta")
    settings = {"divergence": divergence, "treatment": treatment, "temperature": 2.0, "impl": "triton"}

    def run() -> None:
        if softcap is None:
            logits = torch.empty(ROWS, vocab, dtype=dtype, device="meta", requires_grad=True)
            kd_loss(logits, targets, labels, inplace=True, **settings)
        else:
            hidden, weight = (torch.empty(n, 64, dtype=dtype, device="meta", requires_grad=True) for n in (ROWS, vocab))
            linear_kd_loss(hidden, weight, targets, labels, softcap=softcap, **settings)

    return recorded(run, arch, last="loss_kernel")[-1]


def count_loss(launch: Launch, arch: int, temperature: float) -> Counted:
    """Pass 1, the write pass, and what a row costs besides, for a student that is not certain of its answer."""
    built = launch.compile(arch)
    used = resources(built.asm["cubin"])
    fixed = at_temperature(built, temperature, launch, arch)
    program = Program(disassemble(fixed.asm["cubin"]))
    x, vocab = launch.values["x_ptr"], launch.values["V"]
    threads = built.metadata.num_warps * LANES
    loops = [loop for loop in program.loops if loop.has_exponentials and loop.bytes("LDG")]
    read = next(loop for loop in loops if not loop.bytes("STG"))
    write = next(loop for loop in reversed(loops) if loop.bytes("STG"))
    trips = [math.ceil(vocab * x.itemsize / (threads * loop.bytes("LDG"))) for loop in (read, write)]
    rest, each = program.through([(read, trips[0]), (write, trips[1])])
    share = threads / vocab
    parts = [Pass(name, c * (n * share)) for name, c, n in zip(("pass 1", "write"), each, trips, strict=True)]
    return Counted(
        launch.name, built.metadata.num_warps, used["REG"], used["STACK"], (*parts, Pass("rest", rest * share))
    )


def topk_launches(
    vocab: int, dtype: torch.dtype, arch: int | str, *, k: int = 64, draws: int = 0, mass: float | None = None,
    softcap: float | None = None, temperatures: tuple[float, ...] = GRID,
) -> list[Launch]:  # fmt: skip
    """The launches of `topk_targets`."""
    config = TopKConfig(k=k, draws=draws, mass=mass, temperatures=temperatures)

    def run() -> None:
        topk_targets(
            torch.empty(ROWS, vocab, dtype=dtype, device="meta"), config=config, softcap=softcap, impl="triton"
        )

    return recorded(run, arch)


def count_kernel(launch: Launch, arch: int) -> Counted:
    """The shortest way through a kernel of top-k, loops once."""
    built = launch.compile(arch)
    used = resources(built.asm["cubin"])
    program = Program(disassemble(built.asm["cubin"]))
    loops = [(loop, 1.0) for loop in program.loops if loop.bytes("LDG")]
    rest, each = program.through(loops)
    warps = built.metadata.num_warps
    share = warps * LANES * launch.programs / ROWS
    whole = sum(each, rest) * share
    return Counted(launch.name, warps, used["REG"], used["STACK"], (Pass("all", whole),))


def show_loss(arch: int, vocabs: Sequence[int], dtype: torch.dtype, treatment: str, softcap: float | None) -> None:
    gpu = next(g for g in GPUS if g.arch == arch)
    for vocab in vocabs:
        launch = loss_launch(vocab, dtype, arch, treatment=treatment, softcap=softcap)
        print(f"V={vocab} {str(dtype)[6:]} {treatment} softcap={softcap} {dict(launch.options)}")
        for t in TEMPERATURES:
            found = count_loss(launch, arch, t)
            floor = gpu.memory(2 * dtype.itemsize)
            parts = "  ".join(f"{p.name} {p.a_logit.issued:.2f}" for p in found.passes)
            functions = gpu.functions(found.total.special) / floor
            print(
                f"  T={t:<4} regs {found.registers} spill bytes {found.stack}  instructions a logit: {parts}  "
                f"exponentials {found.total.exponentials:.2f}  {gpu.name}: issue/floor "
                f"{gpu.issue(found.total.issued) / floor:.3f} MUFU/floor {functions:.3f}",
                flush=True,
            )


def show_topk(arch: int, vocabs: Sequence[int], dtype: torch.dtype, softcap: float | None) -> None:
    gpu = next(g for g in GPUS if g.arch == arch)
    for vocab in vocabs:
        launches = topk_launches(vocab, dtype, arch, draws=16, softcap=softcap)
        floor = gpu.memory(dtype.itemsize)
        print(f"V={vocab} {str(dtype)[6:]} k=64 draws=16 softcap={softcap}")
        for launch in launches:
            found = count_kernel(launch, arch)
            a_logit = found.total * (1 / vocab)
            print(
                f"  {launch.name:<10} warps {found.warps} regs {found.registers} spill bytes {found.stack}  "
                f"instructions a logit {a_logit.issued:.2f} MUFU {a_logit.special:.2f}  {gpu.name}: issue/floor "
                f"{gpu.issue(a_logit.issued) / floor:.3f} MUFU/floor {gpu.functions(a_logit.special) / floor:.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, choices=[g.arch for g in GPUS])
    parser.add_argument("--vocab", type=int, nargs="+", default=[128256])
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--kernel", choices=("loss", "topk"), default="loss")
    parser.add_argument("--treatment", default="bucket")
    parser.add_argument("--softcap", type=float)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.kernel == "loss":
        show_loss(args.arch, args.vocab, dtype, args.treatment, args.softcap)
    else:
        show_topk(args.arch, args.vocab, dtype, args.softcap)


if __name__ == "__main__":
    main()
