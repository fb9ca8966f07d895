"""Top-k, four tails and draws against one read of the logits, and against torch.topk + logsumexp.

    fastkd bench topk [--device cuda] [--full]
    python bench/bench_topk.py [--device cuda] [--tune] [--json PATH]

All runs alternate, on more logits than the last-level cache holds.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastkd.bench import limits
from fastkd.bench.cases import GRID
from fastkd.bench.harness import Rotation, peak_bytes, rotation
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run, interleaved
from fastkd.kernels.topk.api import linear_topk_targets, topk_targets

K = 64
READ_LIMIT = 2.5  # times one read of the logits
PEER_LIMIT = 0.125  # of the time of torch.topk and a logsumexp for every temperature
CPU_LIMIT = 150.0  # microseconds per position at V = 49,152 on two cores


def peer(logits_NV: Tensor, k: int = K) -> list[Tensor]:
    """The same without fastkd: the top k and the full log-partition at every temperature."""
    best = logits_NV.topk(k, dim=1)
    partitions = [torch.logsumexp(logits_NV if t == 1 else logits_NV / t, 1) for t in GRID]
    return [best.values, best.indices, *partitions]


def drawn_logits(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Rotation[Tensor]:
    """Alternating normal logits, each filled block by block: float32 noise for all of them would not fit in memory."""

    def make() -> Tensor:
        logits = torch.empty((rows, vocab), dtype=dtype, device=device)
        for block in logits.split(256):
            block.copy_(torch.randn(block.shape, device=device) * 3)
        return logits

    return rotation(make, rows * vocab * dtype.itemsize, device)


def returned(targets: object) -> list[Tensor]:
    """The tensors of some targets."""
    return [t for t in vars(targets).values() if isinstance(t, Tensor)]


def one_read(rows: int, vocab: int, buffers: Rotation[Tensor]) -> Run:
    """The limit: every logit is read once. On a GPU by a kernel that adds them up, on a CPU by torch's maximum of the
    same bytes as float32, since the maximum of bfloat16 is no faster than the conversion."""
    if not buffers.last.is_cuda:
        return buffers.run(lambda x: x.view(torch.float32).amax())
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def read(x_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0)
        tl.store(out_ptr + tl.program_id(0), tl.sum(x.to(tl.float32), axis=0))

    block = 8192
    programs = triton.cdiv(rows * vocab, block)
    out = torch.empty(programs, device=buffers.last.device)
    return buffers.run(lambda x: read[(programs,)](x, out, rows * vocab, BLOCK=block, num_warps=8))


def bench_logits(
    table: Table, rows: int, vocab: int, dtype: torch.dtype, rounds: int, k: int = K, impl: str = "auto"
) -> None:
    """Targets of given logits."""
    targets = partial(topk_targets, temperatures=GRID, impl=impl)
    buffers = drawn_logits(rows, vocab, dtype, table.device)
    gpu, floor, theirs = table.device == "cuda", "one read of the logits", "torch.topk + logsumexp a temperature"
    runs: dict[str, Run] = {
        floor: one_read(rows, vocab, buffers),
        "fastkd": buffers.run(lambda x: targets(x, k)),
        theirs: buffers.run(lambda x: peer(x if gpu else x.float(), k)),
    }
    if k == K:
        runs |= {
            "fastkd, 48 entries": buffers.run(lambda x: targets(x, 48)),
            "fastkd, 48 entries and 16 draws": buffers.run(lambda x: targets(x, 48, draws=16)),
            "fastkd, one temperature": buffers.run(lambda x: targets(x, K, temperatures=(1.0,))),
            "fastkd, cut at 0.95 of the mass": buffers.run(lambda x: targets(x, K, mass=0.95)),
            "fastkd, softcap": buffers.run(lambda x: targets(x, K, softcap=30.0)),
        }
        if not gpu:
            runs["fastkd in PyTorch"] = buffers.run(lambda x: targets(x, k, impl="torch"))
    times = interleaved(runs, device=table.device, rounds=rounds)
    table.title(f"top-k: N={rows} V={vocab} k={k} {str(dtype)[6:]} T={GRID}")
    at = {"N": rows, "V": vocab, "k": k, "bits": dtype.itemsize * 8}
    moved = rows * vocab * dtype.itemsize / 1e6
    table.value(floor, times.time(floor).inverse(moved), "GB/s", line="limit", at=at)
    for name in list(runs)[1:]:
        table.ratio(
            name, times.ratio(name, floor), floor, f"<= {READ_LIMIT}" if gpu and name == "fastkd" else "",
            value=times.time(name).inverse(moved), unit="GB/s", line=name, at=at,
            better="" if name == theirs else "lower", note=f"{times[name]:.2f} ms",
        )  # fmt: skip
    table.ratio(f"fastkd against {theirs}", times.ratio("fastkd", theirs), theirs, f"<= {PEER_LIMIT}" if gpu else "")
    if k == K:
        drawn, alone = "fastkd, 48 entries and 16 draws", "fastkd, 48 entries"
        table.ratio("16 draws beside 48 entries", times.ratio(drawn, alone), alone)
        if not gpu:
            limit = f"<= {CPU_LIMIT}" if vocab == 49_152 and table.hardware["threads"] > 1 else ""
            for name in ("fastkd", drawn):
                table.value(f"{name}: time a position", times.time(name).scaled(1e3 / rows), "us", limit)
    for name, run in (
        ("fastkd", lambda: returned(targets(buffers.take(), k))),
        (theirs, lambda: peer(buffers.take(), k)),
    ):
        memory = peak_bytes(run, table.device)
        table.ratio(
            f"{name}: peak memory beyond logits and result", memory / (moved * 1e6), "the logits",
            value=memory / 2**20, unit="MiB", line=name, at=at, better="" if name == theirs else "lower",
        )  # fmt: skip


def bench_head(table: Table, rows: int, width: int, vocab: int, rounds: int) -> None:
    """Targets of hidden states, compared with the product with the LM head alone."""
    gpu = table.device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    hidden = torch.randn(rows, width, device=table.device).to(dtype)
    weight = (torch.randn(vocab, width, device=table.device) * (3 / math.sqrt(width))).to(dtype)
    buffer = torch.empty((rows, vocab), dtype=dtype, device=table.device)
    floor, ours = "the head's product", "linear_topk_targets"
    runs: dict[str, Run] = {
        floor: lambda: torch.mm(hidden, weight.t(), out=buffer),
        ours: lambda: linear_topk_targets(hidden, weight, K, temperatures=GRID),
    }
    times = interleaved(runs, device=table.device, rounds=rounds)
    table.title(f"head and targets in one: N={rows} D={width} V={vocab} k={K} {str(dtype)[6:]}")
    work = 2 * rows * width * vocab / 1e9
    table.value(floor, times.time(floor).inverse(work), "TFLOP/s")
    table.ratio(ours, times.ratio(ours, floor), floor, value=times.time(ours).inverse(work), unit="TFLOP/s")
    memory = peak_bytes(lambda: returned(linear_topk_targets(hidden, weight, K)), table.device)
    table.ratio(
        f"{ours}: peak memory beyond inputs and result", memory / buffer.nbytes, "the logits",
        value=memory / 2**20, unit="MiB",
    )  # fmt: skip


def cases(ask: RunConfig) -> Sequence[Case]:
    """Vocabulary sizes, then numbers of entries, then top-k fused with the LM head."""
    gpu = ask.device == "cuda"
    rows, rounds = (8192, ask.times(9, 15)) if gpu else (256, ask.times(5, 9))
    sizes = [(49_152, torch.bfloat16, K), (128_256, torch.bfloat16, K)]
    sizes += [(151_936, torch.bfloat16, K)] if gpu else [(8_192, torch.bfloat16, K), (49_152, torch.float32, K)]
    sizes += [(49_152, torch.bfloat16, k) for k in (16, 256)]
    found = [Case("limits", lambda table: limits.measure(table, "copy", "product"))]
    for vocab, dtype, k in sizes:
        run = partial(bench_logits, rows=rows, vocab=vocab, dtype=dtype, rounds=rounds, k=k)
        found.append(Case(f"V={vocab} k={k} {str(dtype)[6:]}", run))
    width, vocab = (2048, 128_256) if gpu else (576, 49_152)
    found.append(Case("head", partial(bench_head, rows=rows, width=width, vocab=vocab, rounds=rounds)))
    return found


def tune(table: Table, rows: int = 4096, vocab: int = 128_256) -> None:
    """Time a few sizes, with the time of each kernel in microseconds."""
    from fastkd.kernels.topk.sizes import DrawTuning, Tuning

    buffers = drawn_logits(rows, vocab, torch.bfloat16, "cuda")
    read = interleaved({"read": one_read(rows, vocab, buffers)}, device="cuda", rounds=15, warmup=3)["read"]
    table.title(f"tuning: N={rows} V={vocab} bfloat16 k={K}; one read {read:.3f} ms")
    settings: list[dict[str, int]] = [{}]
    settings += [
        {"group": g, "scan_block": b, "scan_warps": w, "runs": r}
        for g in (64, 128, 256)
        for b, w, r in ((4096, 4, 4), (4096, 2, 8), (8192, 4, 8), (8192, 8, 4), (16384, 8, 8))
    ]
    settings += [{"select_tile": t, "select_warps": w} for t in (2048, 4096, 8192) for w in (2, 4, 8)]
    settings += [{"sift_tile": t} for t in (512, 2048)] + [{"pick_groups": g} for g in (4, 16)]
    run = buffers.run(lambda x: topk_targets(x, K, temperatures=GRID))
    with_draws = buffers.run(lambda x: topk_targets(x, 48, temperatures=GRID, draws=16))
    draw_settings: list[dict[str, int]] = [{}]
    draw_settings += [
        {"group": g, "block": b, "warps": w, "draw_warps": d}
        for g in (256, 512, 1024)
        for b, w in ((4096, 4), (8192, 4), (8192, 8))
        for d in (1, 2, 4)
    ]
    for tuning, choices, call, name in (
        (Tuning, settings, run, "head 64"),
        (DrawTuning, draw_settings, with_draws, "head 48, draws 16"),
    ):
        default = {key: value for key, value in vars(tuning).items() if isinstance(value, int)}
        for choice in choices:
            for key, value in {**default, **choice}.items():
                setattr(tuning, key, value)
            try:
                ms = interleaved({"it": call}, device="cuda", rounds=9, warmup=2)["it"]
            except Exception as problem:  # a size that this GPU cannot launch is reported as a row
                table.absent(f"{name} {choice}", str(problem)[:60])
                continue
            table.ratio(f"{name} {choice}", ms / read, "one read", note=" ".join(kernel_times(call)))
        for key, value in default.items():
            setattr(tuning, key, value)


def kernel_times(call: Callable[[], object]) -> list[str]:
    """Microseconds of every Triton kernel in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    ours = ("_scan", "_pick", "_select", "_sift", "_sift_ties", "_finish", "_weigh", "_draw")
    events = {e.key: e.self_device_time_total for e in trace.key_averages()}
    rest = sum(v for k, v in events.items() if k not in ours)
    return [f"{k[1:]}={events[k]:.0f}" for k in ours if k in events] + [f"other={rest:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tune", action="store_true", help="time a few sizes first (GPU)")
    parser.add_argument("--json", help="also write the table to this file")
    args = parser.parse_args()
    if args.tune and args.device != "cuda":
        parser.error("--tune needs a GPU")
    torch.manual_seed(0)
    table = Table(args.device, "topk")
    if args.tune:
        tune(table)
    run_cases(cases(RunConfig(args.device, full=True)), table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
