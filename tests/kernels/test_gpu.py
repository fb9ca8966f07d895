"""What only a GPU can show: no synchronisation, full width, memory."""

import pytest
import torch
from cases import CELLS, case, nothing_waits

from fastkd import SparseTargets, kd_loss, linear_kd_loss

pytestmark = pytest.mark.gpu


def test_nothing_waits_for_the_device() -> None:
    """Forward and backward of both forms, compact targets and tensor settings, under torch's alarm for waiting."""
    c = case("plain", 64, 1000, 16, 8)
    index = torch.arange(0, 64, 2)
    dense, labels = c.targets.to("cuda"), c.labels.cuda()
    compact = SparseTargets(**{**vars(c.targets[index]), "index": index}).to("cuda")
    weights, mask = torch.rand(64, device="cuda"), torch.arange(64, device="cuda") % 5 != 0
    alpha, t = torch.tensor(0.3, device="cuda"), torch.tensor(1.7, device="cuda")

    def everything() -> None:
        for targets in (dense, compact):
            for settings in (
                {},
                {"alpha": alpha, "temperature": t, "num_items": 77},
                {"weights": weights, "mask": mask},
            ):
                for dtype in (torch.bfloat16, torch.float16):
                    logits = torch.randn(64, 1000, device="cuda", dtype=dtype).requires_grad_()
                    kd_loss(logits * 1, targets, labels, inplace=True, **settings).loss.backward()
                    kd_loss(logits, targets, labels, **settings).loss.backward()
                    hidden = torch.randn(64, 32, device="cuda", dtype=dtype).requires_grad_()
                    weight = torch.randn(1000, 32, device="cuda", dtype=dtype).requires_grad_()
                    linear_kd_loss(hidden, weight, targets, labels, chunk_tokens=24, **settings).loss.backward()

    everything()  # compiles, and copies the constants of the grid once
    torch.cuda.synchronize()
    with nothing_waits():
        everything()


@pytest.mark.parametrize(("divergence", "treatment"), CELLS)
@pytest.mark.parametrize("v", [49152, 50257, 151936])
def test_full_width_against_the_reference(v: int, divergence: str, treatment: str) -> None:
    """Every cell, spread and certain students, T on and off the grid, in and out of place."""
    for kind in ("plain", "certain", "peaked"):
        c = case(kind, 24, v, 64, 16)
        targets, labels = c.targets.to("cuda"), c.labels.cuda()
        for t, inplace in ((1.0, True), (2.0, False), (2.0, True), (3.3, True)):
            found = []
            for impl in ("reference", "triton"):
                leaf = c.logits.cuda().requires_grad_()
                out = kd_loss(
                    leaf * 1.0,
                    targets,
                    labels,
                    temperature=t,
                    divergence=divergence,
                    treatment=treatment,
                    impl=impl,
                    inplace=inplace and impl == "triton",
                )
                out.loss.backward()
                found.append((out, leaf.grad.double()))
            (a, ga), (b, gb) = found
            for x, y in zip(a, b, strict=True):
                assert abs(float(x.detach() - y.detach())) <= 1e-5 * max(1.0, abs(float(x.detach())))
            scale = c.logits.softmax(1).norm(dim=1) + c.targets.logprobs.exp().norm(dim=1)
            rows = (ga - gb).norm(dim=1).cpu() * int((c.labels != -100).sum())
            assert bool((rows <= 1e-5 * scale.double() * max(1.0, t)).all())


def test_out_of_bounds_positions_touch_nothing() -> None:
    """A compact row beyond the batch: NaN loss, no illegal access, the other rows' gradients in place."""
    c = case("plain", 8, 500, 8)
    index = torch.tensor([0, 3, 99, -4])
    bad = SparseTargets(**{**vars(c.targets[:4]), "index": index}).to("cuda")
    hidden = torch.randn(8, 16, device="cuda", requires_grad=True)
    weight = torch.randn(500, 16, device="cuda", requires_grad=True)
    out = linear_kd_loss(hidden, weight, bad, c.labels.cuda())
    out.loss.backward()
    torch.cuda.synchronize()
    assert bool(out.loss.isnan())
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad[[1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize(("n", "d", "chunk"), [(4096, 256, 512), (4096, 1024, None), (8192, 768, None)])
def test_head_memory(n: int, d: int, chunk: int | None) -> None:
    """Beyond inputs and returned gradients: one chunk of logits, and the weight's gradient in float32. By default, the
    logits of all rows if they fit into that, or longer chunks."""
    v = 32768
    c = case("plain", 8, v, 16)
    targets = c.targets[torch.arange(n) % 8].to("cuda")
    labels = c.labels[torch.arange(n) % 8].cuda()
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        linear_kd_loss(hidden, weight, targets, labels, chunk_tokens=chunk).loss.backward()
        peak = torch.cuda.max_memory_allocated() - base
    returned = 2 * (hidden.numel() + weight.numel())
    assert peak - returned <= 2 * (chunk or 2048) * v + 4 * v * d + (64 << 20)
