# mypy: allow-untyped-decorators
"""The losses as operators, for autograd and torch.compile. The forward computes gradients; the backward scales them.

`kd_loss` and `linear_kd_loss` are functional, with fakes and autograd formulas. `kd_loss_` writes the gradient over the
logits; an operator that mutates cannot register autograd, so `attach` ties its result to the graph.

Logit gradients in float16 are not stored between forward and backward: scaled by 1/N they underflow, and the scale that
they need (GradScaler's) is only known in the backward. For float16 the forward computes the loss alone, and the
backward the gradient.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import KDError
from ..lm_head import LMHead
from .call import SCHEMA, Call, saveable
from .linear import linear_kd_loss_chunks
from .reference import kd_loss_reference, linear_reference
from .torch_impl import kd_loss_torch

_CALL = SCHEMA.count(",") + 1
_TAGS = (
    (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides) if hasattr(torch.Tag, "needs_exact_strides") else ()
)


def _define(name: str, schema: str) -> None:
    torch.library.define(f"fastkd::{name}", schema, tags=_TAGS or (torch.Tag.pt2_compliant_tag,))


_define(
    "kd_loss",
    f"(Tensor logits, Tensor? upstream, bool want_grad, bool inplace, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_define("kd_loss_", f"(Tensor(a!) logits, Tensor? upstream, {SCHEMA}) -> (Tensor, Tensor, Tensor)")
_define("attach", "(Tensor logits, Tensor gradient, Tensor loss, str impl) -> Tensor")
_define(
    "linear_kd_loss",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? grad_weight, float? softcap, float? logit_scale, int chunk, "
    f"ScalarType dtype, bool[] want, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_define("scale_", "(Tensor(a!) x, Tensor factor, str impl) -> ()")
_define("scaled", "(Tensor x, Tensor factor, ScalarType dtype) -> Tensor")
_define("accumulate_", "(Tensor(a!) total, Tensor x, Tensor factor) -> ()")


def _losses(logits: Tensor, call: Call, upstream: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the implementation that the config names. out: where the gradient goes, which may be the logits."""
    if call.config.impl == "triton":
        from .triton_impl import kd_loss_triton

        return kd_loss_triton(logits, call, upstream, out)
    run = kd_loss_reference if call.config.impl == "reference" else kd_loss_torch
    flat = logits.reshape(-1, logits.shape[-1])
    if out is None or out.is_contiguous():
        return run(flat, call, upstream, None if out is None else out.view(flat.shape))
    fresh = torch.empty_like(flat)  # the strided buffer's rows cannot be addressed as one matrix
    losses = run(flat, call, upstream, fresh)
    out.copy_(fresh.view(out.shape))
    return losses


@torch.library.impl("fastkd::kd_loss", "default")
def _kd_loss(
    logits: Tensor, upstream: Tensor | None, want_grad: bool, inplace: bool, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = logits.new_empty(logits.shape if want_grad else (0,))
    return *_losses(logits, Call.of(call), upstream, gradient if want_grad else None), gradient


@torch.library.register_fake("fastkd::kd_loss")
def _kd_loss_fake(logits: Tensor, upstream: Tensor | None, want_grad: bool, inplace: bool, *call: Any) -> Any:
    scalars = (logits.new_empty((), dtype=torch.float32) for _ in range(3))
    return *scalars, logits.new_empty(logits.shape if want_grad else (0,))


@torch.library.impl("fastkd::kd_loss_", "default")
def _kd_loss_inplace(logits: Tensor, upstream: Tensor | None, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = _losses(logits, Call.of(call), upstream, logits)
    # autograd must see the write: an operation that saved these logits for its backward has to raise
    torch.autograd.graph.increment_version(logits)
    return losses


@torch.library.register_fake("fastkd::kd_loss_")
def _kd_loss_inplace_fake(logits: Tensor, upstream: Tensor | None, *call: Any) -> Any:
    return tuple(logits.new_empty((), dtype=torch.float32) for _ in range(3))


@torch.library.impl("fastkd::attach", "default")
def _attach(logits: Tensor, gradient: Tensor, loss: Tensor, impl: str) -> Tensor:
    return loss.clone()


@torch.library.register_fake("fastkd::attach")
def _attach_fake(logits: Tensor, gradient: Tensor, loss: Tensor, impl: str) -> Tensor:
    return torch.empty_like(loss)


@torch.library.impl("fastkd::linear_kd_loss", "default")
def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    chunk: int,
    dtype: torch.dtype,
    want: list[bool],
    *args: Any,
) -> tuple[Tensor, ...]:
    call, empty = Call.of(args), hidden.new_empty(0)
    lm_head = LMHead(weight, bias, softcap, logit_scale)
    if call.config.impl == "reference":
        wanted = [x for x, w in zip((hidden, weight, bias), want, strict=True) if w and x is not None]
        *losses, gradients = linear_reference(hidden, lm_head, call, wanted)
        remaining = iter(gradients)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        types = (hidden.dtype, accumulator, accumulator)
        shaped = [next(remaining).to(t) if w else empty.clone() for w, t in zip(want, types, strict=True)]
        rescale = hidden.new_ones((), dtype=torch.float32) if dtype == torch.float16 else empty
        return *losses, *shaped, rescale
    loss, hard, soft, found = linear_kd_loss_chunks(
        hidden, lm_head, call, chunk=chunk, dtype=dtype, want=(want[0], want[1], want[2])
    )
    return loss, hard, soft, *(hidden.new_empty(0) if g is None else g for g in found)


@torch.library.register_fake("fastkd::linear_kd_loss")
def _linear_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    chunk: int,
    dtype: torch.dtype,
    want: list[bool],
    *args: Any,
) -> Any:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = tuple(hidden.new_empty((), dtype=torch.float32) for _ in range(3))
    return (
        *scalars,
        hidden.new_empty(hidden.shape if want[0] else (0,)),
        weight.new_empty(weight.shape if want[1] else (0,), dtype=accumulator if want[1] else hidden.dtype),
        weight.new_empty(weight.shape[:1] if want[2] else (0,), dtype=accumulator if want[2] else hidden.dtype),
        hidden.new_empty(
            () if dtype == torch.float16 else (0,), dtype=torch.float32 if dtype == torch.float16 else None
        ),
    )


@torch.library.impl("fastkd::scale_", "default")
def _scale(x: Tensor, factor: Tensor, impl: str) -> None:
    if impl == "triton" and x.is_contiguous():
        from .row_passes import scale_triton_

        scale_triton_(x, factor)
    elif x.device.type != "cpu" or float(factor) != 1.0:
        x.mul_(factor)


@torch.library.register_fake("fastkd::scale_")
def _scale_fake(x: Tensor, factor: Tensor, impl: str) -> None:
    return None


@torch.library.impl("fastkd::scaled", "default")
def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # multiplied in float32 and rounded once, without a float32 copy in between
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


@torch.library.register_fake("fastkd::scaled")
def _scaled_fake(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.impl("fastkd::accumulate_", "default")
def _accumulate(total: Tensor, x: Tensor, factor: Tensor) -> None:
    total.addcmul_(x, factor)


@torch.library.register_fake("fastkd::accumulate_")
def _accumulate_fake(total: Tensor, x: Tensor, factor: Tensor) -> None:
    return None


def _only_loss(ctx: Any, *others: Tensor) -> None:
    """Only the loss has a gradient. Without this, autograd would make zeros of `[V, D]` for the other outputs."""
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _once(ctx: Any) -> None:
    """Refuse a second backward, which would scale the gradient in place again, and second derivatives."""
    if torch.is_grad_enabled():
        raise KDError(
            "backward: got create_graph=True; the loss has no second derivatives, since its gradients are computed in "
            "the forward. Leave it out, or differentiate a loss written in torch operations."
        )
    if getattr(ctx, "spent", False):
        raise KDError(
            "backward: got a second call on the same loss, whose gradients the first call returned; compute the loss "
            "again (retain_graph=True does not keep them)."
        )
    ctx.spent = True


def _kd_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.want_grad, ctx.inplace, *args = inputs
    ctx.impl = Call.of(args).config.impl
    _only_loss(ctx, *output[1:])
    if ctx.want_grad:
        ctx.save_for_backward(output[3])
    else:
        ctx.save_for_backward(logits, *(saveable(a) for a in args if isinstance(a, Tensor)))
        ctx.args = [None if isinstance(a, Tensor) else a for a in args]
        ctx.tensor_at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]


def _kd_loss_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
    _once(ctx)
    if ctx.want_grad:
        (gradient,) = ctx.saved_tensors
        torch.ops.fastkd.scale_(gradient, upstream, ctx.impl)
    else:
        logits, *tensors = ctx.saved_tensors
        args = list(ctx.args)
        for i, tensor in zip(ctx.tensor_at, tensors, strict=True):
            args[i] = tensor
        logits = logits.detach()
        if ctx.inplace:
            torch.ops.fastkd.kd_loss_(logits, upstream, *args)
            gradient = logits
        else:
            gradient = torch.ops.fastkd.kd_loss(logits, upstream, True, False, *args)[3]
    return gradient, None, None, None, *([None] * _CALL)


def _attach_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.impl = inputs[3]


def _attach_backward(ctx: Any, upstream: Tensor) -> Any:
    _once(ctx)
    (gradient,) = ctx.saved_tensors
    torch.ops.fastkd.scale_(gradient, upstream, ctx.impl)
    return gradient, None, None, None


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, bias, grad_weight, _, _, _, ctx.dtype, ctx.want, *args = inputs
    ctx.impl = Call.of(args).config.impl
    _only_loss(ctx, *output[1:])
    ctx.weight_type, ctx.bias_type = weight.dtype, None if bias is None else bias.dtype
    # not saved: other losses of the same step may add to it before this one's backward does
    ctx.grad_weight = grad_weight
    ctx.save_for_backward(*output[3:])


def _linear_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
    _once(ctx)
    d_hidden, d_weight, d_bias, rescale = ctx.saved_tensors
    grad_weight = ctx.grad_weight
    factor = upstream * rescale if ctx.dtype == torch.float16 else upstream
    results: list[Tensor | None] = []
    for wanted, gradient, dtype in zip(
        ctx.want, (d_hidden, d_weight, d_bias), (d_hidden.dtype, ctx.weight_type, ctx.bias_type), strict=True
    ):
        if not wanted:
            results.append(None)
        elif gradient is d_weight and grad_weight is not None:
            torch.ops.fastkd.accumulate_(grad_weight, gradient, factor)
            results.append(None)
        elif gradient.dtype == dtype:
            torch.ops.fastkd.scale_(gradient, factor, ctx.impl)
            results.append(gradient)
        else:
            results.append(torch.ops.fastkd.scaled(gradient, factor, dtype))
    return *results, *([None] * (6 + _CALL))


torch.library.register_autograd("fastkd::kd_loss", _kd_loss_backward, setup_context=_kd_loss_setup)
torch.library.register_autograd("fastkd::attach", _attach_backward, setup_context=_attach_setup)
torch.library.register_autograd("fastkd::linear_kd_loss", _linear_backward, setup_context=_linear_setup)
