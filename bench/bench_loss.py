"""The loss against its limits: the memory's or the matrix products' floor, and what others use instead.

    .venv/bin/python bench/bench_loss.py --device cpu
    .venv/bin/python bench/bench_loss.py --device cuda [--sections logits linear topk] [--tune] [--json results.json]

Every figure is a ratio within one run. Lines say `ok` or `MISSED`; nothing here fails.
"""

import argparse
from collections.abc import Callable
from typing import Any

import bench_topk
import torch
from cases import eager_kd_loss, known_targets, student_logits
from harness import Table, interleaved, peak_bytes
from torch import Tensor

from fastkd import kd_loss, linear_kd_loss

CELLS = (
    ("forward_kl", "bucket"),
    ("forward_kl", "sampled"),
    ("forward_kl", "renormalize"),
    ("reverse_kl", "bucket"),
    ("jsd", "bucket"),
    ("skew_kl", "bucket"),
    ("tvd", "bucket"),
)


class LogitsCase:
    """Buffers for one width: the logits, a pristine copy to restore them from, targets and labels."""

    def __init__(self, n: int, v: int, *, certain: bool = False) -> None:
        self.targets = known_targets(n, v, 64, 16, "cuda")
        self.bucket = known_targets(n, v, 64, 0, "cuda")
        self.pristine = student_logits(n, v, self.bucket, "cuda", torch.bfloat16, certain=certain)
        self.work = self.pristine.clone()
        self.other = torch.empty_like(self.work)
        self.labels = torch.randint(v, (n,), device="cuda")

    def restore(self) -> None:
        self.work.copy_(self.pristine)

    def run(self, upstream: float = 1.0, inplace: bool = True, **settings: Any) -> Callable[[], object]:
        targets = self.targets if settings.get("treatment") == "sampled" else self.bucket
        one = torch.tensor(upstream, device="cuda")

        def step() -> None:
            leaf = self.work.detach().requires_grad_()
            kd_loss(leaf, targets, self.labels, inplace=inplace, **settings).loss.backward(one)

        return step


def logits_cuda(table: Table, rounds: int, peers: bool) -> None:
    """The loss on given logits: N = 8192, k = 64, bfloat16."""
    n = 8192
    for v in (49152, 128256, 151936):
        table.title(f"logits: N={n} V={v} k=64 bf16, over the time of one read and one write (1R1W)")
        case = LogitsCase(n, v)
        runs: dict[str, Callable[[], object]] = {"1R1W": lambda c=case: c.other.copy_(c.work)}
        runs["2R1W"] = lambda c=case: torch.add(c.work, c.pristine, out=c.other)
        limits = {}
        at_2 = "<= 1.10" if v == 49152 else "<= 1.20"
        for divergence, treatment in CELLS:
            for t in (1.0, 2.0, 3.3) if divergence == "forward_kl" else (2.0,):
                name = f"in place {divergence} {treatment} T={t}"
                runs[name] = case.run(divergence=divergence, treatment=treatment, temperature=t)
                limits[name] = at_2 if t == 2.0 else "<= 1.40"
        runs["in place, upstream 3"] = case.run(3.0, temperature=2.0, treatment="bucket")
        limits["in place, upstream 3"] = "<= 2.20"
        times = interleaved(runs, device="cuda", rounds=rounds, before=dict.fromkeys(runs, case.restore))
        floor = times["1R1W"]
        table.row("1R1W, ms", floor)
        for name, limit in limits.items():
            table.row(name, times[name] / floor, limit)
        for divergence, _ in CELLS[3:]:
            name = f"in place {divergence} bucket T=2.0"
            table.row(
                f"{divergence} / forward_kl bucket", times[name] / times["in place forward_kl bucket T=2.0"], "<= 1.15"
            )
        out = {"2R1W": runs["2R1W"]}
        for t in (1.0, 2.0, 3.3):
            out[f"out of place bucket T={t}"] = case.run(inplace=False, treatment="bucket", temperature=t)
        times2 = interleaved(out, device="cuda", rounds=rounds, before=dict.fromkeys(out, case.restore))
        for name in list(out)[1:]:
            table.row(f"{name}, over 2R1W", times2[name] / times2["2R1W"], "<= 1.25")
        if peers:
            _peers_logits(table, case, times["in place forward_kl bucket T=2.0"], rounds=max(3, rounds // 3))
        del case, runs, out
        torch.cuda.empty_cache()
        certain = LogitsCase(n, v, certain=True)
        runs = {"1R1W": lambda c=certain: c.other.copy_(c.work)}
        for t in (1.0, 2.0):
            runs[f"certain student, in place bucket T={t}"] = certain.run(treatment="bucket", temperature=t)
            runs[f"certain student, out of place bucket T={t}"] = certain.run(
                inplace=False, treatment="bucket", temperature=t
            )
        runs["certain student, in place sampled T=1.0"] = certain.run(treatment="sampled")
        times = interleaved(runs, device="cuda", rounds=rounds, before=dict.fromkeys(runs, certain.restore))
        for name in list(runs)[1:]:
            table.row(name, times[name] / times["1R1W"])
        del certain, runs
        torch.cuda.empty_cache()


def _peers_logits(table: Table, case: LogitsCase, ours: float, rounds: int) -> None:
    at = case.bucket.at(2.0, "bucket")
    ids = case.bucket.ids.long()

    def dense(function: Callable[..., Tensor]) -> Callable[[], object]:
        def step() -> None:
            leaf = case.work.detach().requires_grad_()
            function(leaf, ids, at.log_q, at.log_q_tail, case.labels, 0.5, 2.0).backward()

        return step

    torch._dynamo.reset()
    runs = {"torch.compile of the same loss": dense(torch.compile(eager_kd_loss)), "eager": dense(eager_kd_loss)}
    limits = {"torch.compile of the same loss": ">= 3.0", "eager": ""}
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        print("  (liger-kernel is not installed: not compared)")
    else:

        def liger() -> None:
            leaf = case.work.detach().requires_grad_()
            liger_cross_entropy(leaf, case.labels).backward()

        runs["Liger cross-entropy alone"] = liger
    times = interleaved(runs, device="cuda", rounds=rounds, before=dict.fromkeys(runs, case.restore))
    for name, limit in limits.items():
        table.row(f"times faster than {name}", times[name] / ours, limit, f"{times[name]:.2f} ms")
    if "Liger cross-entropy alone" in times:
        liger_ms = times["Liger cross-entropy alone"]
        table.row("over Liger cross-entropy alone", ours / liger_ms, "<= 0.6", f"{liger_ms:.2f} ms")


def linear_cuda(table: Table, rounds: int, peers: bool, chunks: tuple[int | None, ...] = (None,)) -> None:
    """The fused head: N = 8192, k = 64, bfloat16, all three gradients' products, dW accumulated in float32."""
    n = 8192
    shapes = ((4096, 128256, 0.93), (2048, 128256, 0.88), (896, 151936, 0.80), (576, 49152, 0.72))
    for d, v, least in shapes:
        table.title(f"fused head: N={n} D={d} V={v} k=64 bf16")
        targets = known_targets(n, v, 64, 16, "cuda")
        labels = torch.randint(v, (n,), device="cuda")
        hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(v, d, device="cuda") / d**0.5).bfloat16().requires_grad_()
        g_logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)

        def gemms(hidden: Tensor = hidden, weight: Tensor = weight, g: Tensor = g_logits) -> None:
            with torch.no_grad():
                torch.mm(hidden, weight.t(), out=g)
                torch.mm(g, weight)
                torch.mm(g.t(), hidden)

        runs: dict[str, Callable[[], object]] = {"three GEMMs": gemms}
        for chunk in chunks:
            for treatment in ("bucket", "sampled"):

                def step(
                    treatment: str = treatment,
                    chunk: int | None = chunk,
                    hidden: Tensor = hidden,
                    weight: Tensor = weight,
                    targets: Any = targets,
                    labels: Tensor = labels,
                ) -> list[Tensor]:
                    hidden.grad = weight.grad = None
                    linear_kd_loss(
                        hidden, weight, targets, labels, treatment=treatment, temperature=2.0, chunk_tokens=chunk
                    ).loss.backward()
                    return [hidden.grad, weight.grad]

                runs[f"{treatment} chunk={chunk or 'default'}"] = step
        times = interleaved(runs, device="cuda", rounds=rounds)
        table.row("three GEMMs, ms", times["three GEMMs"])
        for name in list(runs)[1:]:
            table.row(
                f"three GEMMs / {name}", times["three GEMMs"] / times[name], f">= {least}", f"{times[name]:.2f} ms"
            )
        del g_logits
        runs["three GEMMs"] = lambda: None
        hidden.grad = weight.grad = None
        peak = peak_bytes(step, "cuda")
        allowed = 2 * 2048 * v + 4 * v * d + 64e6
        table.row("peak memory over 2CV + 4VD + 64 MB", peak / allowed, "<= 1.0", f"{peak / 2**30:.2f} GiB")
        if peers:
            _peers_linear(table, hidden, weight, labels, times["bucket chunk=default"])
        del runs, step, hidden, weight
        torch.cuda.empty_cache()


def _peers_linear(table: Table, hidden: Tensor, weight: Tensor, labels: Tensor, ours: float) -> None:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        print("  (liger-kernel is not installed: not compared)")
        return

    def liger() -> None:
        hidden.grad = weight.grad = None
        liger_fused_linear_cross_entropy(hidden, weight, labels).backward()

    times = interleaved({"liger": liger}, device="cuda", rounds=3, warmup=1)
    table.row(
        "times faster than Liger's fused linear cross-entropy", times["liger"] / ours, "", f"{times['liger']:.2f} ms"
    )


def tune_cuda(table: Table, rounds: int) -> None:
    """Blocks and warps of the sweeps, in place and out of place."""
    from fastkd.kernels import loss_triton

    chosen = loss_triton.sweep_settings
    n = 8192
    for v in (49152, 128256, 151936):
        for certain in (False, True):
            table.title(f"tune: V={v} bf16 {'certain' if certain else 'fresh'} student, over 1R1W")
            case = LogitsCase(n, v, certain=certain)
            floor = interleaved(
                {"f": lambda c=case: c.other.copy_(c.work)}, device="cuda", rounds=rounds, before={"f": case.restore}
            )["f"]
            for name, settings in candidates(v).items():
                loss_triton.sweep_settings = lambda *_, found=settings: dict(found)
                runs = {
                    f"{'in ' if inplace else 'out'} T={t}": case.run(inplace=inplace, treatment="bucket", temperature=t)
                    for inplace, t in ((True, 1.0), (True, 2.0), (True, 3.3), (False, 2.0))
                    if not certain or t < 3
                }
                times = interleaved(
                    runs, device="cuda", rounds=rounds, warmup=1, before=dict.fromkeys(runs, case.restore)
                )
                line = "  ".join(f"{name} {ms / floor:.3f}" for name, ms in times.items())
                table.rows.append({"v": v, "certain": certain, "settings": settings, "floor": floor, "ms": times})
                print(f"  {name:<28} {line}", flush=True)
            del case
            torch.cuda.empty_cache()
    loss_triton.sweep_settings = chosen


def candidates(v: int) -> dict[str, dict[str, Any]]:
    """What `--tune` tries: the defaults, other cache hints, and other shares of a multiprocessor for a row."""
    from fastkd.kernels.sweeps import sweep_settings

    default = sweep_settings(v, 2)
    found = {"default": default}
    for keep, done in (("", ""), ("", "evict_first"), ("evict_last", "")):
        found[f"hints {keep or '-'} {done or '-'}"] = {**default, "KEEP": keep, "DONE": done}
    for warps in (32, 16, 8):
        for tile in (32 * warps * 32, 32 * warps * 16):
            settings = {**default, "BLOCK": tile, "THREADS": 32 * warps, "num_warps": warps}
            found[f"tile {tile} warps {warps}"] = settings
    found["tile 32768 warps 16 regs 128"] = {
        **default,
        "BLOCK": 32768,
        "THREADS": 512,
        "num_warps": 16,
        "maxnreg": 128,
    }
    return found


def cpu(table: Table, rounds: int) -> None:
    """The fused head on a CPU: N=1024, D=576, V=49152, k=64, T=2."""
    n, d, v = 1024, 576, 49152
    targets = known_targets(n, v, 64, 0, "cpu")
    labels = torch.randint(v, (n,))
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(v, d) / d**0.5).requires_grad_()
    at, ids = targets.at(2.0, "bucket"), targets.ids.long()

    def fused() -> list[Tensor]:
        hidden.grad = weight.grad = None
        linear_kd_loss(hidden, weight, targets, labels, temperature=2.0, treatment="bucket").loss.backward()
        return [hidden.grad, weight.grad]

    def eager() -> list[Tensor]:
        hidden.grad = weight.grad = None
        eager_kd_loss(hidden @ weight.T, ids, at.log_q, at.log_q_tail, labels, 0.5, 2.0).backward()
        return [hidden.grad, weight.grad]

    from fastkd.kernels.linear import default_chunk

    chunk = default_chunk(hidden.device, v, 4)
    buffer, d_hidden, d_weight = torch.empty(chunk, v), torch.empty(n, d), torch.empty(v, d)

    def gemms() -> None:
        with torch.no_grad():
            d_weight.zero_()
            for first in range(0, n, chunk):
                rows = slice(first, min(first + chunk, n))
                x = buffer[: rows.stop - first]
                torch.mm(hidden[rows], weight.t(), out=x)
                torch.mm(x, weight, out=d_hidden[rows])
                d_weight.addmm_(x.t(), hidden[rows])

    table.title(f"CPU, fused head: N={n} D={d} V={v} k=64 T=2 float32, chunks of {chunk}")
    times = interleaved({"fused": fused, "gemms": gemms, "eager": eager}, device="cpu", rounds=rounds, warmup=1)
    table.row("three GEMMs in the same chunks, ms", times["gemms"])
    table.row("linear_kd_loss forward + backward over the three GEMMs", times.ratio("fused", "gemms"), "<= 1.15")
    table.row("linear_kd_loss over the eager loss", times.ratio("fused", "eager"), "<= 0.75")
    peak, other = peak_bytes(fused, "cpu"), peak_bytes(eager, "cpu")
    note = f"{peak / 2**20:.0f} MiB against {other / 2**20:.0f}"
    table.row("peak memory beyond inputs and gradients, over eager's", peak / other, "<= 0.15", note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", default=["logits", "linear", "topk"], help="of the GPU's")
    parser.add_argument("--rounds", type=int, default=0, help="timed repeats of each run")
    parser.add_argument("--tune", action="store_true", help="also try blocks and warps (GPU)")
    parser.add_argument("--chunks", type=int, nargs="+", help="chunk sizes to try for the fused head (GPU)")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table(args.device)
    if args.device == "cpu":
        cpu(table, args.rounds or 11)
    else:
        rounds = args.rounds or 15
        if args.tune:
            tune_cuda(table, min(rounds, 7))
        if "logits" in args.sections:
            logits_cuda(table, rounds, not args.no_peers)
        if "linear" in args.sections:
            linear_cuda(table, max(5, rounds // 2), not args.no_peers, (None, *(args.chunks or ())))
        if "topk" in args.sections:
            bench_topk.bench_cuda(table)
    table.save(args.json)


if __name__ == "__main__":
    main()
