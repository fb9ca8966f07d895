"""Blocks and warps of the loss's row passes on a GPU: `python bench/bench_loss.py --device cuda --tune`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastkd.bench.logits_problem import FLOOR, LogitsProblem, timed
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run


def _settings(threads: int, logits: int, registers: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The default settings with another number of threads per row, logits per thread and tile, and registers."""

    def changed(default: dict[str, Any]) -> dict[str, Any]:
        lanes = default["THREADS"] // default["num_warps"]
        found = {**default, "BLOCK": threads * logits, "THREADS": threads, "num_warps": threads // lanes}
        return found | ({"maxnreg": registers} if "maxnreg" in default else {})

    return changed


CANDIDATES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "default": lambda default: default,
    **{
        f"{threads} threads, {logits} logits, {registers} registers": _settings(threads, logits, registers)
        for threads, logits, registers in (
            (1024, 32, 64), (1024, 16, 64), (512, 64, 128), (512, 32, 128), (512, 16, 128), (512, 32, 64),
            (256, 64, 128), (256, 32, 128), (256, 64, 255), (128, 64, 255),
        )
    },
}  # fmt: skip


def tune(
    table: Table, v: int, certain: bool, rounds: int, n: int = 8192, impl: str = "auto", most: int | None = None
) -> None:
    """Time every candidate (the first `most`), in place and out of place, over one read and one write."""
    from fastkd.kernels.loss import triton_impl as loss_triton

    kernels: Any = loss_triton

    chosen = kernels.sweep_settings
    problem = LogitsProblem(table.device, n, v, certain=certain)
    table.title(f"tune: V={v} {str(problem.pristine.dtype)[6:]} {'certain' if certain else 'fresh'} student")
    runs: dict[str, Run] = {FLOOR: problem.copy}
    for inplace, t in ((True, 1.0), (True, 2.0), (True, 3.3), (False, 2.0)):
        if not certain or t < 3:
            run = problem.ours(inplace=inplace, treatment="bucket", temperature=t, impl=impl)
            runs[f"{'in ' if inplace else 'out'} T={t}"] = run
    try:
        for name, changed in list(CANDIDATES.items())[:most]:
            kernels.sweep_settings = lambda *found, changed=changed, **more: changed(chosen(*found, **more))
            try:
                times = timed(problem, runs, rounds, warmup=1)
            except Exception as error:  # settings that this GPU cannot launch
                table.absent(name, f"{type(error).__name__}: {error}".splitlines()[0][:100])
                continue
            for run_name in list(runs)[1:]:
                table.ratio(f"{name}: {run_name}", times.ratio(run_name, FLOOR), FLOOR, better="")
    finally:
        kernels.sweep_settings = chosen


def cases(ask: RunConfig) -> list[Case]:
    """Every vocabulary size, with an untrained student and with a certain one."""
    return [
        Case(f"tune V={v}", partial(tune, v=v, certain=certain, rounds=min(ask.rounds or 7, 7)))
        for v in (49152, 128256, 151936)
        for certain in (False, True)
    ]
