"""What the ranks of test_vocab_parallel.py run: the loss of a head divided over them, beside one rank's."""

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from cases import CELLS, Case, case, sparse
from rank_jobs import run_jobs

from fastkd import DistillationLoss, KDError, kd_loss, linear_kd_loss, linear_topk_targets, topk_targets
from fastkd.kernels.loss import linear as linear_module
from fastkd.kernels.loss import torch_impl
from fastkd.kernels.loss.reference import divergence_rows

V = 100
# First column (None: in rank order) and columns of each rank. Of four ranks one holds a single column, and the parts
# do not lie in rank order.
SPLITS: dict[int, list[tuple[int | None, int]]] = {
    2: [(None, 97), (None, 3)],
    4: [(50, 37), (0, 1), (1, 49), (87, 13)],
}
IMPLS = ("torch", "triton", "reference")
EVERYTHING = False  # all kinds of cases with interpreted kernels too: minutes
KINDS = ("plain", "certain", "elsewhere", "own", "masked")


class Part:
    """This rank's columns, and the arguments that say so."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.group = rank, ranks, dist.group.WORLD
        start, size = SPLITS[ranks][rank]
        self.arguments: dict[str, Any] = {"group": self.group, "vocab_start": start}
        first = sum(size for _, size in SPLITS[ranks][:rank]) if start is None else start
        self.columns = slice(first, first + size)

    def bits_agree(self, *values: torch.Tensor) -> None:
        """Every rank has the same bits."""
        mine = torch.stack([x.detach().double() for x in values])
        everyone = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(mine.view(torch.int64), x.view(torch.int64)) for x in everyone), everyone


def divided_case(kind: str, seed: int) -> Case:
    """`case` of V columns; and rows whose support is where a rank has nothing, or all that a rank has, or whose logits
    are masked (−inf) in all of a rank's columns."""
    if kind in ("plain", "certain"):
        return case(kind, 4, V, 7, 6, seed=seed)
    g = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(4, V, generator=g) * 2.5, torch.randn(4, V, generator=g) * 2
    labels = torch.tensor([3, 60, 98, -100])  # on several ranks, in S and off it
    if kind == "elsewhere":
        teacher[:, 1:9] += 30  # all of S, and nearly all of the teacher's mass
    elif kind == "own":
        teacher[:, 97:] += 20
        teacher[:, 0] += 20
    else:
        for columns in (slice(0, 1), slice(97, 100)):
            teacher[:, columns] -= 30
            student[:, columns] = -torch.inf
        labels[2] = 40
    return Case(student, sparse(teacher, 7, 6, generator=g), labels)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    found, expected = found.detach(), expected.detach()
    difference = float((found.double() - expected.double()).norm())
    assert difference <= tolerance * max(1.0, float(expected.double().norm())), (found, expected)


def same_losses(part: Part, found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    part.bits_agree(*found)
    for a, b in zip(found, expected, strict=True):
        assert bool(a.isnan()) == bool(b.isnan())
        if not b.isnan():
            close(a, b, tolerance)


def on_logits(part: Part, c: Case, *, upstream: float = 1.0, dtype: Any = torch.float32, **settings: Any) -> None:
    """`kd_loss` of this rank's columns, and of all of them on one rank in float64: losses, and the gradient here."""
    # a rounding of the divergence grows with T^2, as that of one rank does: one unit of log Σ e^(z/T) is 4e-6 at T = 4
    rounding = max(1.0, float(settings.get("temperature", 1.0)) ** 2 / 4)
    tolerance = 1e-6 * rounding if dtype == torch.float32 else 2e-3
    inplace, evaluate = settings.pop("inplace", False), settings.pop("evaluate", False)
    whole = c.logits.to(dtype).double().requires_grad_()
    one = kd_loss(whole, c.targets, c.labels, **settings | {"impl": "torch"})
    one.loss.backward()
    own = c.logits[:, part.columns].to(dtype).requires_grad_()
    given = own.clone() if inplace else own
    out = kd_loss(given, c.targets, c.labels, inplace=inplace, **settings, **part.arguments)
    out.loss.backward(torch.tensor(upstream))
    same_losses(part, out, one, tolerance)
    close(own.grad / upstream, whole.grad[:, part.columns], tolerance)
    if evaluate:
        with torch.no_grad():
            out = kd_loss(own.detach(), c.targets, c.labels, **settings, **part.arguments)
        same_losses(part, out, one, tolerance)


def cells(impl: str, number: int) -> Callable[[Part], None]:
    """One divergence and treatment: every kind of student and T, as a number and a tensor, in place and not.

    Of interpreted kernels and of the reference, one kind of student, and by the number of ranks another one.
    """
    divergence, treatment = CELLS[number]

    def job(part: Part) -> None:
        modes = [(1.0, False), (1.5, True), (2.0, False), (3.3, True), (4.0, False)]
        for index, (kind, (t, inplace)) in enumerate(zip(KINDS, modes, strict=True)):
            if impl != "torch" and not EVERYTHING and (number + part.ranks // 2) % len(KINDS) != index:
                continue
            if kind == "masked" and treatment in ("sampled", "auto"):
                continue  # a draw may be masked, and its loss infinite
            temperature: Any = torch.tensor(t) if index % 2 else t
            on_logits(
                part, divided_case(kind, index), inplace=inplace, upstream=8.0, temperature=temperature, impl=impl,
                alpha=0.3, divergence=divergence, treatment=treatment, evaluate=impl != "triton" or EVERYTHING,
            )  # fmt: skip

    return job


def rows(impl: str) -> Callable[[Part], None]:
    """Masks, weights, counts, no labels, hard labels alone, compact targets, float16 (whose backward computes)."""

    def job(part: Part) -> None:
        c, brief = divided_case("plain", 5), impl == "triton" and not EVERYTHING
        weights, mask = torch.tensor([0.5, 2.0, 1.0, -1.5]), torch.tensor([True, True, True, False])
        compact = replace(c.targets[1:3], index=torch.tensor([3, 0]))
        some_labels = torch.tensor([99, 0, 1, 2])
        on_logits(part, c, impl=impl, mask=mask, weights=weights, num_items=7, evaluate=True)
        on_logits(part, Case(c.logits, compact, some_labels), impl=impl, temperature=2.0)
        if impl != "reference":
            on_logits(part, Case(c.logits, compact, some_labels), impl=impl, dtype=torch.float16, inplace=True)
        if brief:
            return
        on_logits(part, c, impl=impl, mask=torch.zeros(4, dtype=torch.bool))
        on_logits(part, c, impl=impl, num_items=torch.tensor(3), alpha=1.0)
        on_logits(part, Case(c.logits, c.targets, None), impl=impl)  # type: ignore[arg-type]
        if impl != "reference":
            on_logits(part, c, impl=impl, dtype=torch.float16, upstream=1024.0)
            on_logits(part, c, impl=impl, dtype=torch.bfloat16)

    return job


def linear(impl: str) -> Callable[[Part], None]:
    """The fused head in chunks that do not divide N: gradients in hidden, weight and bias, and into an accumulator."""

    def job(part: Part) -> None:
        c, g, brief = divided_case("plain", 6), torch.Generator().manual_seed(6), impl == "triton" and not EVERYTHING
        tensors = [torch.randn(*shape, generator=g) for shape in ((4, 8), (V, 8), (V,))]
        hidden, weight, bias = tensors
        compact = replace(c.targets[1:3], index=torch.tensor([3, 0]))
        heads: list[dict[str, Any]] = [{"logit_scale": 0.6, "softcap": 4.0}, {}, {"softcap": 3.0}]
        for number, (head, targets) in enumerate(itertools.product(heads, (c.targets, compact))):
            with_bias, loss = number % 2 == 0, DistillationLoss(temperature=2.0, alpha=0.4, impl=impl)
            wholes = [x.double().requires_grad_() for x in tensors]
            owns = [x.clone().requires_grad_() for x in (hidden, weight[part.columns], bias[part.columns])]
            outs = []
            for by, (h, w, b), where in (("torch", wholes, {}), (impl, owns, part.arguments)):
                loss.impl = by
                where = where | head | {"bias": b if with_bias else None}
                out = loss.linear(h, w, targets, c.labels, chunk_tokens=3, **where)
                (out.loss * 3).backward()
                outs.append(out)
            same_losses(part, outs[1], outs[0])
            part.bits_agree(owns[0].grad.norm())
            for own, one in zip(owns[: 2 + with_bias], wholes, strict=False):
                close(own.grad, one.grad if own is owns[0] else one.grad[part.columns], 2e-6)
            if brief:
                break
        if brief:
            return

        # accumulated over micro-batches, with a frozen hidden; and a frozen weight
        accumulators = []
        for own, where in ((slice(None), {}), (part.columns, part.arguments)):
            total, w = torch.zeros_like(weight[own]), weight[own].clone().requires_grad_()
            for some in (slice(0, 1), slice(1, 4)):
                linear_kd_loss(
                    hidden[some], w, c.targets[some], c.labels[some], grad_weight=total, num_items=3, impl=impl, **where
                ).loss.backward()
            accumulators.append(total)
        close(accumulators[1], accumulators[0][part.columns])
        h = [hidden.clone().requires_grad_() for _ in range(2)]
        linear_kd_loss(h[0], weight, c.targets, c.labels, impl=impl).loss.backward()
        linear_kd_loss(h[1], weight[part.columns], c.targets, c.labels, impl=impl, **part.arguments).loss.backward()
        close(h[1].grad, h[0].grad)
        if impl != "reference":
            for dtype in (torch.float16, torch.bfloat16):
                results = []
                for own, where in ((slice(None), {}), (part.columns, part.arguments)):
                    h1, w1 = hidden.to(dtype).requires_grad_(), weight[own].to(dtype).requires_grad_()
                    out = linear_kd_loss(h1, w1, c.targets, c.labels, impl=impl, weights=c.labels + 0.5, **where)
                    (out.loss * 64).backward()
                    results.append((out, h1.grad, w1.grad))
                (one, d_h, d_w), (out, own_h, own_w) = results
                same_losses(part, out, one, 1e-5)
                close(own_h, d_h, 1e-2)
                close(own_w, d_w[part.columns], 1e-2)

    return job


def tails(impl: str) -> Callable[[Part], None]:
    """A mass off S from all of it to none, to the bounds of test_tail_mass.py: a rank may hold nearly all of S."""

    def job(part: Part) -> None:
        from test_tail_mass import targets_and_logits

        for divergence, t in (("forward_kl", 1.0), ("reverse_kl", 1.0), ("skew_kl", 2.0)):
            targets, logits = targets_and_logits(t, V)
            if impl == "triton" and not EVERYTHING:
                targets, logits = targets[torch.arange(0, 52, 4)], logits[::4]
            exact, own = logits.double().requires_grad_(), logits[:, part.columns].clone().requires_grad_()
            at = targets.at(t, "bucket", dtype=torch.float64)
            rows = t * t * divergence_rows(exact / t, targets.ids, at, divergence, 0.1)
            rows[rows.isfinite()].sum().backward()
            settings = {"temperature": t, "divergence": divergence, "num_items": 1, "mask": rows.isfinite()}
            out = kd_loss(own, targets, None, impl=impl, **settings, **part.arguments)
            out.loss.backward()
            close(out.soft, rows[rows.isfinite()].sum(), 1e-5)
            allowed = t * 1e-5 * ((logits.double() / t).softmax(1).norm(dim=1) + at.log_q.exp().norm(dim=1))
            error = (own.grad.double() - exact.grad[:, part.columns]).norm(dim=1)
            assert bool((error <= allowed)[rows.isfinite()].all()), (divergence, error / allowed)

    return job


def blocks(part: Part) -> None:
    """Chunks and blocks of default sizes, where by its own width each rank would take another number of them."""
    c, g = case("plain", 130, V, 7, 6, seed=9), torch.Generator().manual_seed(9)
    hidden, weight = torch.randn(130, 4, generator=g), torch.randn(V, 4, generator=g)
    with patch.object(linear_module, "CPU_CHUNK_BYTES", 1 << 15), patch.object(torch_impl, "BLOCK_BYTES", 1 << 12):
        own = weight[part.columns].requires_grad_()
        out = linear_kd_loss(hidden, own, c.targets, c.labels, **part.arguments)
        out.loss.backward()
        on_logits(part, c)
    whole = weight.double().requires_grad_()
    one = linear_kd_loss(hidden.double(), whole, c.targets, c.labels)
    one.loss.backward()
    same_losses(part, out, one)
    close(own.grad, whole.grad[part.columns])


def errors(impl: str) -> Callable[[Part], None]:
    """What is wrong on one rank is raised on all, and leaves no rank waiting: the next call works."""

    def job(part: Part) -> None:
        c, last = divided_case("plain", 7), part.rank == part.ranks - 1
        own = c.logits[:, part.columns]

        def refused(expected: str, logits: torch.Tensor = own, **changes: Any) -> None:
            arguments = {"targets": c.targets, "labels": c.labels, "impl": impl, **part.arguments, **changes}
            try:
                kd_loss(logits, **arguments)
            except KDError as error:
                assert expected in str(error), error
            else:
                raise AssertionError(f"not refused: {expected}")

        spoiled = own.clone()
        for value in (torch.nan, torch.inf):
            spoiled[1, 0] = value if last else spoiled[1, 0]
            refused("row 1 of those that count has NaN or infinite logits" if impl != "reference" else "row 1", spoiled)
        refused("row 0 of those that count has NaN", torch.full_like(own, -torch.inf))
        refused("labels: row 1 has [100]; expected a number from 0 to 99", labels=torch.tensor([0, V, 1, 2]))
        refused("fewer than the vocabulary; expected at least 101", targets=replace(c.targets, vocab_size=V + 1))
        refused("expected parts of at least one column that follow on each other", vocab_start=part.columns.start // 2)
        refused("expected parts of at least one column", own[:, : 0 if last else None], vocab_start=None)
        whole = "columns on each of" if part.ranks > 1 else ""
        refused(whole, c.logits, vocab_start=None)
        # on one rank alone: labels shifted by its first column, other labels, other settings
        shifted = c.labels - 3 * V if last else c.labels
        refused("labels: row" if last else f"rank {part.ranks - 1} of the group refuses", labels=shifted)
        refused("labels: got other values on rank 1", labels=c.labels.clamp(min=0) * (part.rank != 1))
        refused("other settings on rank 1", alpha=0.1 if part.rank == 1 else 0.5)
        on_logits(part, c, impl=impl)

    return job


class Student(torch.nn.Module):
    """Embeddings, a hidden layer and a head of one output more than the teacher's: 51 and 50 of them on two ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.embed, self.body = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)
        self.lm_head = torch.nn.Linear(8, V + 1)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(self.embed(tokens)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.hidden(tokens))
        return logits


def tensor_parallel(part: Part) -> None:
    """A head under ColwiseParallel, whose local logits, or local weight, go into the loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    c, tokens = divided_case("plain", 8), torch.tensor([[3, 19], [0, 7]])
    one = Student()
    expected = kd_loss(one(tokens), c.targets, c.labels.view(2, 2), temperature=2.0)
    expected.loss.backward()
    mesh = init_device_mesh("cpu", (part.ranks,), mesh_dim_names=("tp",))
    for fused in (False, True):
        model = parallelize_module(Student(), mesh, {"lm_head": ColwiseParallel(use_local_output=True)})
        where: dict[str, Any] = {"group": mesh["tp"].get_group(), "temperature": 2.0}
        labels = c.labels.view(2, 2)
        if fused:
            weight, bias = model.lm_head.weight.to_local(), model.lm_head.bias.to_local()
            out = linear_kd_loss(model.hidden(tokens), weight, c.targets, labels, bias=bias, **where)
        else:
            out = kd_loss(model(tokens), c.targets, labels, **where)
        out.loss.backward()
        same_losses(part, out, expected)
        for (name, found), whole in zip(model.named_parameters(), one.parameters(), strict=True):
            close(found.grad.full_tensor() if "lm_head" in name else found.grad, whole.grad)


def documented(part: Part) -> None:
    """The example of docs/losses.md, and its two losses by one rank."""
    text = (Path(__file__).parents[2] / "docs/losses.md").read_text()
    (snippet,) = re.findall(r"```python torchrun\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    student, x = names["student"], names["x"]
    body, head = student["body"], student["lm_head"].weight
    found = [head.grad.full_tensor() / 2, body.weight.grad / 2]  # the two losses are equal
    weights = [w.detach().requires_grad_() for w in (head.full_tensor(), body.weight)]
    hidden = torch.nn.functional.linear(x, weights[1], body.bias.detach())
    one = linear_kd_loss(hidden, weights[0], names["targets"], names["labels"])
    one.loss.backward()
    for out in (names["out"], names["fused"]):
        same_losses(part, out, one)
    for gradient, weight in zip(found, weights, strict=True):
        close(gradient, weight.grad)


def dtensors(part: Part) -> None:
    """Whatever is given as a DTensor is refused by name, by all losses and top-k."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (part.ranks,))
    c, g = divided_case("plain", 8), torch.Generator().manual_seed(8)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((4, 8), (V, 8), (V,)))

    def spread(x: torch.Tensor) -> DTensor:
        return distribute_tensor(x, mesh, [Shard(0) if x.ndim else Replicate()])

    def refused(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except KDError as error:
            message = str(error)
            assert message.startswith(f"{name}: got a DTensor ("), message
            assert "expected a plain tensor. Call inside the forward" in message, message
            whole = ".redistribute(placements=[Replicate()])" if name == "hidden" else ""
            assert f"{name}{whole}.to_local() on each rank" in message, message
        else:
            raise AssertionError(f"{name} was not refused")

    targets, labels = c.targets, c.labels
    refused("logits", lambda: kd_loss(spread(c.logits), targets, labels))
    refused("logits", lambda: topk_targets(spread(c.logits), 3))
    refused("labels", lambda: kd_loss(c.logits, targets, spread(labels)))
    refused("mask", lambda: kd_loss(c.logits, targets, labels, mask=spread(labels > 0)))
    refused("weights", lambda: kd_loss(c.logits, targets, labels, weights=spread(bias[:4])))
    refused("num_items", lambda: kd_loss(c.logits, targets, labels, num_items=spread(torch.tensor(4))))
    refused("alpha", lambda: kd_loss(c.logits, targets, labels, alpha=spread(torch.tensor(0.5))))
    refused("hidden", lambda: linear_kd_loss(spread(hidden), weight, targets, labels))
    refused("weight", lambda: linear_kd_loss(hidden, torch.nn.Parameter(spread(weight)), targets, labels))
    refused("bias", lambda: linear_kd_loss(hidden, weight, targets, labels, bias=spread(bias)))
    refused("weight", lambda: linear_topk_targets(hidden, spread(weight), 3))
    grad_weight = spread(torch.zeros(V, 8))
    refused("grad_weight", lambda: linear_kd_loss(hidden, weight, targets, labels, grad_weight=grad_weight))
    for field in ("ids", "logprobs", "tail", "outcomes", "draws"):
        changed = spread(getattr(targets, field))
        refused(f"targets.{field}", lambda field=field, changed=changed: replace(targets, **{field: changed}))


def jobs(ranks: int, everything: bool) -> Iterator[tuple[str, Callable[[Part], None]]]:
    """The jobs of so many ranks, by name."""
    for impl in IMPLS:
        for number, cell in enumerate(CELLS):
            if ranks == 2 or impl != "reference":
                yield f"cells-{impl}-{'-'.join(cell)}", cells(impl, number)
        yield f"rows-{impl}", rows(impl)
        yield f"linear-{impl}", linear(impl)
        yield f"errors-{impl}", errors(impl)
        if impl != "reference" and (ranks == 2 or everything):
            yield f"tails-{impl}", tails(impl)
    yield "blocks", blocks
    if ranks == 2:
        yield "tensor-parallel", tensor_parallel
        yield "documented", documented
        yield "dtensors", dtensors


def run(rank: int, ranks: int, folder: str, everything: bool = False) -> None:
    """One rank: every job, and what it raised, as JSON."""
    global EVERYTHING
    EVERYTHING = everything
    np.seterr(all="ignore")  # the interpreter's, where kernels mean infinities and NaN
    spec = importlib.util.spec_from_file_location("faster_interpreter", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    run_jobs(rank, ranks, folder, Part, jobs(ranks, everything), seconds=120)
