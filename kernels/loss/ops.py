# mypy: allow-untyped-decorators
"""The losses as operators, for autograd and torch.compile. The forward computes gradients; the backward scales them.

`kd_loss` and `linear_kd_loss` return the losses and gradients, `kd_loss_` writes the gradient over the logits, and
`attach` ties a loss and its gradients to the graph.

Logit gradients in float16 are not stored between forward and backward: scaled by 1/N they underflow, and the scale that
they need (GradScaler's) is only known in the backward. For float16 the forward computes the loss alone, and the
backward of `kd_loss` the gradient.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import KDError
from ..lm_head import LMHead
from .call import SCHEMA, Call, RowOptions, saveable
from .linear import linear_kd_loss_chunks, rows_of
from .reference import kd_loss_reference, linear_reference

F = TypeVar("F", bound=Callable[..., Any])
_CALL = SCHEMA.count(",") + 1
_TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_exact_strides") if hasattr(torch.Tag, name)]


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Define an operator whose kernel is the decorated function. fake: makes results of the same shapes and types."""

    def define(function: F) -> F:
        name, _, rest = f"fastkd::{schema}".partition("(")
        torch.library.define(name, f"({rest}", tags=_TAGS)
        torch.library.impl(name, "default")(function)
        torch.library.register_fake(name)(fake)
        return function

    return define


def _scalars(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hard and soft, uninitialised."""
    loss, hard, soft = (like.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, hard, soft


def _losses(logits: Tensor, call: Call, upstream: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the implementation that the config names. out: where the gradient goes, which may be the logits."""
    x, gradient, width = logits, out, logits.shape[-1]
    if call.config.impl != "triton":  # whose kernels address rows of any stride
        x = logits.flatten(0, -2)
        if out is not None:
            gradient = out.view(x.shape) if out.is_contiguous() else torch.empty_like(x)
    if call.config.impl == "reference":
        losses = kd_loss_reference(x, call, upstream, gradient)
    else:
        options = RowOptions(upstream, want_grad=out is not None)
        rows = rows_of(call, logits.numel() // max(width, 1), width, logits.dtype, options)
        rows.loss_at_positions(x, gradient)
        losses = rows.total()
    if out is not None and gradient is not None and gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient.view(out.shape))
    return losses


@_operator(
    f"kd_loss(Tensor logits, Tensor? upstream, bool want_grad, bool inplace, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda logits, _, want_grad, *rest: (
        *_scalars(logits), logits.new_empty(logits.shape if want_grad else (0,))
    ),
)  # fmt: skip
def _kd_loss(
    logits: Tensor, upstream: Tensor | None, want_grad: bool, inplace: bool, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = logits.new_empty(logits.shape if want_grad else (0,))
    return *_losses(logits, Call.of(call), upstream, gradient if want_grad else None), gradient


@_operator(
    f"kd_loss_(Tensor(a!) logits, Tensor? upstream, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    fake=lambda logits, *rest: _scalars(logits),
)
def _kd_loss_inplace(logits: Tensor, upstream: Tensor | None, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = _losses(logits, Call.of(call), upstream, logits)
    # autograd must see the write: an operation that saved these logits for its backward has to raise
    torch.autograd.graph.increment_version(logits)
    return losses


def _linear_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype, weight_type, want = rest[4:7]
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        *_scalars(hidden),
        hidden.new_empty(hidden.shape if want[0] else (0,)),
        weight.new_empty(weight.shape if want[1] else (0,), dtype=weight_type),
        weight.new_empty(weight.shape[:1] if want[2] else (0,), dtype=accumulator),
        hidden.new_empty(() if dtype == torch.float16 else (0,), dtype=torch.float32),
    )


@_operator(
    "linear_kd_loss(Tensor hidden, Tensor weight, Tensor? bias, float? softcap, float? logit_scale, int chunk, "
    f"ScalarType dtype, ScalarType weight_type, bool[] want, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_linear_fake,
)
def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Loss, hard, soft; gradients in hidden, weight and bias; and their factor. Empty tensors for what is not wanted:
    the gradients that `want` has not, and the factor unless the matrix products are float16."""
    softcap, logit_scale, chunk, dtype, weight_type, want, *args = rest
    call, lm_head = Call.of(args), LMHead(weight, bias, softcap, logit_scale)
    if call.config.impl == "reference":
        *losses, gradients = linear_reference(hidden, lm_head, call, want)
        gradients.append(hidden.new_ones((), dtype=torch.float32) if dtype == torch.float16 else None)
    else:
        *losses, gradients = linear_kd_loss_chunks(
            hidden, lm_head, call, chunk=chunk, dtype=dtype, weight_type=weight_type, want=want
        )
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    types = (hidden.dtype, weight_type, accumulator, torch.float32)
    each = zip(gradients, types, strict=True)
    return *losses, *(hidden.new_empty(0, dtype=t) if g is None else g.to(t) for g, t in each)


@_operator(
    "attach(Tensor loss, Tensor[] inputs, Tensor[] gradients, Tensor? factor, Tensor? accumulator, str impl) -> Tensor",
    fake=lambda loss, *rest: torch.empty_like(loss),
)
def _attach(loss: Tensor, *rest: Any) -> Tensor:
    """The loss, whose gradients in the inputs are `gradients` times `factor` (None: 1). accumulator: what the first
    input's is added to, in place of being returned."""
    return loss.clone()


@_operator("scale_(Tensor(a!) x, Tensor factor, str impl) -> ()", fake=lambda x, factor, impl: None)
def _scale(x: Tensor, factor: Tensor, impl: str) -> None:
    if impl == "triton" and x.is_contiguous():
        from .row_passes import scale_triton_

        scale_triton_(x, factor)
    elif x.device.type != "cpu" or float(factor) != 1.0:
        x.mul_(factor)


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


def _attach_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # the accumulator is not saved: other losses of the same step may add to it before this one's backward does
    _, wanted, gradients, factor, ctx.accumulator, ctx.impl = inputs
    ctx.types, ctx.has_factor = [x.dtype for x in wanted], factor is not None
    ctx.save_for_backward(*gradients, *([factor] if ctx.has_factor else []))


def _attach_backward(ctx: Any, upstream: Tensor) -> Any:
    _once(ctx)
    gradients = list(ctx.saved_tensors)
    factor = upstream * gradients.pop() if ctx.has_factor else upstream
    results: list[Tensor | None] = []
    for number, (gradient, dtype) in enumerate(zip(gradients, ctx.types, strict=True)):
        if number == 0 and ctx.accumulator is not None:
            ctx.accumulator.addcmul_(gradient, factor)
            results.append(None)
        elif gradient.dtype == dtype:
            torch.ops.fastkd.scale_(gradient, factor, ctx.impl)
            results.append(gradient)
        else:
            # multiplied in float32 and rounded once, without a float32 copy in between
            results.append(torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype)))
    return None, results, [None] * len(gradients), None, None, None


def _float16_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.inplace, *args = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, *(saveable(a) for a in args if isinstance(a, Tensor)))
    ctx.args = [torch.Tensor if isinstance(a, Tensor) else a for a in args]


def _float16_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
    _once(ctx)
    logits, *tensors = ctx.saved_tensors
    saved = iter(tensors)
    args = [next(saved) if a is torch.Tensor else a for a in ctx.args]
    gradient = logits.detach()
    if ctx.inplace:
        torch.ops.fastkd.kd_loss_(gradient, upstream, *args)
    else:
        gradient = torch.ops.fastkd.kd_loss(gradient, upstream, True, False, *args)[3]
    return gradient, None, None, None, *([None] * _CALL)


torch.library.register_autograd("fastkd::attach", _attach_backward, setup_context=_attach_setup)
torch.library.register_autograd("fastkd::kd_loss", _float16_backward, setup_context=_float16_setup)
