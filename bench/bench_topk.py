"""The teacher side: top-k, four tails and draws against one read of the logits, and against torch.topk + logsumexp.

    python bench/bench_topk.py [--device cuda] [--tune] [--json PATH]

On a GPU everything is measured in one process on rotating buffers larger than its L2 cache. On a CPU: microseconds a
position.
"""

import argparse
import math
import sys
from collections.abc import Callable
from itertools import cycle

import torch
from harness import Table, interleaved, peak_bytes
from torch import Tensor

from fastkd.kernels.topk import linear_topk_targets, topk_targets

GRID = (1.0, 1.5, 2.0, 4.0)
K = 64
READ_LIMIT = 2.5  # times one read of the logits
PEER_LIMIT = 8.0  # times as fast as torch.topk and a logsumexp for every temperature
CPU_LIMIT = 150.0  # microseconds a position at V = 49,152 on two cores


def peer(logits_NV: Tensor) -> list[Tensor]:
    """What is written without fastkd: the k best and the full log-partition at every temperature."""
    best = logits_NV.topk(K, dim=1)
    partitions = [torch.logsumexp(logits_NV if t == 1 else logits_NV / t, 1) for t in GRID]
    return [best.values, best.indices, *partitions]


def drawn_logits(rows: int, vocab: int, dtype: torch.dtype, device: str, copies: int = 1) -> list[Tensor]:
    """Normal logits, block by block: float32 noise of the whole would not fit beside them."""
    out = [torch.empty((rows, vocab), dtype=dtype, device=device) for _ in range(copies)]
    for logits in out:
        for block in logits.split(256):
            block.copy_(torch.randn(block.shape, device=device) * 3)
    return out


def rotating(function: Callable[[Tensor], object], buffers: list[Tensor]) -> Callable[[], object]:
    """A call on the next buffer each time."""
    turn = cycle(buffers)
    return lambda: function(next(turn))


def returned(targets: object) -> list[Tensor]:
    """The tensors of some targets."""
    return [t for t in vars(targets).values() if isinstance(t, Tensor)]


def one_read(rows: int, vocab: int, buffers: list[Tensor]) -> Callable[[], object]:
    """The limit: a kernel that reads every logit once and adds them up."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0)
        tl.store(out_ptr + tl.program_id(0), tl.sum(x.to(tl.float32), axis=0))

    block = 8192
    programs = triton.cdiv(rows * vocab, block)
    out = torch.empty(programs, device=buffers[0].device)
    return rotating(lambda x: read[(programs,)](x, out, rows * vocab, BLOCK=block, num_warps=8), buffers)


def bench_logits(table: Table, rows: int, vocab: int) -> None:
    """Targets of given logits on a GPU."""
    buffers = drawn_logits(rows, vocab, torch.bfloat16, "cuda", copies=2)
    runs = {
        "read": one_read(rows, vocab, buffers),
        "fastkd": rotating(lambda x: topk_targets(x, K, temperatures=GRID), buffers),
        "one temperature": rotating(lambda x: topk_targets(x, K, temperatures=(1.0,)), buffers),
        "mass": rotating(lambda x: topk_targets(x, K, temperatures=GRID, mass=0.95), buffers),
        "draws": rotating(lambda x: topk_targets(x, 48, temperatures=GRID, draws=16), buffers),
        "softcap": rotating(lambda x: topk_targets(x, K, temperatures=GRID, softcap=30.0), buffers),
        "peer": rotating(peer, buffers),
    }
    ms = interleaved(runs, device="cuda", rounds=15, warmup=3)
    table.title(f"N={rows} V={vocab} bfloat16 k={K} T={GRID}")
    gigabytes = rows * vocab * buffers[0].element_size() / 1e9
    table.row("one read of the logits, ms", ms["read"], note=f"{gigabytes / ms['read']:.2f} TB/s")
    table.row("fastkd, ms", ms["fastkd"])
    table.row("  times one read", ms["fastkd"] / ms["read"], f"<= {READ_LIMIT}")
    table.row("torch.topk + logsumexp a temperature, ms", ms["peer"])
    table.row("  times fastkd", ms["peer"] / ms["fastkd"], f">= {PEER_LIMIT}")
    for name in ("one temperature", "mass", "softcap", "draws"):
        note = "48 entries and 16 draws" if name == "draws" else ""
        table.row(f"fastkd, {name}, times one read", ms[name] / ms["read"], note=note)
    memory = peak_bytes(lambda: returned(topk_targets(buffers[0], K, temperatures=GRID)), "cuda") / 2**20
    table.row("fastkd, peak memory beyond logits and result, MiB", memory)


def bench_head(table: Table, rows: int, width: int, vocab: int) -> None:
    """Targets of hidden states on a GPU, beside the product that they cannot do without."""
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) * (3 / math.sqrt(width))
    buffer = torch.empty((rows, vocab), dtype=torch.bfloat16, device="cuda")
    runs: dict[str, Callable[[], object]] = {
        "gemm": lambda: torch.mm(hidden, weight.t(), out=buffer),
        "linear": lambda: linear_topk_targets(hidden, weight, K, temperatures=GRID),
    }
    ms = interleaved(runs, device="cuda", rounds=10)
    table.title(f"head and targets in one: N={rows} D={width} V={vocab} bfloat16")
    table.row("the head's product alone, ms", ms["gemm"])
    table.row("linear_topk_targets, ms", ms["linear"])
    memory = peak_bytes(lambda: returned(linear_topk_targets(hidden, weight, K)), "cuda") / 2**20
    table.row("peak memory beyond inputs and result, MiB", memory)


def bench_cuda(table: Table, rows: int = 8192) -> None:
    """The table of the GPU."""
    for vocab in (49_152, 128_256, 151_936):
        bench_logits(table, rows, vocab)
    bench_head(table, rows, 2048, 128_256)


def tune(table: Table, rows: int = 4096, vocab: int = 128_256) -> None:
    """A handful of sizes, each kernel's own time in microseconds beside the whole."""
    from fastkd.kernels import draws_triton, topk_triton

    buffers = drawn_logits(rows, vocab, torch.bfloat16, "cuda", copies=2)
    read = interleaved({"read": one_read(rows, vocab, buffers)}, device="cuda", rounds=15, warmup=3)["read"]
    table.title(f"tuning: N={rows} V={vocab} bfloat16 k={K}; one read {read:.3f} ms")
    settings: list[dict[str, int]] = [{}]
    settings += [
        {"group": g, "scan_block": b, "scan_warps": w}
        for g in (64, 128, 256)
        for b, w in ((2048, 2), (2048, 4), (4096, 2), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (16384, 8))
    ]
    settings += [{"select_tokens": n, "select_tile": t} for n in (512, 1024, 2048) for t in (1024, 2048, 4096)]
    settings += [{"group": 64, "select_tokens": n, "select_tile": t} for n in (512, 1024) for t in (1024, 2048, 4096)]
    settings += [{"pick_warps": w} for w in (1, 2, 8)]
    run = rotating(lambda x: topk_targets(x, K, temperatures=GRID), buffers)
    with_draws = rotating(lambda x: topk_targets(x, 48, temperatures=GRID, draws=16), buffers)
    draw_settings: list[dict[str, int]] = [{}]
    draw_settings += [
        {"group": g, "block": b, "warps": w}
        for g in (256, 512, 1024, 2048)
        for b, w in ((2048, 4), (4096, 4), (8192, 8))
    ]
    for tuning, choices, call, name in (
        (topk_triton.Tuning, settings, run, "head 64"),
        (draws_triton.Tuning, draw_settings, with_draws, "head 48, draws 16"),
    ):
        default = {key: value for key, value in vars(tuning).items() if isinstance(value, int)}
        for choice in choices:
            for key, value in {**default, **choice}.items():
                setattr(tuning, key, value)
            try:
                ms = interleaved({"it": call}, device="cuda", rounds=9, warmup=2)["it"]
            except Exception as problem:  # a size that this card cannot launch is a line of the table
                table.row(f"{name} {choice}", math.nan, note=str(problem)[:60])
                continue
            table.row(f"{name} {choice}", ms / read, note=" ".join(kernel_times(call)))
        for key, value in default.items():
            setattr(tuning, key, value)


def kernel_times(call: Callable[[], object]) -> list[str]:
    """Microseconds of every Triton kernel in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    ours = ("_scan", "_pick", "_select", "_finish", "_weigh", "_draw")
    events = {e.key: e.self_device_time_total for e in trace.key_averages()}
    rest = sum(v for k, v in events.items() if k not in ours)
    return [f"{k[1:]}={events[k]:.0f}" for k in ours if k in events] + [f"other={rest:.0f}"]


def bench_cpu(table: Table, rows: int = 512) -> None:
    """The table of the CPU."""
    for vocab, dtype in ((49_152, torch.bfloat16), (49_152, torch.float32), (128_256, torch.bfloat16)):
        (logits,) = drawn_logits(rows, vocab, dtype, "cpu")
        runs = {
            "fastkd": lambda: topk_targets(logits, K, temperatures=GRID),  # noqa: B023
            "48": lambda: topk_targets(logits, 48, temperatures=GRID),  # noqa: B023
            "draws": lambda: topk_targets(logits, 48, temperatures=GRID, draws=16),  # noqa: B023
            "peer": lambda: peer(logits.float()),  # noqa: B023
        }
        times = interleaved(runs, device="cpu", rounds=9, warmup=2)
        us = {name: ms * 1e3 / rows for name, ms in times.items()}
        table.title(f"N={rows} V={vocab} {str(dtype)[6:]} k={K} T={GRID}; microseconds a position")
        limit = f"<= {CPU_LIMIT}" if vocab == 49_152 else ""
        table.row("fastkd", us["fastkd"], limit)
        table.row("fastkd, 48 entries and 16 draws", us["draws"], limit)
        table.row("  times 48 entries alone", times.ratio("draws", "48"))
        table.row("torch.topk + logsumexp a temperature", us["peer"])
        table.row("  times fastkd", times.ratio("peer", "fastkd"))


def main(device: str, *, tuning: bool = False, json_path: str | None = None) -> None:
    """Measure on "cuda" or "cpu" and print the table."""
    torch.manual_seed(0)
    table = Table(device)
    if device == "cuda":
        if tuning:
            tune(table)
        bench_cuda(table)
    else:
        bench_cpu(table)
    table.save(json_path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tune", action="store_true", help="time a handful of sizes first (GPU)")
    parser.add_argument("--json", help="write the table here, too")
    arguments = parser.parse_args()
    if arguments.tune and arguments.device != "cuda":
        sys.exit("--tune needs a GPU")
    main(arguments.device, tuning=arguments.tune, json_path=arguments.json)
