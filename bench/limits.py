"""The limits of the machine, measured in the same process as the rows: memory copy and matrix product."""

from collections.abc import Callable

import torch

from fastkd.bench.harness import rotation
from fastkd.bench.table import Table
from fastkd.bench.timing import Figure, interleaved

TITLE = "the limits of this machine"
_SIDE = {"cpu": 1536, "cuda": 8192}  # side of the square product
_COPY = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes copied


def copy_rate(device: str, rounds: int = 7) -> Figure:
    """GB/s, read plus written, of copying more memory than the caches hold."""
    size = _COPY[device]
    ring = rotation(lambda: torch.ones(size // 4, device=device), size, device)
    times = interleaved({"copy": lambda: ring.take().copy_(ring.take())}, device=device, rounds=rounds * 3)
    return times.time("copy").inverse(2 * size / 1e6)


def product_rate(device: str, dtype: torch.dtype, rounds: int = 7) -> Figure:
    """TFLOP/s of a large square product."""
    side = _SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = interleaved({"mm": lambda: torch.mm(a, b, out=out)}, device=device, rounds=rounds)
    return times.time("mm").inverse(2 * side**3 / 1e9)


def measure(table: Table, *which: str) -> None:
    """Add the rows of the limits, and set `table.limits`. which: "copy", "product"."""
    dtype = torch.bfloat16 if table.device == "cuda" else torch.float32
    found: dict[str, tuple[str, str, Callable[[], Figure]]] = {
        "copy": ("GB/s", "copy of memory, read and written", lambda: copy_rate(table.device)),
        "product": (
            "TFLOP/s",
            f"square product, {str(dtype)[6:]}, {_SIDE[table.device]} wide",
            lambda: product_rate(table.device, dtype),
        ),
    }
    table.title(TITLE)
    for name in which:
        unit, text, run = found[name]
        rate = run()
        table.limits[unit] = rate.median
        table.value(text, rate, unit)
