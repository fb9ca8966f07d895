"""The steps of `gpu_day.py`: what is checked and measured, at which sizes, and against which bounds."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastkd.bench import bench_head, bench_loss, bench_topk, limits, predicted, tune_loss
from fastkd.bench.cases import GRID, known_targets, student_logits
from fastkd.bench.first_day import Step, Unfinished, WrongResult
from fastkd.bench.hardware import cores
from fastkd.bench.suites import RunConfig
from fastkd.bench.table import Table
from fastkd.kernels import SparseTargets, kd_loss, linear_kd_loss, topk_targets

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(__file__).with_name("gpu_day.py")
TEST_SECONDS = 200.0
# of the smoke test, relative: arithmetic in float32, and results that are stored in bfloat16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a day. rows: positions. heads: N, D, V, k. tests: files of tests/kernels; None: all."""

    device: str = "cuda"
    impl: str = "auto"
    rows: int = 8192
    vocabularies: tuple[int, ...] = (32000, 49152, 50257, 128256, 151936, 262144)
    topk: tuple[int, ...] = (49152, 128256, 151936)
    k: int = 64
    heads: tuple[tuple[int, int, int, int], ...] = tuple(bench_head.CUDA_SIZES)
    tuned: tuple[int, ...] = (49152, 128256)
    smoke: tuple[int, int, int] = (64, 49152, 50257)  # positions, an even and an odd vocabulary
    tests: tuple[str, ...] | None = None
    rounds: int = 7

    @classmethod
    def toy(cls) -> "Sizes":
        """For a CPU, interpreted."""
        return cls(
            device="cpu", impl="triton", rows=1, vocabularies=(128,), topk=(128,), k=4, heads=((2, 8, 128, 4),),
            tuned=(128,), smoke=(2, 128, 101), tests=("test_gpu.py",), rounds=1,
        )  # fmt: skip

    @property
    def is_toy(self) -> bool:
        return self.device == "cpu"

    @property
    def warm(self) -> "Sizes":
        """The same kernels over few rows, once."""
        return replace(self, rows=16, rounds=1)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What is measured first, and the other one. (The interpreter truncates to bfloat16.)"""
        return (torch.float32,) if self.is_toy else (torch.bfloat16, torch.float32)

    @property
    def config(self) -> RunConfig:
        """For the suites."""
        return RunConfig(self.device, full=True, rounds=self.rounds)


def steps_of(sizes: Sizes, *, peers: bool = False) -> list[Step]:
    """All steps in order, or those of other packages."""
    if peers:
        return list(_peers(sizes))
    found = [Step("smoke", partial(smoke, sizes=sizes), seconds=30, always=True, stop=True)]
    measured, tuning = [*_loss(sizes), *_head(sizes), *_topk(sizes)], list(_tuning(sizes))
    if not sizes.is_toy:
        found.append(_compilation("compile", measured, 60))
        tuning.insert(0, _compilation("compile for tuning", tuning[:], 90))
    found.append(Step("tests", partial(gpu_tests, sizes=sizes), seconds=60, in_parts=True))
    found.append(Step("limits", lambda table: limits.measure(table, "copy", "product"), "loss", 15))
    return found + measured + tuning


def _compilation(name: str, steps: list[Step], seconds: float) -> Step:
    some = [step for step in steps if step.warm is not None]
    return Step(name, partial(compile_all, steps=some), seconds=seconds, before=tuple(step.name for step in some))


def add_predictions(table: Table, first: int, v: int, sizes: Sizes) -> None:
    """What the static model says, in the notes of the rows from `first` on."""
    gpu, dtype = predicted.gpu_named(str(table.hardware["name"])), str(sizes.dtypes[0])[6:]
    table.rows[first:] = [predicted.beside(row, gpu, v, dtype) for row in table.rows[first:]]


def _loss(sizes: Sizes) -> Iterator[Step]:
    def measure(table: Table, sizes: Sizes, v: int, certain: bool) -> None:
        first = len(table.rows)
        bench_loss.student(table, sizes.config, sizes.rows, v, certain=certain, impl=sizes.impl)
        if not certain:
            add_predictions(table, first, v, sizes)

    for v in sizes.vocabularies:
        for certain in (False,) if sizes.is_toy else (False, True):
            run = partial(measure, v=v, certain=certain)
            # one that is certain runs the same kernels
            warm = None if certain else partial(run, sizes=sizes.warm)
            name = f"loss V={v}, {'certain' if certain else 'fresh'}"
            yield Step(name, partial(run, sizes=sizes), "loss", 8, warm)


def _head(sizes: Sizes) -> Iterator[Step]:
    def measure(table: Table, n: int, d: int, v: int, k: int, config: RunConfig) -> None:
        least = bench_head.CUDA_SIZES.get((n, d, v, k))
        bound = f"<= {1 / least:.3f}" if least else ""
        bounds = {bench_head.OURS: bound, f"{bench_head.OURS}, sampled": bound}
        bench_head.size(table, config, n, d, v, k, rounds=config.times(5, 7), bounds=bounds, impl=sizes.impl)

    for n, d, v, k in sizes.heads:
        run = partial(measure, d=d, v=v, k=k)
        warm = partial(run, n=16, config=sizes.warm.config)
        yield Step(f"head D={d} V={v}", partial(run, n=n, config=sizes.config), "head", 20, warm)
    if not sizes.is_toy:
        n, d, v, k = sizes.heads[0]
        yield Step("two streams", partial(bench_head.two_streams, n=2048, d=d, v=v), "head", 10)


def _topk(sizes: Sizes) -> Iterator[Step]:
    def measure(table: Table, v: int, sizes: Sizes) -> None:
        first = len(table.rows)
        bench_topk.bench_logits(table, sizes.rows, v, sizes.dtypes[0], sizes.rounds, sizes.k, sizes.impl)
        add_predictions(table, first, v, sizes)

    for v in sizes.topk:
        run = partial(measure, v=v)
        yield Step(f"topk V={v}", partial(run, sizes=sizes), "topk", 20, partial(run, sizes=sizes.warm))


def _tuning(sizes: Sizes) -> Iterator[Step]:
    for v in sizes.tuned:
        run = partial(
            tune_loss.tune, v=v, certain=False, rounds=min(sizes.rounds, 5), impl=sizes.impl,
            most=2 if sizes.is_toy else None,
        )  # fmt: skip
        warm = partial(run, n=16)
        yield Step(f"tune loss V={v}", partial(run, n=sizes.rows), "loss", 30, warm)
    if sizes.is_toy:
        return
    n, d, v, k = sizes.heads[1]
    run = partial(bench_head.size, ask=sizes.config, n=n, d=d, v=v, k=k, rounds=5, chunks=(1024, 2048, 3072, 6144, n))
    yield Step(f"tune head D={d} V={v}", run, "head", 25)
    yield Step("tune topk", bench_topk.tune, "topk", 60)


def _peers(sizes: Sizes) -> Iterator[Step]:
    config = replace(sizes.config, peers=True)
    for v in sizes.vocabularies if sizes.is_toy else sizes.topk:
        run = partial(bench_loss.size, ask=config, n=sizes.rows, v=v, k=sizes.k, compiled=not sizes.is_toy)
        yield Step(f"peers of the loss V={v}", run, "loss", 60)
    for n, d, v, k in sizes.heads:
        head = partial(bench_head.size, ask=config, n=n, d=d, v=v, k=k, rounds=sizes.rounds, compiled=not sizes.is_toy)
        yield Step(f"peers of the head D={d} V={v}", head, "head", 90)


def smoke(table: Table, sizes: Sizes) -> None:
    """The kernels against float64 on the device: losses, gradients, top-k entries, tails and draws."""
    n, even, odd = sizes.smoke
    torch.manual_seed(0)
    wrong: list[str] = []
    for dtype in sizes.dtypes:
        for v, settings in (
            (even, {"temperature": 1.0, "treatment": "bucket"}),
            (even, {"temperature": 2.0, "treatment": "bucket"}),
            (odd, {"temperature": 3.3, "treatment": "sampled"}),
            (odd, {"temperature": 2.0, "divergence": "reverse_kl"}),
        ):
            for certain in (False,) if sizes.is_toy else (False, True):
                what = f"V={v} {str(dtype)[6:]} {'certain' if certain else 'fresh'} {settings}"
                wrong += [f"{part}: {what}" for part in _wrong_losses(sizes, n, v, dtype, certain, settings)]
        wrong += [f"linear_kd_loss, {part}: V={odd} {str(dtype)[6:]}" for part in _wrong_head(sizes, n, odd, dtype)]
        for v in (even, odd):
            wrong += [f"topk_targets, {part}: V={v} {str(dtype)[6:]}" for part in _wrong_topk(sizes, n, v, dtype)]
    if wrong:
        raise WrongResult(f"{len(wrong)} results differ from float64: " + "; ".join(wrong[:8]))


def _targets(n: int, v: int, sizes: Sizes, draws: int) -> SparseTargets:
    return known_targets(n, v, min(sizes.k, v // 4), draws, sizes.device)


def _far(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether they differ by more, relative to the norm of what is expected; NaN does."""
    return not float((found.double() - expected.double()).norm()) <= tolerance * max(float(expected.norm()), 1e-6)


def _wrong_losses(
    sizes: Sizes, n: int, v: int, dtype: torch.dtype, certain: bool, settings: dict[str, object]
) -> Iterator[str]:
    targets = _targets(n, v, sizes, 4 if settings.get("treatment") == "sampled" else 0)
    labels = torch.randint(v, (n,), device=sizes.device)
    labels[0] = targets.ids[0, 0]
    logits = student_logits(n, v, targets, sizes.device, dtype, certain=certain)

    def losses(impl: str, inplace: bool) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        out = kd_loss(leaf * 1, targets, labels, impl=impl, inplace=inplace, **settings)  # type: ignore[arg-type]
        out.loss.backward()
        assert leaf.grad is not None
        return torch.stack([x.detach() for x in out]), leaf.grad

    truth, gradient = losses("reference", False)
    for inplace in (True, False):
        place = "in place" if inplace else "out of place"
        found, found_gradient = losses("triton", inplace)
        if _far(found, truth, TOLERANCE[torch.float32]):
            yield f"loss {place} {found.tolist()} for {truth.tolist()}"
        if _far(found_gradient, gradient, TOLERANCE[dtype]):
            yield f"gradient {place}"
    evaluated = torch.stack(list(kd_loss(logits, targets, labels, impl="triton", **settings)))  # type: ignore[arg-type]
    if _far(evaluated, truth, TOLERANCE[torch.float32]):
        yield "evaluation"


def _wrong_head(sizes: Sizes, n: int, v: int, dtype: torch.dtype) -> Iterator[str]:
    targets, labels = _targets(n, v, sizes, 0), torch.randint(v, (n,), device=sizes.device)
    width = 16 if sizes.is_toy else 384  # large enough for a weight's gradient in bfloat16
    hidden, weight = (torch.randn(rows, width, device=sizes.device) for rows in (n, v))

    def losses(impl: str, work: torch.dtype, chunk: int) -> list[Tensor]:
        h, w = (x.to(dtype).to(work).requires_grad_() for x in (hidden, weight / width**0.5))
        out = linear_kd_loss(h, w, targets, labels, impl=impl, temperature=2.0, chunk_tokens=chunk)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, (h, w))]

    truth = losses("reference", torch.float64, n)
    # logits in bfloat16 are rounded before the loss: a few times the tolerance of a result that is
    tolerance = 4 * TOLERANCE[dtype] if dtype == torch.bfloat16 else TOLERANCE[dtype]
    for chunk in (n, max(1, n // 3)):
        for part, one, other in zip(("loss", "hidden", "weight"), losses("triton", dtype, chunk), truth, strict=True):
            if _far(one, other, tolerance):
                yield f"{part} in chunks of {chunk}"


def _wrong_topk(sizes: Sizes, n: int, v: int, dtype: torch.dtype) -> Iterator[str]:
    logits = torch.randn(n, v, device=sizes.device).mul_(3).to(dtype)
    found = topk_targets(logits, sizes.k, temperatures=GRID, draws=4, impl="triton")
    twin = topk_targets(logits.cpu(), sizes.k, temperatures=GRID, draws=4, impl="torch")
    log_p = logits.double().log_softmax(1)
    best = log_p.sort(dim=1, descending=True, stable=True).indices[:, : sizes.k]
    if not torch.equal(found.ids.cpu(), twin.ids):
        yield "ids"
    if not torch.equal(found.ids[:, : sizes.k].long(), best):
        yield "ids of the top k"
    if found.draws is None or twin.draws is None or not torch.equal(found.draws.cpu(), twin.draws):
        yield "draws"
    if _far(found.logprobs[:, : sizes.k], log_p.gather(1, best), TOLERANCE[torch.float32]):
        yield "log-probabilities"
    rest = log_p.scatter(1, best, float("-inf"))
    tails = torch.stack([torch.logsumexp(rest / t, 1) for t in GRID], 1)
    if _far(found.tail, tails, TOLERANCE[torch.float32]):
        yield "tails"


def processes(
    commands: dict[str, list[str]], ended: Callable[[str, int, str], None], most: float = float("inf")
) -> list[str]:
    """Run commands, as many at once as there are cores less one, for at most `most` seconds.

    ended: is told the name, the status and the output of each. Returns the names of those that did not end; whatever
    still runs is stopped, also if this is left early.
    """
    begun, waiting, running = time.monotonic(), list(commands), dict[str, subprocess.Popen[str]]()
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / str(number) for number, name in enumerate(commands)}
        try:
            while (waiting or running) and time.monotonic() - begun < most:
                while waiting and len(running) < max(1, cores() - 1):
                    name = waiting.pop(0)
                    with outputs[name].open("w") as out:
                        running[name] = subprocess.Popen(
                            commands[name], stdout=out, stderr=subprocess.STDOUT, text=True, cwd=ROOT
                        )
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    ended(name, running.pop(name).returncode, outputs[name].read_text(errors="replace"))
                time.sleep(0.05)
            return [*running, *waiting]
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def compile_all(table: Table, steps: list[Step]) -> None:
    """Compile what the steps launch that are not done, on all cores, into Triton's cache: one after another would take
    minutes."""
    done = {row.name for row in table.rows if row.case == "steps"}
    failed: list[str] = []

    def ended(name: str, status: int, output: str) -> None:
        if status:
            failed.append(f"{name}: {output.strip().splitlines()[-1:]}")

    processes({s.name: [sys.executable, str(SCRIPT), "--warm", s.name] for s in steps if s.name not in done}, ended)
    if failed:
        raise WrongResult("; ".join(failed))


def gpu_tests(table: Table, sizes: Sizes) -> None:
    """The tests of kernels that need a GPU, a process for each file, for at most TEST_SECONDS."""
    folder = ROOT / "tests" / "kernels"
    done = {row.name for row in table.rows if row.case == "GPU tests"}
    files = [path.name for path in sorted(folder.glob("test_*.py")) if sizes.tests is None or path.name in sizes.tests]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    commands = {
        name: [sys.executable, "-m", "pytest", *options, str(folder / name)] for name in files if name not in done
    }
    failed: list[str] = []

    def ended(name: str, status: int, output: str) -> None:
        lines = output.strip().splitlines() or [""]
        if status == 5:  # none of its tests needs a GPU
            return
        table.title("GPU tests")
        if status == 0 and "skipped" in lines[-1] and "passed" not in lines[-1]:
            table.absent(name, lines[-1])  # nothing ran, which is no "ok"
            return
        table.value(name, float(status != 0), "failed", "<= 0", note=lines[-1])
        if status:
            print("\n".join(lines[-60:]), file=sys.stderr, flush=True)
            failed.append(f"{name}: {lines[-1]}")

    left = processes(commands, ended, TEST_SECONDS)
    if left:
        raise Unfinished(", ".join(left))
    if any(row.case == "GPU tests" and row.verdict == "MISSED" for row in table.rows):
        raise WrongResult("; ".join(failed) or "as in an earlier call")
