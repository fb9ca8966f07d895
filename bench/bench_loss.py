"""The loss on given logits against one read and one write of them, and against other packages.

    fastkd bench loss [--device cuda] [--peers] [--full]
    .venv/bin/python bench/bench_loss.py --device cpu       # sections logits, linear (bench_head.py), topk on a GPU
    .venv/bin/python bench/bench_loss.py --device cuda [--sections logits linear topk] [--tune] [--json results.json]

Every ratio is between runs that alternate in one process. A limit is reported as `ok` or `MISSED`; nothing fails.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd.bench import limits, peers
from fastkd.bench.bench_topk import one_read
from fastkd.bench.cases import eager_kd_loss
from fastkd.bench.harness import peak_bytes
from fastkd.bench.logits_problem import FLOOR, LogitsProblem, timed
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run

CELLS = (
    ("forward_kl", "bucket"),
    ("forward_kl", "sampled"),
    ("forward_kl", "renormalize"),
    ("reverse_kl", "bucket"),
    ("jsd", "bucket"),
    ("skew_kl", "bucket"),
    ("tvd", "bucket"),
)
TEMPERATURES = (1.0, 2.0, 3.3, 4.0)
_AGAINST = {"torch.compile": "<= 0.333", "Liger cross-entropy": "<= 0.6"}  # on a GPU


def size(table: Table, ask: RunConfig, n: int, v: int, k: int, *, compiled: bool) -> None:
    """Time and memory of kd_loss and of others at one size. compiled: include torch.compile, which takes a while."""
    problem = LogitsProblem(table.device, n, v, k)
    table.title(problem.name)
    t = problem.temperature
    ours: dict[str, Callable[[], list[Tensor | None]]] = {
        "kd_loss in place": problem.ours(treatment="bucket", temperature=t),
        "kd_loss": problem.ours(inplace=False, treatment="bucket", temperature=t),
    }
    rest = peers.eager_on(problem.bucket, problem.labels, t)
    others = peers.own(
        table.device, eager_kd_loss, lambda loss: problem.step(lambda leaf: loss(leaf, *rest)), compiled=compiled
    )
    if ask.peers:
        others += peers.of_logits(problem)
    runs: dict[str, Run] = {FLOOR: problem.copy, **ours}
    runs |= {peer.name: peer.run for peer in others if peer.run is not None}
    rounds = ask.times(7, 15) * (3 if problem.bytes < 32 << 20 else 1)  # short runs are noisier
    times = timed(problem, runs, rounds)
    moved = 2 * problem.bytes / 1e6
    table.value(FLOOR, times.time(FLOOR).inverse(moved), "GB/s", line="limit", at=problem.at)
    for name in list(runs)[1:]:
        limit = ""
        if table.device == "cuda" and name == "kd_loss in place":
            limit = in_place_bound(v, t)
        table.ratio(
            name, times.ratio(name, FLOOR), FLOOR, limit, value=times.time(name).inverse(moved), unit="GB/s", line=name,
            at=problem.at, note=f"{times[name]:.2f} ms", better="lower" if name in ours else "",
        )  # fmt: skip
    for peer in others:
        if peer.run is None:
            table.absent(peer.name, peer.why, line=peer.name, at=problem.at)
            continue
        limit = _AGAINST.get(peer.name, "") if table.device == "cuda" else ""
        table.ratio(
            f"kd_loss in place against {peer.name}", times.ratio("kd_loss in place", peer.name), peer.name, limit
        )
    for name in runs:
        if name != FLOOR:
            problem.restore()
            run: Any = runs[name]
            peak = peak_bytes(run, table.device)
            table.ratio(
                f"{name}: peak memory beyond logits and gradient", peak / problem.bytes, "the logits",
                value=peak / 2**20, unit="MiB", line=name, at=problem.at, better="lower" if name in ours else "",
            )  # fmt: skip


def cells(table: Table, ask: RunConfig, n: int, v: int) -> None:
    """Every divergence and treatment at several temperatures, over one read and one write."""
    problem = LogitsProblem(table.device, n, v)
    table.title(f"divergences and treatments: N={n} V={v} k=64 {str(problem.pristine.dtype)[6:]}")
    gpu = table.device == "cuda"
    runs: dict[str, Run] = {FLOOR: problem.copy}
    bounds = {}
    for divergence, treatment in CELLS:
        for t in (1.0, 2.0, 3.3) if divergence == "forward_kl" else (2.0,):
            name = f"in place {divergence} {treatment} T={t}"
            runs[name] = problem.ours(divergence=divergence, treatment=treatment, temperature=t)
            bounds[name] = in_place_bound(v, t)
    runs["in place, upstream 3"] = problem.ours(3.0, temperature=2.0, treatment="bucket")
    bounds["in place, upstream 3"] = "<= 2.20"
    times = timed(problem, runs, ask.times(5, 15))
    for name, bound in bounds.items():
        table.ratio(name, times.ratio(name, FLOOR), FLOOR, bound if gpu else "")
    for divergence, _ in CELLS[3:]:
        name, other = f"in place {divergence} bucket T=2.0", "in place forward_kl bucket T=2.0"
        table.ratio(f"{divergence} bucket", times.ratio(name, other), "forward_kl bucket", "<= 1.15" if gpu else "")


def out_of_place(table: Table, ask: RunConfig, n: int, v: int) -> None:
    """With the logits kept, where the limit is two reads and one write."""
    problem = LogitsProblem(table.device, n, v)
    table.title(f"out of place: N={n} V={v} k=64 {str(problem.pristine.dtype)[6:]}")
    floor, out = "two reads and one write", torch.empty_like(problem.pristine)
    runs: dict[str, Run] = {floor: lambda: torch.add(problem.ring.take(), problem.pristine, out=out)}
    for t in (1.0, 2.0, 3.3):
        runs[f"out of place bucket T={t}"] = problem.ours(inplace=False, treatment="bucket", temperature=t)
    times = timed(problem, runs, ask.times(5, 15))
    for name in list(runs)[1:]:
        table.ratio(name, times.ratio(name, floor), floor, "<= 1.25" if table.device == "cuda" else "")


def student(table: Table, ask: RunConfig, n: int, v: int, *, certain: bool = False, impl: str = "auto") -> None:
    """Training and evaluation at several temperatures, of a student that is certain of its answer or that is not."""
    problem = LogitsProblem(table.device, n, v, certain=certain)
    who = "a certain student" if certain else "a fresh student"
    table.title(f"{who}: N={n} V={v} k=64 {str(problem.pristine.dtype)[6:]}")
    gpu, read = table.device == "cuda", "one read"
    runs: dict[str, Run] = {FLOOR: problem.copy, read: one_read(n, v, problem.ring)}
    over: dict[str, tuple[str, str]] = {}  # by run: its limit, and what bounds the ratio to that

    def add(name: str, run: Run, floor: str = FLOOR, bound: str = "") -> None:
        runs[name], over[name] = run, (floor, bound if gpu else "")

    for t in TEMPERATURES:
        step = problem.ours(treatment="bucket", temperature=t, impl=impl)
        add(f"in place forward_kl bucket T={t}", step, bound="" if certain else in_place_bound(v, t))
    for t in TEMPERATURES[:2]:
        add(f"in place forward_kl sampled T={t}", problem.ours(treatment="sampled", temperature=t, impl=impl))
        add(
            f"out of place forward_kl bucket T={t}",
            problem.ours(inplace=False, treatment="bucket", temperature=t, impl=impl),
        )
        add(
            f"evaluation forward_kl bucket T={t}",
            problem.evaluation(treatment="bucket", temperature=t, impl=impl),
            read,
        )
    rounds = ask.times(5, 15)
    times = timed(problem, runs, rounds, warmup=min(2, rounds))
    rate = times.time(FLOOR).inverse(2 * problem.bytes / 1e6)
    table.value(FLOOR, rate, "GB/s", line="limit", at=problem.at)
    for name, (floor, bound) in over.items():
        moved = problem.bytes * (1 if floor == read else 2) / 1e6
        table.ratio(
            name, times.ratio(name, floor), floor, bound, value=times.time(name).inverse(moved), unit="GB/s",
            note=f"{times[name]:.3f} ms",
        )  # fmt: skip


def in_place_bound(v: int, t: float) -> str:
    """The limit of the loss in place on a GPU, over one read and one write."""
    if t != 2.0 or v not in (49152, 128256, 151936):
        return "<= 1.40"
    return "<= 1.10" if v == 49152 else "<= 1.20"


def cases(ask: RunConfig) -> Sequence[Case]:
    """The limits, then all sizes, then every divergence."""
    n, v = (8192, 128256) if ask.device == "cuda" else (256, 49152)
    if ask.device == "cuda":
        sizes = [(n, 49152, 64), (n, v, 64), (n, 151936, 64)]
        sizes += [(2048, v, 64), (16384, v, 64), (n, v, 16), (n, v, 256)] if ask.full else []
    else:
        sizes = [(n, 8192, 64), (n, v, 64), (n, 128256, 64), (64, v, 64), (1024, v, 64), (n, v, 16), (n, v, 256)]
    first = sizes[0] if ask.device == "cuda" else (n, v, 64)
    found = [Case("limits", lambda table: limits.measure(table, "copy"))]
    for n_, v_, k in sizes:
        run = partial(size, ask=ask, n=n_, v=v_, k=k, compiled=ask.full or (n_, v_, k) == first)
        found.append(Case(f"N={n_} V={v_} k={k}", run))
    others = (
        (cells, "divergences"),
        (out_of_place, "out of place"),
        (student, "a fresh student"),
        (partial(student, certain=True), "a certain student"),
    )
    for vocab in (49152, 128256, 151936) if ask.device == "cuda" else (v,):
        for part, name in others if ask.device == "cuda" or ask.full else others[:1]:
            found.append(Case(f"{name}, V={vocab}", partial(part, ask=ask, n=n, v=vocab)))
    return found


def main() -> None:
    from fastkd.bench import bench_head, bench_topk, tune_loss

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=("logits", "linear", "topk"))
    parser.add_argument("--rounds", type=int, help="timed repeats of each run")
    parser.add_argument("--tune", action="store_true", help="also try blocks and warps (GPU)")
    parser.add_argument("--chunks", type=int, nargs="+", help="chunk sizes to try for the loss fused with the LM head")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    if args.tune and args.device != "cuda":
        parser.error("--tune needs a GPU")
    ask = RunConfig(args.device, full=True, peers=not args.no_peers and args.device == "cuda", rounds=args.rounds)
    sections = args.sections or (["linear"] if args.device == "cpu" else ["logits", "linear", "topk"])
    found = tune_loss.cases(ask) if args.tune else []
    found += cases(ask) if "logits" in sections else []
    found += bench_head.cases(ask, tuple(args.chunks or ())) if "linear" in sections else []
    found += bench_topk.cases(ask) if "topk" in sections else []
    table = Table(args.device, "loss")
    run_cases(found, table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
