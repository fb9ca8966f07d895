"""What the recorded instruction counts (recorded/sass.json) say of a measured row: a prediction beside a figure."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from fastkd.bench.bench_sass import GPUS, RECORD, Gpu
from fastkd.bench.sass import WARP, Count
from fastkd.bench.table import Row

# rows of bench_loss.student and bench_topk.bench_logits, and the record's name for what they launch
_ROWS = (  # and how often a logit is moved at the least
    (r"in place forward_kl (?P<treatment>bucket|sampled) T=(?P<t>[\d.]+)", "loss {treatment} {dtype} V={v} T={t:g}", 2),
    (r"fastkd, (?P<k>\d+) entries and (?P<draws>\d+) draws", "topk k={k} draws={draws} {dtype} V={v}", 1),
    (r"fastkd", "topk k=64 draws=0 {dtype} V={v}", 1),
)


@cache
def record() -> Mapping[str, int]:
    """Instructions that a row's warps execute, by case and kernel; empty where nothing is recorded."""
    if not RECORD.exists():
        return {}
    return {name: kernel["instructions"] for name, kernel in json.loads(RECORD.read_text())["kernels"].items()}


def gpu_named(name: str) -> Gpu | None:
    """The GPU that the model knows by this name of a device."""
    return next((gpu for gpu in GPUS if gpu.name in name), None)


def beside(row: Row, gpu: Gpu | None, v: int, dtype: str) -> Row:
    """The row, with the prediction in its note where there is one: the time to issue what its kernels execute over the
    floor, at least 1."""
    for pattern, name, moved in _ROWS:
        found = re.fullmatch(pattern, row.name)
        if found is None or gpu is None:
            continue
        values: dict[str, str | float] = dict(found.groupdict())
        if "t" in values:
            values["t"] = float(values["t"])
        case = name.format(v=v, dtype=dtype, **values)
        counts = [count for kernel, count in record().items() if kernel.startswith(f"{case}: ")]
        if counts:
            floor = gpu.memory(moved * (4 if dtype == "float32" else 2))
            issue = gpu.issue(Count(issued=sum(counts) * WARP / v)) / floor
            said = f"predicted {max(issue, 1.0):.2f}x for {gpu.name} (issue {issue:.2f}x)"
            return replace(row, note=f"{row.note}; {said}" if row.note else said)
    return row
