"""The device, and whether the fused loss gives on it what the reference gives."""

import shutil
from collections.abc import Iterator

import torch

from ..cache.errors import said
from ..kernels import SparseTargets, linear_kd_loss
from ..utils.numbers import size_text
from .result import Found

ERROR = 1e-5
"""Largest relative error of a loss or a gradient, in float32."""


def check_device() -> Iterator[Found]:
    """The GPU if there is one, the compiler that kernels need, and the fused loss."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            capability = f"{about.major}.{about.minor}"
            yield Found(f"GPU {index}", "ok", f"{about.name}, {size_text(about.total_memory)}, capability {capability}")
        if (compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")) is None:
            yield Found("C compiler", "problem", "none; Triton needs one to launch kernels. Install gcc or clang.")
        else:
            yield Found("C compiler", "ok", compiler)
    else:
        yield Found("GPU", "note", f"none that PyTorch {torch.__version__} sees; all runs on the CPU")
    yield check_loss(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check_loss(device: torch.device) -> Found:
    """The fused loss and its gradients beside the reference, on a small batch."""
    problem = None
    try:
        error = loss_error(device)
        if not error < ERROR:
            problem = f"it differs from the reference by {error:.1e} (relative; expected less than {ERROR:g})"
    except Exception as failure:  # whatever a compiler or a driver raises is what is looked for here
        problem = f"{type(failure).__name__}: {failure}"
    if problem is not None:
        return Found(f"loss on {device.type}", "problem", f"{said(problem)}. Please report it, with the lines above.")
    return Found(f"loss on {device.type}", "ok", f"equals the float64 reference, to {error:.0e}")


def loss_error(device: torch.device) -> float:
    """The largest relative error of the fused loss and of its two gradients."""
    generator = torch.Generator().manual_seed(0)
    n, d, v, k = 48, 64, 500, 8
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((n, d), (v, d)))
    logprobs, ids = torch.log_softmax(torch.randn(n, v, generator=generator), 1).topk(k)
    targets = SparseTargets(
        ids, logprobs, torch.log1p(-logprobs.exp().sum(1, keepdim=True)), torch.tensor(v - k), vocab_size=v
    )
    labels = torch.randint(v, (n,), generator=generator)
    found = []
    for impl in ("auto", "reference"):
        x, w = (tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, weight))
        loss = linear_kd_loss(x, w, targets.to(device), labels.to(device), temperature=1.0, impl=impl).loss
        loss.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert w.grad is not None
        found.append([tensor.double().cpu() for tensor in (loss.detach(), x.grad, w.grad)])
    pairs = zip(*found, strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
