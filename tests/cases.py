"""Teachers and students of every kind, built from dense logits without the code under test; and `dense_loss`.

`dense_loss` is the reference's formulas, differentiated by autograd, with which all implementations are compared.
`test_textbook_definitions` checks these formulas against the definitions.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd import SparseTargets
from fastkd.kernels.loss.reference import cross_entropy_rows, divergence_rows
from fastkd.kernels.targets import FIELDS, INDEX

GRID = (1.0, 1.5, 2.0, 4.0)
CELLS = (
    ("forward_kl", "bucket"),
    ("forward_kl", "sampled"),
    ("forward_kl", "renormalize"),
    ("forward_kl", "auto"),
    ("reverse_kl", "bucket"),
    ("jsd", "bucket"),
    ("skew_kl", "bucket"),
    ("tvd", "bucket"),
)
KINDS = ("plain", "flat", "peaked", "huge", "certain", "equal")


def sparse(
    logits_NV: Tensor,
    k: int,
    draws: int = 0,
    *,
    grid: tuple[float, ...] = GRID,
    draw_temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> SparseTargets:
    """Targets of dense teacher logits, in float64 and by torch's own sampling; the last column is an unused entry."""
    n, v = logits_NV.shape
    log_p = logits_NV.double().log_softmax(1)
    k = min(k, v)
    values, order = log_p.sort(dim=1, descending=True, stable=True)
    rest = log_p.scatter(1, order[:, :k], -math.inf)
    tail = torch.stack([torch.logsumexp(rest / t, 1) for t in grid], 1)
    counts = torch.zeros_like(log_p)
    if draws and k < v:
        picked = torch.multinomial((rest / draw_temperature).softmax(1), draws, replacement=True, generator=generator)
        counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=counts.dtype))
    width = k + draws + 1
    # top-k entries first, then the drawn ones, best first; the rest is unused
    key = torch.where(counts > 0, log_p, -math.inf)
    drawn_lp, drawn_ids = key.sort(dim=1, descending=True, stable=True)
    ids = torch.zeros(n, width, dtype=torch.int32)
    lp = torch.full((n, width), -math.inf)
    number = torch.zeros(n, width, dtype=torch.int32)
    ids[:, :k], lp[:, :k] = order[:, :k].int(), values[:, :k].float()
    take = min(draws, v)
    used = drawn_lp[:, :take] > -math.inf
    ids[:, k : k + take] = torch.where(used, drawn_ids[:, :take], 0).int()
    lp[:, k : k + take] = drawn_lp[:, :take].float()
    number[:, k : k + take] = counts.gather(1, drawn_ids)[:, :take].int()
    return SparseTargets(
        ids=ids,
        logprobs=lp,
        tail=tail.float(),
        outcomes=torch.full((n,), v - k, dtype=torch.int32),
        vocab_size=v,
        draws=number if draws else None,
        temperatures=grid,
        draw_temperature=draw_temperature,
    )


def same(one: SparseTargets, other: SparseTargets) -> bool:
    """All fields are equal, types included."""
    columns = [(getattr(one, f.name), getattr(other, f.name)) for f in (*FIELDS, INDEX)]
    settings = all(getattr(one, n) == getattr(other, n) for n in ("vocab_size", "temperatures", "draw_temperature"))
    return settings and all(
        a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)) for a, b in columns
    )


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Within it, what waits for the GPU raises.

    Setting torch's alarm warns that it is a prototype: where warnings are errors, that one would leave it set.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")


@dataclass
class Case:
    """Student logits `[N, V]` in float32, targets and labels; some labels in S, some off it, some ignored."""

    logits: Tensor
    targets: SparseTargets
    labels: Tensor


def case(kind: str, n: int, v: int, k: int, draws: int = 0, *, seed: int = 0, draw_temperature: float = 1.0) -> Case:
    """One batch of a kind: see KINDS."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, v, generator=g) * 2.5
    if kind == "flat":
        teacher = teacher * 1e-3
    if kind == "peaked":
        teacher[:, 0] += 20
    targets = sparse(teacher, k, draws, generator=g, draw_temperature=draw_temperature)
    student = torch.randn(n, v, generator=g) * {"flat": 1e-3, "huge": 1e4}.get(kind, 2.0)
    if kind == "peaked":
        student[:, 0] += 15
    if kind == "certain":  # all mass on the teacher's best
        student.scatter_(1, targets.ids[:, :1].long(), 60.0)
    if kind == "equal":
        student = teacher.clone()
    labels = torch.randint(v, (n,), generator=g)
    labels[::2] = targets.ids[::2, 0].long()
    if n > 2:
        labels[2] = -100
    return Case(student, targets, labels)


def dense_loss(
    z_NV: Tensor,
    targets: SparseTargets,
    labels: Tensor | None,
    *,
    alpha: float,
    temperature: float,
    divergence: str,
    treatment: str,
    mix: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: float | None = None,
) -> Tensor:
    """The loss by autograd in the logits' own type: float64 is the oracle, float32 what an eager op would do."""
    if treatment == "auto" and divergence != "forward_kl":
        treatment = "bucket"
    at = targets.at(temperature, treatment, dtype=z_NV.dtype)
    soft = temperature**2 * divergence_rows(z_NV / temperature, targets.ids, at, divergence, mix)
    counted = torch.ones(len(z_NV), dtype=torch.bool) if mask is None else mask
    rows = (1 - alpha) * soft if alpha < 1 else torch.zeros_like(soft)
    if labels is not None:
        counted = counted & (labels != -100)
        rows = rows + (alpha * cross_entropy_rows(z_NV, labels) if alpha else 0)
    else:
        rows = soft
    if weights is not None:
        rows = rows * weights.to(rows.dtype)
    return rows[counted].sum() / max(float(counted.sum()) if num_items is None else num_items, 1)


def gradient_scale(case: Case, temperature: float) -> Tensor:
    """|p| + |q| of each row, `[N]`, in float64: the larger of T = 1 (with the label as q) and T."""
    z = case.logits.double()
    at = case.targets.at(temperature, "bucket" if case.targets.ids.shape[1] > 1 else "auto", dtype=torch.float64)
    q = torch.cat([at.log_q.exp(), at.log_q_tail.exp()[:, None]], 1).norm(dim=1)
    return z.div(temperature).softmax(1).norm(dim=1) + q


def peak_bytes(device: str, function: Callable[[], object]) -> int:
    """What torch allocates on a device while a function runs, at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - base
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    results = trace.profiler
    assert results is not None
    live = peak = 0
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
