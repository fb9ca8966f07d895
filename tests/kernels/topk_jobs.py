"""What the ranks of test_topk_parallel.py run: top-k of a head divided over them, beside one rank's."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from rank_jobs import run_jobs

from fastkd import KDError, LMHead, SparseTargets, linear_topk_targets

V, N = 300, 5
# First column (None: in rank order) and columns of each rank: uneven, on four ranks one column, and not in rank order.
SPLITS: dict[int, list[tuple[int | None, int]]] = {
    2: [(None, 261), (None, 39)],
    4: [(130, 60), (0, 1), (1, 129), (190, 110)],
}
IMPLS = ("torch", "numba")


def logits_of(kind: str) -> torch.Tensor:
    x = torch.randn(N, V, generator=torch.Generator().manual_seed(len(kind))) * 3
    if kind == "ties":
        x = x.round()
        x[1] = 2.0
        x[2] = 0.0
        x[2, [0, 129, 130, 189, 260, 261, 299]] = 4.0  # on both sides of the parts' edges
    if kind == "certain":
        x[:, 270] = 60.0  # of which all else is e^-50
        x[3] -= 1e4
    return x


class Ranks:
    """This rank's part, and the comparison with one rank."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        start, size = SPLITS[ranks][rank]
        first = sum(size for _, size in SPLITS[ranks][:rank]) if start is None else start
        self.columns = slice(first, first + size)
        self.where: dict[str, Any] = {"group": dist.group.WORLD, "vocab_start": start}

    def head(self, logits: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, LMHead]:
        """Hidden states and a head whose products are these logits to the bit, or this rank's part of them."""
        return torch.eye(len(logits), dtype=logits.dtype), LMHead(logits.t(), bias)

    def compare(
        self, logits: torch.Tensor, k: int | None, impl: str, bias: torch.Tensor | None = None, **settings: Any
    ) -> None:
        hidden, whole = self.head(logits, bias)
        _, part = self.head(logits[:, self.columns], None if bias is None else bias[self.columns])
        settings = {"chunk_tokens": 4, **settings}
        softcap, scale = (settings.pop(name, None) for name in ("softcap", "logit_scale"))
        heads = [LMHead(head.weight.contiguous(), head.bias, softcap, scale) for head in (whole, part)]
        one = linear_topk_targets(hidden, heads[0], k, impl="torch", **settings)
        out = linear_topk_targets(hidden, heads[1], k, impl=impl, **settings, **self.where)
        for name in ("ids", "draws", "outcomes"):
            if getattr(one, name) is not None:
                assert torch.equal(getattr(out, name), getattr(one, name)), (
                    name,
                    getattr(out, name) - getattr(one, name),
                )
        for name in ("logprobs", "tail"):
            torch.testing.assert_close(getattr(out, name), getattr(one, name), atol=2e-6, rtol=1e-6)
        self.bits_agree(out)

    def bits_agree(self, targets: SparseTargets) -> None:
        """All ranks have the same bits."""
        mine = torch.cat([x.double().nan_to_num().flatten() for x in targets.tensors()])
        everyones = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(everyones, mine)
        assert all(torch.equal(mine, other) for other in everyones)


def entries(impl: str) -> Callable[[Ranks], None]:
    """Fewer and more entries than a rank has columns, all of them, ties, and mass."""

    def job(ranks: Ranks) -> None:
        for kind in ("plain", "ties", "certain"):
            x = logits_of(kind)
            ranks.compare(x, 6, impl)
            ranks.compare(x, 60, impl, mass=0.9, temperatures=(2.0, 1.0))
        ranks.compare(logits_of("ties"), V, impl)
        ranks.compare(logits_of("plain"), 2 * V, impl)
        ranks.compare(logits_of("plain")[:1], 1, impl, softcap=5.0, logit_scale=0.5)

    return job


def draws(impl: str) -> Callable[[Ranks], None]:
    """Draws with and without top-k entries, positions, and in rows nearly all of whose tail another rank has."""

    def job(ranks: Ranks) -> None:
        for kind in ("plain", "ties", "certain"):
            x = logits_of(kind)
            ranks.compare(x, 6, impl, draws=20)
            ranks.compare(x, 20, impl, draws=5, mass=0.5, seed=3, positions=torch.arange(N) * 10**9)
        ranks.compare(logits_of("plain"), 0, impl, draws=30, draw_temperature=1.5)
        ranks.compare(logits_of("plain"), 4, impl, draws=9, softcap=8.0, logit_scale=1.5, draw_temperature=0.7)
        ranks.compare(logits_of("plain"), V - 1, impl, draws=3)
        ranks.compare(logits_of("ties"), V, impl, draws=3)

    return job


def masked(impl: str) -> Callable[[Ranks], None]:
    """Parts without a finite logit, and a vocabulary with fewer finite ones than entries."""

    def job(ranks: Ranks) -> None:
        for left in (slice(262, 290), slice(0, 1), slice(135, 140)):
            bias = torch.full((V,), -torch.inf)
            bias[left] = 0.0
            ranks.compare(logits_of("plain"), 3, impl, bias, draws=4)
            ranks.compare(logits_of("ties"), 40, impl, bias, draws=4)

    return job


def types(impl: str) -> Callable[[Ranks], None]:
    """bfloat16, float16 and float64; and a leading shape, whose positions have it too."""

    def job(ranks: Ranks) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            if dtype != torch.float64 or impl == "torch":
                ranks.compare(logits_of("plain").to(dtype), 8, impl, draws=6, mass=0.8)
        x = logits_of("plain")
        hidden, head = ranks.head(x[:, ranks.columns])
        flat = linear_topk_targets(hidden, head, 4, draws=2, impl=impl, **ranks.where)
        shaped = hidden[None].expand(2, -1, -1)
        positions = torch.arange(N).repeat(2, 1)
        both = linear_topk_targets(shaped, head, 4, draws=2, impl=impl, positions=positions, **ranks.where)
        for name in ("ids", "draws", "logprobs", "tail"):
            assert torch.equal(getattr(both, name), getattr(flat, name).repeat(2, 1)), name
        empty = linear_topk_targets(hidden[:0], head, 4, impl=impl, **ranks.where)
        assert empty.ids.shape == (0, 4)

    return job


def errors(impl: str) -> Callable[[Ranks], None]:
    """A wrong row of one rank, or a wrong division, is an error on all ranks, after which they go on."""

    def job(ranks: Ranks) -> None:
        x = logits_of("plain")

        def refused(expected: str, bias: torch.Tensor, **where: Any) -> None:
            hidden, head = ranks.head(x[:, ranks.columns], bias[ranks.columns])
            try:
                linear_topk_targets(hidden, head, 4, draws=2, impl=impl, **ranks.where | where)
            except KDError as error:
                assert expected in str(error), error
            else:
                raise AssertionError(f"not refused: {expected}")
            ranks.compare(x[:2], 4, impl)

        for value, name in ((torch.nan, "NaN"), (torch.inf, "+inf")):
            bias = torch.zeros(V)
            bias[280] = value
            refused(f"row 0 has {name}", bias)
        refused("row 0 has no finite logit", torch.full((V,), -torch.inf))
        refused("expected parts of at least one column", torch.zeros(V), vocab_start=ranks.columns.start // 2)

    return job


def interpreted(ranks: Ranks) -> None:
    """The Triton kernels, which the interpreter takes seconds for: a few of the above."""
    x = logits_of("plain")[:2]
    ranks.compare(x.bfloat16(), 6, "triton", draws=8, mass=0.8)
    ranks.compare(x, 60, "triton", softcap=5.0, temperatures=(2.0, 1.0))
    ranks.compare(logits_of("ties")[1:3], 6, "triton", draws=4)
    ranks.compare(x, 0, "triton", draws=8)
    bias = torch.full((V,), -torch.inf)
    bias[262:290] = 0.0
    ranks.compare(x, 12, "triton", bias, draws=4)
    bias[280] = torch.nan
    hidden, head = ranks.head(x[:, ranks.columns], bias[ranks.columns])
    try:
        linear_topk_targets(hidden, head, 4, impl="triton", **ranks.where)
    except KDError as error:
        assert "row 0 has NaN" in str(error)
    else:
        raise AssertionError("NaN was not refused")


def jobs() -> Iterator[tuple[str, Callable[[Ranks], None]]]:
    """All jobs by name."""
    for impl in IMPLS:
        for job in (entries, draws, masked, types, errors):
            yield f"{job.__name__}-{impl}", job(impl)
    yield "interpreted-triton", interpreted


def run(rank: int, ranks: int, folder: str) -> None:
    """One rank: every job, and what it raised, as JSON."""
    has_numba = find_spec("numba") is not None
    there = ((name, job) for name, job in jobs() if has_numba or not name.endswith("numba"))
    run_jobs(rank, ranks, folder, Ranks, there, seconds=60)
