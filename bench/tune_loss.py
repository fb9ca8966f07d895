"""Blocks and warps of the loss's row passes on a GPU: `python bench/bench_loss.py --device cuda --tune`."""

from functools import partial
from typing import Any

from fastkd.bench.logits_problem import FLOOR, LogitsProblem, timed
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run


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
        for name, settings in list(candidates(v, problem.pristine.dtype.itemsize).items())[:most]:
            kernels.sweep_settings = lambda *_, found=settings, **__: dict(found)
            try:
                times = timed(problem, runs, rounds, warmup=1)
            except Exception as error:  # settings that this GPU cannot launch
                table.absent(name, f"{type(error).__name__}: {error}".splitlines()[0][:100])
                continue
            for run_name in list(runs)[1:]:
                table.ratio(f"{name}: {run_name}", times.ratio(run_name, FLOOR), FLOOR, better="")
    finally:
        kernels.sweep_settings = chosen


def candidates(v: int, itemsize: int) -> dict[str, dict[str, Any]]:
    """Settings to try: the defaults, and other block sizes and warps."""
    from fastkd.kernels.loss.row_passes import sweep_settings

    default = sweep_settings(v, itemsize)
    found: dict[str, dict[str, Any]] = {"default": default}
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


def cases(ask: RunConfig) -> list[Case]:
    """Every vocabulary size, with an untrained student and with a certain one."""
    return [
        Case(f"tune V={v}", partial(tune, v=v, certain=certain, rounds=min(ask.rounds or 7, 7)))
        for v in (49152, 128256, 151936)
        for certain in (False, True)
    ]
