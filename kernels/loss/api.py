"""The distillation loss: what users call. Arguments are checked here, the work is done by the operators."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..arguments import check_positive, describe, whole_number
from ..errors import KDError
from ..lm_head import LMHead, as_lm_head
from ..targets import FIELDS, SparseTargets
from . import ops  # noqa: F401  registers the operators
from .call import Call
from .checks import check_constant, check_floats, check_rows, overlaps
from .config import SCHEDULED, LossConfig, LossSettings
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
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: int | Tensor | None = None,
    inplace: bool = False,
    **settings: Unpack[LossSettings],
) -> KDLoss:
    """Hard and soft loss of a student against sparse teacher targets, a mean over the positions that count:
    `alpha * CE(student, label) + (1 - alpha) * T^2 * D(teacher at T, student at T)`.

    Shapes: logits `[N, V]`, labels, mask and weights `[N]`, or all with leading dimensions `[B, L, ...]` in place of N;
    targets over N positions, or compact (`targets.index`). `labels[i]` is what `logits[i]` predicts: nothing is
    shifted. labels=None: no hard loss (alpha becomes 0, `hard` is NaN).

    config: a LossConfig; default: `LossConfig()`. settings: fields of LossConfig as keyword arguments (alpha=0.3,
        divergence="jsd", beta=0.2, ...), which win over the config's.
    mask: bool; positions where it is False do not count. Nor do those whose label is the config's `ignore_index`, and
        those that the targets have no row for.
    weights: factors of the positions' losses.
    num_items: what the sum is divided by: the count of the whole optimizer step, an int or a 0-d tensor. Default: the
        positions that count in this call (not the sum of the weights); 0 counts as 1. Nothing communicates: sum the
        count over ranks beforehand.
    inplace: write the gradient over the logits, whose buffer is given up. Without effect where no gradient is taken.
        The logits are unusable afterwards, and an operation that had saved them for its backward raises there.

    The config's tensors, weights, num_items and targets are constants: one that requires a gradient is refused.

    Gradients are computed in the forward: do not wrap the call in activation checkpointing, which would run all of it
    twice and save nothing. (float16 is the exception: it computes them in the backward, where their scale is known.) A
    second backward through the same loss raises KDError, and so do create_graph=True, forward-mode differentiation and
    the transforms of torch.func.

    Raises KDError if arguments do not fit together; for values inside tensors see `set_debug`.
    """
    _check_student("logits", logits)
    rows = {"labels": labels, "mask": mask, "weights": weights, "num_items": num_items}
    call = _call("logits", logits, logits.shape[-1], logits.dtype, targets, loss_config(config, settings), rows)
    args = call.arguments()
    wanted = logits.requires_grad and torch.is_grad_enabled()
    if wanted and inplace and overlaps(logits):
        raise KDError(
            f"logits: got strides {logits.stride()} for shape {tuple(logits.shape)} with inplace=True; expected "
            "elements that share no memory (they do after expand). Pass logits.contiguous(), or leave inplace out."
        )
    if not wanted:
        loss, hard, soft, _ = torch.ops.fastkd.kd_loss(logits.detach(), None, False, False, *args)
    elif logits.dtype == torch.float16:
        loss, hard, soft, _ = torch.ops.fastkd.kd_loss(logits, None, False, inplace, *args)
    elif inplace:
        with torch.no_grad():
            loss, hard, soft = torch.ops.fastkd.kd_loss_(logits.detach(), None, *args)
        loss = torch.ops.fastkd.attach(logits, logits.detach(), loss, call.config.impl)
    else:
        loss, hard, soft, _ = torch.ops.fastkd.kd_loss(logits, None, True, False, *args)
    return KDLoss(loss, hard.detach(), soft.detach())


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor | LMHead,
    targets: SparseTargets,
    labels: Tensor | None,
    *,
    config: LossConfig | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    chunk_tokens: int | None = None,
    grad_weight: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: int | Tensor | None = None,
    inplace: bool = False,
    **settings: Unpack[LossSettings],
) -> KDLoss:
    """`kd_loss` of the logits `softcap(logit_scale * (hidden @ weight.T + bias))`, which are never materialized whole.

    Shapes: hidden `[N, D]` (or `[B, L, ..., D]`), weight `[V, D]`, bias `[V]`; the rest as in `kd_loss`. Of compact
    targets, only the hidden rows that they belong to go through the LM head.

    weight: the matrix, or an LMHead, which brings bias, softcap and logit_scale with it.
    logit_scale, softcap: the scale multiplies first (Cohere, Granite), then come the logits `softcap * tanh(z /
        softcap)` (Gemma; with impl="triton" exact to softcap * 1e-7).
    chunk_tokens: positions whose logits are computed at once (default: 2048 on a GPU, some 48 MB of logits on a CPU).
    grad_weight: `[V, D]` float32, an accumulator across micro-batches, whose elements may not share memory. The
        backward adds the weight's gradient to it, and `weight` itself receives none.
    inplace: without effect; it is there for symmetry with `kd_loss`.

    Only the gradients of what requires one are computed; the weight's is accumulated in float32 over the chunks. Under
    autocast the matrix products run in its type.
    """
    lm_head = as_lm_head(weight, bias, softcap, logit_scale)
    weight, bias, softcap, logit_scale = lm_head.weight, lm_head.bias, lm_head.softcap, lm_head.logit_scale
    _check_student("hidden", hidden)
    _check_student("weight", weight)
    if bias is not None:
        _check_student("bias", bias, 1)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise KDError(
            f"weight: got shape {tuple(weight.shape)} with hidden {tuple(hidden.shape)}; "
            f"expected (V, {hidden.shape[-1]})."
        )
    width, autocast = weight.shape[0], _autocast_type(hidden)
    dtype = hidden.dtype if autocast is None else autocast
    rows = {"labels": labels, "mask": mask, "weights": weights, "num_items": num_items}
    call = _call("hidden", hidden, width, dtype, targets, loss_config(config, settings), rows)
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
                "grad_weight: got one beside a weight that does not require a gradient; leave it out, or unfreeze it."
            )
    chunk = chunk_tokens or default_chunk(hidden.device, width, dtype.itemsize)
    flat = hidden.flatten(0, -2)
    loss, hard, soft, *_ = torch.ops.fastkd.linear_kd_loss(
        flat, weight, bias, grad_weight, softcap, logit_scale, chunk, dtype, want, *call.arguments()
    )
    return KDLoss(loss, hard.detach(), soft.detach())


class DistillationLoss(nn.Module):
    """A LossConfig as a module, for both forms: `module(logits, ...)` and `module.linear(hidden, weight, ...)`.

    The config's fields are attributes of the module: `module.alpha = 0.3` changes it.
    """

    config: LossConfig

    def __init__(self, config: LossConfig | None = None, **settings: Unpack[LossSettings]) -> None:
        super().__init__()
        self.config = loss_config(config, settings)

    def __getattr__(self, name: str) -> Any:
        if name in LossConfig.__dataclass_fields__:
            return getattr(self.config, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LossConfig.__dataclass_fields__:
            name, value = "config", replace(self.config, **{name: value})
        super().__setattr__(name, value)

    def settings(self) -> dict[str, Any]:
        """The config as keyword arguments of `kd_loss`."""
        return {name: getattr(self.config, name) for name in LossConfig.__dataclass_fields__}

    def forward(self, logits: Tensor, targets: SparseTargets, labels: Tensor | None, **kwargs: Any) -> KDLoss:
        """`kd_loss` with the module's config; kwargs: its other arguments (mask, weights, num_items, inplace)."""
        return kd_loss(logits, targets, labels, config=self.config, **kwargs)

    def linear(
        self, hidden: Tensor, weight: Tensor | LMHead, targets: SparseTargets, labels: Tensor | None, **kwargs: Any
    ) -> KDLoss:
        """`linear_kd_loss` with the module's config; kwargs: its other arguments."""
        return linear_kd_loss(hidden, weight, targets, labels, config=self.config, **kwargs)

    def extra_repr(self) -> str:
        """The config, for printing."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())


def loss_config(config: LossConfig | None, settings: LossSettings) -> LossConfig:
    """A config, or the default one, with other values of some fields."""
    if config is None:
        return LossConfig(**settings)
    if not isinstance(config, LossConfig):
        raise KDError(f"config: got {type(config).__name__}; expected a LossConfig.")
    return replace(config, **settings) if settings else config


def resolve_impl(impl: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """The implementation for tensors on this device, in this type; KDError for triton where it cannot run."""
    if impl == "auto":
        impl = "triton" if tensor.is_cuda and dtype != torch.float64 else "torch"
    if impl == "triton":
        try:
            from .triton_impl import INTERPRETED
        except ImportError as error:
            raise KDError("impl: got 'triton', which cannot be imported; install it, or use impl='torch'.") from error
        if not tensor.is_cuda and not INTERPRETED:
            raise KDError(
                f"impl: got 'triton' with a tensor on {tensor.device}; move it to a GPU, use impl='torch', or set "
                "TRITON_INTERPRET=1 before triton is imported to interpret the kernels (slow, for tests)."
            )
    return impl


def _in_a_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile guards on the transforms around a call itself. This is torch.compiler.assume_constant_result, which
# imports torch._dynamo, for more than a second.
_in_a_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_student(name: str, tensor: Tensor, least: int = 2) -> None:
    check_floats(name, tensor)
    if tensor.ndim < least:
        raise KDError(f"{name}: got shape {tuple(tensor.shape)}; expected at least {least} dimensions.")
    if _in_a_transform():
        raise KDError(f"{name}: got a tensor of a torch.func transform (grad, jvp, vmap); call the loss outside of it.")
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise KDError(f"{name}: got a forward-mode tangent; the loss supports reverse mode only.")


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
            "grad_weight: got a tensor that requires a gradient; expected a plain one, which is added to in place."
        )
    if not torch.compiler.is_compiling() and grad_weight.is_inference():
        raise KDError("grad_weight: got a tensor made under torch.inference_mode; expected one that may be written.")
    if overlaps(grad_weight):
        raise KDError(
            f"grad_weight: got strides {grad_weight.stride()} for shape {tuple(grad_weight.shape)}; expected elements "
            "that share no memory (they do after expand)."
        )


def _call(
    what: str, x: Tensor, width: int, dtype: torch.dtype, targets: SparseTargets, config: LossConfig,
    rows: Mapping[str, Any],
) -> Call:  # fmt: skip
    """Check what can be checked without reading tensors, and flatten the rows.

    what, x: the name of the logits or hidden states `[..., X]`, and them. rows: labels, mask, weights and num_items.
    """
    if not isinstance(targets, SparseTargets):
        raise KDError(f"targets: got {type(targets).__name__}; expected SparseTargets.")
    labels, mask, weights, num_items = (rows[name] for name in ("labels", "mask", "weights", "num_items"))
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = whole_number("num_items", num_items, "an int or a 0-d tensor, the whole step's count,")
    check_rows(what, tuple(x.shape[:-1]), width, x.device, targets, labels, mask, weights, num_items)

    def there(number: float | Tensor, name: str) -> Any:
        """A number; where it is a tensor, on the device, without waiting for it."""
        if not isinstance(number, Tensor):
            return number
        check_constant(name, number)
        return number.detach().to(x.device, non_blocking=True)

    config.check_grid(targets.temperatures)
    scheduled = {name: there(getattr(config, name), name) for name in SCHEDULED}
    return Call(
        labels=None if labels is None else labels.reshape(-1).long().contiguous(),
        mask=None if mask is None else mask.reshape(-1).contiguous(),
        weights=None if weights is None else weights.detach().reshape(-1).contiguous(),
        num_items=there(num_items, "num_items") if isinstance(num_items, Tensor) else None,
        items=-1 if num_items is None or isinstance(num_items, Tensor) else num_items,
        **{field.name: getattr(targets, field.name) for field in FIELDS},
        positions=None if targets.index is None else targets.index.long().contiguous(),
        temperatures=list(targets.temperatures),
        draw_temperature=targets.draw_temperature,
        vocab_size=targets.vocab_size,
        config=replace(config, impl=resolve_impl(config.impl, x, dtype), **scheduled),
    )
