"""The distillation loss: what users call. Arguments are checked here, the work is done by the operators."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import KDError
from ..targets import SparseTargets
from . import ops  # noqa: F401  registers the operators
from .call import Call
from .checks import (
    check_floats,
    check_positive,
    check_rows,
    check_settings,
    describe,
    overlaps,
    whole_number,
)
from .linear import default_chunk


class KDLoss(NamedTuple):
    """A distillation loss and its parts, 0-d float32 tensors in nats a counted position. Only `loss` has a gradient."""

    loss: Tensor
    hard: Tensor
    soft: Tensor


def kd_loss(
    logits: Tensor,
    targets: SparseTargets,
    labels: Tensor | None,
    *,
    alpha: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    treatment: str = "auto",
    beta: float = 0.5,
    skew: float = 0.1,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: int | Tensor | None = None,
    impl: str = "auto",
    inplace: bool = False,
) -> KDLoss:
    """`alpha * CE(student, label) + (1 - alpha) * T^2 * D(teacher_T, student_T)`, a mean over the positions that count.

    Shapes: logits `[N, V]`, labels, mask and weights `[N]`, or all with leading dimensions `[B, L, ...]` in place of N;
    targets over N positions, or compact (`targets.index`). `labels[i]` is what `logits[i]` predicts: nothing shifts.

    Which positions count: those whose label is not `ignore_index`, that `mask` (bool) has, and that targets have a row
    for. `labels=None`: no hard loss (alpha becomes 0, `hard` is NaN). `weights` multiply a position's loss. The sum is
    divided by `num_items`, the count of the whole optimizer step (an int or a 0-d tensor; by default the positions that
    count here, not the sum of the weights; 0 counts as 1). Nothing communicates: sum counts over ranks beforehand.

    alpha and temperature (at most 1000) may be 0-d tensors, so that a schedule neither recompiles nor synchronises.
    They, weights, num_items and targets are constants: one that requires a gradient is refused.
    divergence: forward_kl, reverse_kl, jsd (`beta`: M = beta q + (1 - beta) p; beta KL(q|M) + (1 - beta) KL(p|M);
    Agarwal et al. 2024), skew_kl (KL(q | skew q + (1 - skew) p); Ko et al. 2024), tvd.
    treatment of the teacher's mass outside the head: bucket (one more outcome), sampled (by the stored draws; Anshumann
    et al. 2025), renormalize (dropped); auto is sampled for forward_kl where there are draws and T <= 1.5 times
    the temperature they were drawn at, else bucket. The last two take forward_kl only.
    impl: auto (triton on a GPU, torch elsewhere and for float64), reference (dense float64), torch, triton.
    inplace: the logits' buffer is given up; the gradient is written over it. Not in evaluation. The logits are unusable
    afterwards, and an operation that had saved them for its backward raises there.

    Gradients are computed in the forward: do not wrap the call in activation checkpointing, which would run all of it
    twice and save nothing. (float16 is the exception: it computes them in the backward, where their scale is known.) A
    second backward through the same loss raises KDError, and so do create_graph=True, forward-mode differentiation and
    the transforms of torch.func.

    Raises KDError where arguments do not fit; for values inside tensors see `set_debug`.
    """
    _check_student("logits", logits)
    call = _call(
        "logits",
        logits,
        logits.shape[-1],
        logits.dtype,
        targets,
        labels,
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        treatment=treatment,
        beta=beta,
        skew=skew,
        ignore_index=ignore_index,
        mask=mask,
        weights=weights,
        num_items=num_items,
        impl=impl,
    )
    wanted = logits.requires_grad and torch.is_grad_enabled()
    if wanted and inplace and overlaps(logits):
        raise KDError(
            f"logits: found strides {logits.stride()} for shape {tuple(logits.shape)}, whose elements share memory (as "
            "after expand), with inplace=True; pass logits.contiguous(), or leave inplace out."
        )
    if not wanted:
        loss, hard, soft, _ = torch.ops.fastkd.kd_loss(logits.detach(), None, False, False, *call)
    elif logits.dtype == torch.float16:
        loss, hard, soft, _ = torch.ops.fastkd.kd_loss(logits, None, False, inplace, *call)
    elif inplace:
        with torch.no_grad():
            loss, hard, soft = torch.ops.fastkd.kd_loss_(logits.detach(), None, *call)
        loss = torch.ops.fastkd.attach(logits, logits.detach(), loss, call.impl)
    else:
        loss, hard, soft, _ = torch.ops.fastkd.kd_loss(logits, None, True, False, *call)
    return KDLoss(loss, hard.detach(), soft.detach())


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    labels: Tensor | None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    chunk_tokens: int | None = None,
    grad_weight: Tensor | None = None,
    alpha: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    treatment: str = "auto",
    beta: float = 0.5,
    skew: float = 0.1,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: int | Tensor | None = None,
    impl: str = "auto",
    inplace: bool = False,
) -> KDLoss:
    """`kd_loss` of the logits `softcap(logit_scale * (hidden @ weight.T + bias))`, which are never held whole.

    Shapes: hidden `[N, D]` (or `[B, L, ..., D]`), weight `[V, D]`, bias `[V]`; the rest as in `kd_loss`. The scale
    multiplies first (Cohere, Granite), then `softcap * tanh(z / softcap)` (Gemma; with impl="triton" right to
    softcap * 1e-7). Of compact targets, only the hidden
    rows they belong to go through the head.

    Only the gradients of what requires one are computed; the weight's is accumulated in float32 over the chunks.
    grad_weight `[V, D]` float32: an accumulator across micro-batches, whose elements may not share memory. The backward
    adds the weight's gradient to it, and none arrives at `weight` itself.
    chunk_tokens: how many positions go through the head at once (by default 2048 on a GPU, some 48 MB of logits on a
    CPU). Under autocast the matrix products run in its type. `inplace` is there for symmetry with `kd_loss`: there is
    no buffer of the caller's to give up.
    """
    _check_student("hidden", hidden)
    _check_student("weight", weight)
    if bias is not None:
        _check_student("bias", bias, 1)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise KDError(
            f"weight: found shape {tuple(weight.shape)} for hidden {tuple(hidden.shape)}; "
            f"(V, {hidden.shape[-1]}) is needed."
        )
    width, autocast = weight.shape[0], _autocast_type(hidden)
    dtype = hidden.dtype if autocast is None else autocast
    call = _call(
        "hidden",
        hidden,
        width,
        dtype,
        targets,
        labels,
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        treatment=treatment,
        beta=beta,
        skew=skew,
        ignore_index=ignore_index,
        mask=mask,
        weights=weights,
        num_items=num_items,
        impl=impl,
    )
    for name, tensor, shape in (("weight", weight, weight.shape), ("bias", bias, (width,))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape) or tensor.device != hidden.device:
            found = f"{tuple(tensor.shape)} on {tensor.device}"
            raise KDError(f"{name}: got {found}; expected {tuple(shape)} on {hidden.device}.")
        if tensor.dtype != hidden.dtype and (autocast is None or tensor.dtype == torch.float64):
            raise KDError(f"{name}: got {tensor.dtype}, hidden {hidden.dtype}; expected one type (or autocast).")
    for name, number in (("softcap", softcap), ("logit_scale", logit_scale)):
        if number is not None:
            check_positive(name, number)
    if chunk_tokens is not None:
        chunk_tokens = whole_number("chunk_tokens", chunk_tokens, "a number of positions")
        if chunk_tokens < 1:
            raise KDError(f"chunk_tokens: got {chunk_tokens}; expected at least 1.")

    grad_mode = torch.is_grad_enabled()
    want = [grad_mode and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if grad_weight is not None:
        _check_accumulator(grad_weight, weight)
        if grad_mode and not weight.requires_grad:
            raise KDError(
                "grad_weight: found with a weight that does not require a gradient; leave it out, or unfreeze."
            )
    chunk = chunk_tokens or default_chunk(hidden.device, width, dtype.itemsize)
    flat = hidden.flatten(0, -2)
    loss, hard, soft, *_ = torch.ops.fastkd.linear_kd_loss(
        flat, weight, bias, grad_weight, softcap, logit_scale, chunk, dtype, want, *call
    )
    return KDLoss(loss, hard.detach(), soft.detach())


class DistillationLoss(nn.Module):
    """The settings of a distillation loss in both forms: `module(logits, ...)`, `module.linear(hidden, weight, ...)`.

    Settings are keyword arguments of `kd_loss`; alpha and temperature are plain attributes, to be changed at will.
    """

    def __init__(
        self,
        *,
        alpha: float | Tensor = 0.5,
        temperature: float | Tensor = 1.0,
        divergence: str = "forward_kl",
        treatment: str = "auto",
        beta: float = 0.5,
        skew: float = 0.1,
        ignore_index: int = -100,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.alpha, self.temperature = alpha, temperature
        self.divergence, self.treatment, self.beta, self.skew = divergence, treatment, beta, skew
        self.ignore_index, self.impl = ignore_index, impl

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that the module stands for."""
        names = ("alpha", "temperature", "divergence", "treatment", "beta", "skew", "ignore_index", "impl")
        return {name: getattr(self, name) for name in names}

    def forward(self, logits: Tensor, targets: SparseTargets, labels: Tensor | None, **kwargs: Any) -> KDLoss:
        """`kd_loss` with the module's settings; `kwargs`: mask, weights, num_items, inplace."""
        return kd_loss(logits, targets, labels, **self.settings(), **kwargs)

    def linear(
        self, hidden: Tensor, weight: Tensor, targets: SparseTargets, labels: Tensor | None, **kwargs: Any
    ) -> KDLoss:
        """`linear_kd_loss` with the module's settings; `kwargs`: those of the head, mask, weights, num_items."""
        return linear_kd_loss(hidden, weight, targets, labels, **self.settings(), **kwargs)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())


def resolve_impl(impl: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """The implementation for tensors on this device, in this type; KDError for triton where it cannot run."""
    if impl == "auto":
        impl = "triton" if tensor.is_cuda and dtype != torch.float64 else "torch"
    if impl == "triton":
        try:
            from .triton_impl import INTERPRETED
        except ImportError as error:
            raise KDError("impl: found 'triton', which cannot be imported; install it, or use impl='torch'.") from error
        if not tensor.is_cuda and not INTERPRETED:
            raise KDError(
                f"impl: found 'triton' with a tensor on {tensor.device}; move it to a GPU, use impl='torch', or set "
                "TRITON_INTERPRET=1 before triton is imported to interpret the kernels (slow, for tests)."
            )
    return impl


# torch.compile guards on the transforms around a call itself
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_a_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _check_student(name: str, tensor: Tensor, least: int = 2) -> None:
    check_floats(name, tensor)
    if tensor.ndim < least:
        raise KDError(f"{name}: got shape {tuple(tensor.shape)}; expected at least {least} dimensions.")
    if _in_a_transform():
        raise KDError(f"{name}: found inside a transform of torch.func (grad, jvp, vmap); call the loss outside of it.")
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise KDError(f"{name}: found a forward-mode tangent; the loss has gradients in reverse mode alone.")


def _autocast_type(tensor: Tensor) -> torch.dtype | None:
    """What autocast would compute with; None where it is off, and for float64, which it leaves alone."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _check_accumulator(grad_weight: Tensor, weight: Tensor) -> None:
    if not isinstance(grad_weight, Tensor) or grad_weight.shape != weight.shape or grad_weight.dtype != torch.float32:
        raise KDError(f"grad_weight: got {describe(grad_weight)}; expected {tuple(weight.shape)} torch.float32.")
    if grad_weight.device != weight.device:
        raise KDError(f"grad_weight: got on {grad_weight.device}, weight on {weight.device}; expected one device.")
    if grad_weight.requires_grad:
        raise KDError(
            "grad_weight: found a tensor that requires a gradient; it is added to in place, pass a plain one."
        )
    if not torch.compiler.is_compiling() and grad_weight.is_inference():
        raise KDError("grad_weight: got a tensor made under torch.inference_mode; expected one that may be written.")
    if overlaps(grad_weight):
        raise KDError(
            f"grad_weight: found strides {grad_weight.stride()} for shape {tuple(grad_weight.shape)}, whose elements "
            "share memory (as after expand); pass a contiguous one."
        )


def _there(value: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number that is a tensor, on the device, without waiting for it; None for any other."""
    return value.detach().to(device, non_blocking=True) if isinstance(value, Tensor) else None


def _call(
    what: str,
    x: Tensor,
    width: int,
    dtype: torch.dtype,
    targets: SparseTargets,
    labels: Tensor | None,
    *,
    alpha: float | Tensor,
    temperature: float | Tensor,
    divergence: str,
    treatment: str,
    beta: float,
    skew: float,
    ignore_index: int,
    mask: Tensor | None,
    weights: Tensor | None,
    num_items: int | Tensor | None,
    impl: str,
) -> Call:
    """Check what can be checked without looking inside a tensor, and flatten it all."""
    check_settings(
        targets,
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        treatment=treatment,
        beta=beta,
        skew=skew,
        impl=impl,
    )
    ignore_index = whole_number("ignore_index", ignore_index, "an int")
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = whole_number("num_items", num_items, "an int or a 0-d tensor, the whole step's count,")
    check_rows(what, tuple(x.shape[:-1]), width, x.device, targets, labels, mask, weights, num_items)
    if treatment == "auto" and (divergence != "forward_kl" or targets.draws is None):
        treatment = "bucket"
    return Call(
        labels=None if labels is None else labels.reshape(-1).long().contiguous(),
        mask=None if mask is None else mask.reshape(-1).contiguous(),
        weights=None if weights is None else weights.detach().reshape(-1).contiguous(),
        num_items=_there(num_items, x.device),
        items=-1 if num_items is None or isinstance(num_items, Tensor) else num_items,
        alpha=1.0 if isinstance(alpha, Tensor) else float(alpha),
        alpha_tensor=_there(alpha, x.device),
        temperature=1.0 if isinstance(temperature, Tensor) else float(temperature),
        temperature_tensor=_there(temperature, x.device),
        ids=targets.ids,
        logprobs=targets.logprobs,
        draws=targets.draws,
        tail=targets.tail,
        outcomes=targets.outcomes,
        positions=None if targets.index is None else targets.index.long().contiguous(),
        temperatures=list(targets.temperatures),
        draw_temperature=targets.draw_temperature,
        vocab_size=targets.vocab_size,
        divergence=divergence,
        treatment=treatment,
        mix=float(beta if divergence == "jsd" else skew),
        ignore_index=ignore_index,
        impl=resolve_impl(impl, x, dtype),
    )
