"""The loss fused with the LM head, forward and backward, against its three matrix products and other packages.

    fastkd bench head [--device cuda] [--peers] [--full]

The limit is the time of the three products alone: logits, and the gradients of the hidden states and of the LM head; in
the same chunks on a CPU, whole on a GPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd import kd_loss, linear_kd_loss
from fastkd.bench import limits, peers
from fastkd.bench.cases import known_targets
from fastkd.bench.harness import peak_bytes, rotation
from fastkd.bench.head_model import H100, Rates, predict
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run, interleaved
from fastkd.kernels.loss.linear import default_chunk

FLOOR = "three products"
OURS = "linear_kd_loss"
# N, D, V, k
CPU_BASE = (512, 256, 16384, 64)
CPU_SIZES = (
    CPU_BASE, (512, 256, 4096, 64), (512, 256, 49152, 64), (128, 256, 16384, 64), (2048, 256, 16384, 64),
    (512, 64, 16384, 64), (512, 1024, 16384, 64), (512, 256, 16384, 16), (512, 256, 16384, 256),
)  # fmt: skip
CPU_MAIN = (1024, 576, 49152, 64)  # the published size
# and the minimum share of the products' speed
CUDA_SIZES = {
    (8192, 4096, 128256, 64): 0.93,
    (8192, 2048, 128256, 64): 0.88,
    (8192, 896, 151936, 64): 0.80,
    (8192, 576, 49152, 64): 0.72,
}
CUDA_MORE = ((2048, 2048, 128256, 64), (16384, 2048, 128256, 64), (8192, 2048, 128256, 16), (8192, 2048, 128256, 256))


class HeadProblem:
    """Hidden states and LM heads of one size, more of them than a cache holds; targets and labels."""

    temperature = 2.0

    def __init__(self, device: str, n: int, d: int, v: int, k: int, impl: str = "auto") -> None:
        self.device, self.n, self.d, self.v, self.k, self.impl = device, n, d, v, k, impl
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.targets, self.sampled = (known_targets(n, v, k, draws, device) for draws in (0, 16))
        self.labels = torch.randint(v, (n,), device=device)
        self.ring = rotation(self._inputs, (n + v) * d * self.dtype.itemsize, device)
        self.chunk = n if device == "cuda" else default_chunk(self.labels.device, v, 4)
        self._logits = torch.empty(min(self.chunk, n), v, device=device, dtype=self.dtype)
        self._d_hidden, self._d_weight = (torch.empty_like(x) for x in self.ring.inputs[0])

    def _inputs(self) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(self.n, self.d, device=self.device).to(self.dtype).requires_grad_()
        weight = (torch.randn(self.v, self.d, device=self.device) / self.d**0.5).to(self.dtype).requires_grad_()
        return hidden, weight

    def teacher(self) -> tuple[Tensor, Tensor]:
        """A teacher's hidden states and LM head, of the same sizes."""
        hidden, weight = self._inputs()
        return hidden.detach(), weight.detach()

    @torch.no_grad()
    def products(self) -> None:
        """The three products, which are the limit."""
        hidden, weight = self.ring.take()
        self._d_weight.zero_()
        for first in range(0, self.n, self.chunk):
            rows = slice(first, min(first + self.chunk, self.n))
            logits = self._logits[: rows.stop - first]
            torch.mm(hidden[rows], weight.t(), out=logits)
            torch.mm(logits, weight, out=self._d_hidden[rows])
            if self.chunk >= self.n:
                torch.mm(logits.t(), hidden, out=self._d_weight)
            else:
                self._d_weight.addmm_(logits.t(), hidden[rows])

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor | None]]:
        """A run of forward and backward of a loss on the next inputs. It returns the gradients."""

        def run() -> list[Tensor | None]:
            hidden, weight = self.ring.take()
            hidden.grad = weight.grad = None
            loss(hidden, weight).backward()
            found: list[Tensor | None] = [hidden.grad, weight.grad]
            hidden.grad = weight.grad = None  # a training would not hold the gradients of all inputs at once
            return found

        return run

    def ours(self, treatment: str = "bucket", chunk: int | None = None) -> Callable[[], list[Tensor | None]]:
        """linear_kd_loss."""
        targets = self.sampled if treatment == "sampled" else self.targets
        return self.step(
            lambda hidden, weight: (
                linear_kd_loss(
                    hidden,
                    weight,
                    targets,
                    self.labels,
                    treatment=treatment,
                    temperature=self.temperature,
                    chunk_tokens=chunk,
                    impl=self.impl,
                ).loss
            )
        )

    @property
    def name(self) -> str:
        """The title of the case."""
        return f"head: N={self.n} D={self.d} V={self.v} k={self.k} {str(self.dtype)[6:]} T={self.temperature:g}"

    @property
    def at(self) -> dict[str, float]:
        """The sizes."""
        return {"N": self.n, "D": self.d, "V": self.v, "k": self.k}


def size(
    table: Table,
    ask: RunConfig,
    n: int,
    d: int,
    v: int,
    k: int,
    *,
    compiled: bool = False,
    rounds: int = 7,
    bounds: dict[str, str] | None = None,
    chunks: tuple[int, ...] = (),
    impl: str = "auto",
) -> None:
    """Time and memory at one size. bounds: limits, by the row that they limit."""
    problem = HeadProblem(table.device, n, d, v, k, impl)
    chunked = f", products in chunks of {problem.chunk}" if problem.chunk < n else ""
    table.title(problem.name + chunked)
    bounds = bounds or {}
    ours: dict[str, Any] = {OURS: problem.ours(), f"{OURS}, sampled": problem.ours("sampled")}
    ours |= {f"{OURS}, chunks of {c}": problem.ours(chunk=c) for c in chunks}
    rest = peers.eager_on(problem.targets, problem.labels, problem.temperature)
    others = peers.own(
        table.device, peers.eager_head, lambda loss: problem.step(lambda hidden, weight: loss(hidden, weight, *rest)),
        compiled=compiled,
    )  # fmt: skip
    if ask.peers:
        others += peers.of_head(problem)
    elif compiled:
        others += peers.of_torch(problem)
    runs: dict[str, Run] = {FLOOR: problem.products, **ours}
    runs |= {peer.name: peer.run for peer in others if peer.run is not None}
    times = interleaved(runs, device=table.device, rounds=rounds, warmup=2 if rounds > 3 else 1)
    work = 6 * n * d * v / 1e9
    table.value(FLOOR, times.time(FLOOR).inverse(work), "TFLOP/s", line="limit", at=problem.at)
    if table.device == "cuda":
        rates = Rates(table.limits.get("TFLOP/s", H100.product), table.limits.get("GB/s", 1e3 * H100.copy) / 1e3)
        paper(table, n, d, v, rates, "this machine's rates")
    for name in list(runs)[1:]:
        table.ratio(
            name, times.ratio(name, FLOOR), FLOOR, bounds.get(name, ""), value=times.time(name).inverse(work),
            unit="TFLOP/s", line=name, at=problem.at, note=f"{times[name]:.2f} ms",
            better="lower" if name in ours else "",
        )  # fmt: skip
    peaks = {name: peak_bytes(run, table.device) for name, run in runs.items() if name != FLOOR}  # type: ignore[arg-type]
    for peer in others:
        if peer.run is None:
            table.absent(peer.name, peer.why, line=peer.name, at=problem.at)
            continue
        table.ratio(
            f"{OURS} against {peer.name}", times.ratio(OURS, peer.name), peer.name, bounds.get(f"/{peer.name}", "")
        )
    for name, peak in peaks.items():
        table.ratio(
            f"{name}: peak memory beyond inputs and gradients", peak / (n * v * problem.dtype.itemsize), "the logits",
            value=peak / 2**20, unit="MiB", line=name, at=problem.at, better="lower" if name in ours else "",
        )  # fmt: skip
    table.ratio(f"{OURS}: peak memory against eager", peaks[OURS] / peaks["eager"], "eager", bounds.get("memory", ""))
    if table.device == "cuda":
        allowed = 2 * 2048 * v + 4 * v * d + 64e6
        table.ratio(f"{OURS}: peak memory", peaks[OURS] / allowed, "2CV + 4VD + 64 MB", "<= 1.0")


def two_streams(table: Table, n: int, d: int, v: int) -> None:
    """The loss of one chunk beside the next chunk's product, on a second stream, over one after the other (GPU)."""
    problem = HeadProblem(table.device, n, d, v, 64)
    (hidden, weight), logits = problem.ring.take(), problem._logits
    with torch.no_grad():
        given = torch.mm(hidden, weight.t())
    side = torch.cuda.Stream()

    def product() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=logits)

    def loss() -> None:
        leaf = given.detach().requires_grad_()
        kd_loss(leaf, problem.targets, problem.labels, temperature=2.0, treatment="bucket", inplace=True)

    def together() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss()
        product()
        torch.cuda.current_stream().wait_stream(side)

    def in_turn() -> None:
        product()
        loss()

    table.title(f"a chunk's loss beside the next product: C={n} D={d} V={v}")
    one = "one after the other"
    runs: dict[str, Run] = {one: in_turn, "on two streams": together, "the product alone": product}
    times = interleaved(runs, device=table.device, rounds=15)
    for name in list(runs)[1:]:
        table.ratio(name, times.ratio(name, one), one, better="", note=f"{times[name]:.2f} ms")


def paper(table: Table, n: int, d: int, v: int, rates: Rates, of: str) -> None:
    """The ratio that `head_model` predicts."""
    found = predict(n, d, v, rates)
    table.ratio(
        f"{OURS}: predicted", 1 / found.share, FLOOR, better="", value=found.total, unit="ms",
        note=f"a prediction from {of}: {found}",
    )  # fmt: skip


def on_paper(table: Table) -> None:
    """Predictions for an H100, wherever this runs."""
    table.title("predicted for an H100 (head_model.py), bfloat16: not measured")
    for n, d, v, _ in CUDA_SIZES:
        found = predict(n, d, v)
        table.ratio(
            f"{OURS}: predicted N={n} D={d} V={v}", 1 / found.share, FLOOR, better="", value=found.total, unit="ms",
            note=f"share of the products {found.share:.3f}; {found}",
        )  # fmt: skip


def cases(ask: RunConfig, chunks: tuple[int, ...] = ()) -> Sequence[Case]:
    """The limits, then all sizes. chunks: chunk sizes of linear_kd_loss to try as well."""
    found = [Case("on paper", on_paper)] if ask.device != "cuda" else []
    found.append(Case("limits", lambda table: limits.measure(table, "product", "copy")))

    def add(sizes: tuple[int, int, int, int], **more: Any) -> None:
        n, d, v, k = sizes
        run = partial(size, ask=ask, n=n, d=d, v=v, k=k, chunks=chunks, **more)
        found.append(Case(f"N={n} D={d} V={v} k={k}", run))

    if ask.device == "cuda":
        rounds = ask.times(5, 7)
        for sizes, least in CUDA_SIZES.items():
            bound = f"<= {1 / least:.3f}"
            add(sizes, compiled=True, rounds=rounds, bounds={OURS: bound, f"{OURS}, sampled": bound})
        for sizes in CUDA_MORE if ask.full else ():
            add(sizes, compiled=True, rounds=rounds)
        return found
    bounds = {OURS: "<= 1.15", "/eager": "<= 0.75", "memory": "<= 0.15"}
    add(CPU_MAIN, rounds=ask.times(5, 11), bounds=bounds, compiled=ask.full)
    for sizes in CPU_SIZES:
        add(sizes, rounds=ask.times(5, 11), compiled=ask.full or sizes == CPU_BASE)
    return found
