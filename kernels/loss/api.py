"""The distillation loss: what users call. Arguments are checked here, the work is done by the operators."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from numbers import Real
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..arguments import describe, is_number, refuse_dtensor, whole_number
from ..errors import KDError, type_name
from ..fields import FLOATS, INTEGER_TYPE, INTEGERS
from ..lm_head import LMHead, as_lm_head, check_floats, check_lm_head
from ..tail import check_temperature
from ..targets import SparseTargets
from ..vocab_parallel import check_vocab_start, group_name
from . import ops  # noqa: F401  registers the operators
from .call import Call
from .config import SCHEDULED, LossConfig, LossSettings
from .linear import default_chunk, weight_gradient_type
from .unreduced import check_reduced


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
    group: Any = None,
    vocab_start: int | None = None,
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
    weights: factors of the positions' losses. (0 times an infinite loss is NaN: a mask leaves a position out.)
    num_items: what the sum is divided by: the count of the whole optimizer step, an int or a 0-d tensor. Default: the
        positions that count in this call (not the sum of the weights); 0 counts as 1. Nothing communicates: sum the
        count over ranks beforehand.
    inplace: write the gradient over the logits, whose buffer is given up. Without effect where no gradient is taken.
        The logits are unusable afterwards, and an operation that had saved them for its backward raises there.
    group: the torch.distributed.ProcessGroup over whose ranks the vocabulary is divided (vocab-parallel); None: the
        logits hold all of it. The logits are then this rank's columns `[N, V_r]`, of which ranks may hold unequal
        numbers; ids and labels stay those of the whole vocabulary, and everything but the logits is the same on all
        ranks. Every rank of the group calls, in the same order, and all or none with gradients (and runs the backward
        of float16 logits): the ranks exchange K + 6 numbers a position, once. Each gets the same losses, of the whole
        vocabulary, to be counted once; and the gradient in its own logits, which are the same columns of one rank's: to
        be reduced no further over the group. With data parallelism over another group, num_items counts the positions
        of that group's ranks. Settings that differ, invalid logits and, where values are checked, invalid or unequal
        labels and targets raise on all of them (on a GPU: NaN on all, but for unequal ones).
    vocab_start: the first of this rank's columns. None, on all ranks: the parts follow on each other in rank order.

    Gradients are computed in the forward (of float16 logits in the backward, where their scale is known): do not wrap
    the call in activation checkpointing, which would run all of it twice and save nothing. Raises KDError if arguments
    do not fit together, for a setting, weight or target that requires a gradient, for a second backward through the
    same loss, create_graph=True, forward-mode differentiation and the transforms of torch.func; for values inside
    tensors see `set_debug`.
    """
    _check_student("logits", logits)
    check_reduced("logits", logits)
    rows = {"labels": labels, "mask": mask, "weights": weights, "num_items": num_items}
    config, width, parallel = loss_config(config, settings), logits.shape[-1], _parallel(group, vocab_start)
    call = make_call("logits", logits, width, logits.dtype, targets, config, rows, parallel)
    args, plain = call.arguments(), logits.detach()
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return KDLoss(*torch.ops.fastkd.kd_loss(plain, None, False, False, *args)[:3])
    if inplace:
        _check_separate("logits", logits, "Pass logits.contiguous(), or leave inplace out.")
    if logits.dtype == torch.float16:
        loss, hard, soft, _ = torch.ops.fastkd.kd_loss(logits, None, False, inplace, *args)
        return KDLoss(loss, hard.detach(), soft.detach())
    if inplace:
        (loss, hard, soft), gradient = torch.ops.fastkd.kd_loss_(plain, None, *args), plain
    else:
        loss, hard, soft, gradient = torch.ops.fastkd.kd_loss(plain, None, True, False, *args)
    loss = torch.ops.fastkd.attach(loss, [logits], [gradient], None, None, call.config.impl)
    return KDLoss(loss, hard, soft)


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
    group: Any = None,
    vocab_start: int | None = None,
    **settings: Unpack[LossSettings],
) -> KDLoss:
    """`kd_loss` of the logits `softcap(logit_scale * (hidden @ weight.T + bias))`, which are never materialized whole.

    Shapes: hidden `[N, D]` (or `[B, L, ..., D]`), weight `[V, D]`, bias `[V]`; the rest as in `kd_loss`. Of compact
    targets, only the hidden rows that they belong to go through the LM head.

    weight: the matrix, or an LMHead, which brings bias, softcap and logit_scale with it.
    logit_scale, softcap: the scale multiplies first (Cohere, Granite), then come the logits `softcap * tanh(z /
        softcap)` (Gemma; with impl="triton" exact to softcap * 4e-7, to twice that below 0, and below -1e30 masked).
    chunk_tokens: positions whose logits are computed at once. Default on a CPU: some 48 MB of logits. On a GPU: at
        least 2048, and as many as keep the peak beyond inputs and gradients at `2 * 2048 * V + 4 * V * D` bytes and 32
        MB in half precision.
    grad_weight: `[V, D]` float32, an accumulator across micro-batches, whose elements may not share memory. The
        backward adds the weight's gradient to it, and `weight` itself receives none.
    inplace: without effect; it is there for symmetry with `kd_loss`.
    group, vocab_start: as of `kd_loss`; weight `[V_r, D]` and bias `[V_r]` (and grad_weight) are this rank's rows,
        whose gradients stay on their rank; hidden is the same on all ranks, and so is its gradient: it is summed over
        the group here (one all-reduce), so that what computed hidden must not reduce it again.

    Only the gradients of what requires one are computed; the weight's is accumulated in float32 over the chunks, and
    rounded once. Under autocast the matrix products run in its type.
    """
    lm_head = as_lm_head(weight, bias, softcap, logit_scale)
    _check_student("hidden", hidden)
    weight, bias, autocast = lm_head.weight, lm_head.bias, autocast_type(hidden)
    check_lm_head(hidden, lm_head, any_type=autocast is not None)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_student(name, tensor)
    for name, number in (("softcap", lm_head.softcap), ("logit_scale", lm_head.logit_scale)):
        if number is not None and not (isinstance(number, Real) and 0 < number < inf):
            raise KDError(f"{name}: got {number!r}; expected a positive, finite number.")
    check_reduced("hidden", hidden, weight)
    width, dtype = weight.shape[0], hidden.dtype if autocast is None else autocast
    rows = {"labels": labels, "mask": mask, "weights": weights, "num_items": num_items}
    call = make_call(
        "hidden", hidden, width, dtype, targets, loss_config(config, settings), rows, _parallel(group, vocab_start)
    )
    grad_mode = torch.is_grad_enabled()
    inputs = (hidden, weight, bias)
    want = [grad_mode and x is not None and x.requires_grad for x in inputs]
    if grad_weight is not None:
        _check_accumulator(grad_weight, weight)
        if grad_mode and not weight.requires_grad:
            raise KDError(
                "grad_weight: got one beside a weight that does not require a gradient; leave it out, or unfreeze it."
            )
    chunk = 0 if chunk_tokens is None else whole_number("chunk_tokens", chunk_tokens, "a number of positions", 1)
    if call.group is not None and chunk == 0:
        # by what is the same on all ranks, as their chunks have to be: not by this one's width
        columns, longer = -(-targets.vocab_size // group.size()), want[1] and grad_weight is None
        chunk = default_chunk(
            hidden.device, columns, dtype.itemsize, rows=len(targets), longer=weight.shape[1] if longer else 0
        )
    weight_type = torch.float64 if dtype == torch.float64 else torch.float32
    if want[1] and grad_weight is None:
        weight_type = weight_gradient_type(weight, dtype, len(targets), chunk)
    elif grad_weight is not None and chunk == 0:
        chunk = default_chunk(hidden.device, width, dtype.itemsize)  # the gradient in float32 stays beside grad_weight
    flat = hidden.detach().flatten(0, -2)
    plain_bias = None if bias is None else bias.detach()
    loss, hard, soft, *gradients, factor = torch.ops.fastkd.linear_kd_loss(
        flat, weight.detach(), plain_bias, lm_head.softcap, lm_head.logit_scale, chunk, dtype, weight_type, want,
        *call.arguments(),
    )  # fmt: skip
    if any(want):
        gradients[0] = gradients[0].view(hidden.shape) if want[0] else gradients[0]
        # the weight first: its gradient may go to the accumulator
        wanted = [i for i in (1, 0, 2) if want[i]]
        loss = torch.ops.fastkd.attach(
            loss,
            [inputs[i] for i in wanted],
            [gradients[i] for i in wanted],
            factor if dtype == torch.float16 else None,
            grad_weight,
            call.config.impl,
        )
    return KDLoss(loss, hard, soft)


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

    def forward(self, logits: Tensor, targets: SparseTargets, labels: Tensor | None, **kwargs: Any) -> KDLoss:
        """`kd_loss` with the module's config; kwargs: its other arguments (mask, inplace, group, ...)."""
        return kd_loss(logits, targets, labels, config=self.config, **kwargs)

    def linear(
        self, hidden: Tensor, weight: Tensor | LMHead, targets: SparseTargets, labels: Tensor | None, **kwargs: Any
    ) -> KDLoss:
        """`linear_kd_loss` with the module's config; kwargs: its other arguments."""
        return linear_kd_loss(hidden, weight, targets, labels, config=self.config, **kwargs)

    def extra_repr(self) -> str:
        """The config, for printing."""
        return ", ".join(f"{name}={value}" for name, value in vars(self.config).items())


def loss_config(config: LossConfig | None, settings: LossSettings) -> LossConfig:
    """A config, or the default one, with other values of some fields."""
    if config is None:
        return LossConfig(**settings)
    if not isinstance(config, LossConfig):
        raise KDError(f"config: got {type_name(config)}; expected a LossConfig.")
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


def _check_student(name: str, tensor: Tensor) -> None:
    check_floats(name, tensor)
    if name in ("logits", "hidden") and tensor.ndim < 2:
        raise KDError(f"{name}: got shape {tuple(tensor.shape)}; expected at least 2 dimensions.")
    if _in_a_transform():
        raise KDError(f"{name}: got a tensor of a torch.func transform (grad, jvp, vmap); call the loss outside of it.")
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise KDError(f"{name}: got a forward-mode tangent; the loss supports reverse mode only.")


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """What autocast would compute with; None where it is off, and for float64, which it leaves alone."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _parallel(group: Any, vocab_start: int | None) -> tuple[str | None, int]:
    """The name of the group, and this rank's first column (-1: in rank order), as a Call has them."""
    return None if group is None else group_name(group), check_vocab_start(vocab_start, group)


def _check_accumulator(grad_weight: Tensor, weight: Tensor) -> None:
    refuse_dtensor("grad_weight", grad_weight)
    if not isinstance(grad_weight, Tensor) or grad_weight.shape != weight.shape or grad_weight.dtype != torch.float32:
        raise KDError(f"grad_weight: got {describe(grad_weight)}; expected {tuple(weight.shape)} torch.float32.")
    if grad_weight.device != weight.device:
        raise KDError(f"grad_weight: got on {grad_weight.device}, weight on {weight.device}; expected one device.")
    if grad_weight.requires_grad or (not torch.compiler.is_compiling() and grad_weight.is_inference()):
        kind = "that requires a gradient" if grad_weight.requires_grad else "made under torch.inference_mode"
        raise KDError(f"grad_weight: got a tensor {kind}; expected a plain one, which is added to in place.")
    _check_separate("grad_weight", grad_weight, "Pass grad_weight.contiguous().")


def _check_separate(name: str, tensor: Tensor, advice: str) -> None:
    """Raise KDError where elements of a tensor may share memory, as those of an expanded one do."""
    # each dimension has to step over all elements of the finer ones
    steps = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(steps):
        finer = (s * (n - 1) for j, (s, n) in enumerate(steps) if s < stride or (s == stride and j < i))
        if stride <= sum(finer):
            raise KDError(
                f"{name}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, where it is written to; "
                f"expected elements that share no memory (they do after expand). {advice}"
            )


def make_call(
    what: str, x: Tensor, width: int, dtype: torch.dtype, targets: SparseTargets, config: LossConfig,
    rows: Mapping[str, Any], parallel: tuple[str | None, int] = (None, -1),
) -> Call:  # fmt: skip
    """Check what can be checked without reading tensors, and flatten the rows: labels, mask, weights and num_items.

    what, x: the name of the logits or hidden states `[..., X]`, and them. parallel: group and vocab_start of a Call.
    """
    if not isinstance(targets, SparseTargets):
        raise KDError(f"targets: got {type_name(targets)}; expected SparseTargets.")
    leading, index = tuple(x.shape[:-1]), targets.index
    # of a divided vocabulary the width is known where the ranks have exchanged theirs
    _check_targets(what, x, width if parallel[0] is None else targets.vocab_size, targets)
    for name, kinds, expected in (
        ("labels", INTEGERS, INTEGER_TYPE),
        ("mask", (torch.bool,), "torch.bool"),
        ("weights", FLOATS, "a floating-point type"),
    ):
        tensor = rows[name]
        if tensor is None:
            continue
        refuse_dtensor(name, tensor)
        if not isinstance(tensor, Tensor):
            raise KDError(f"{name}: got {type_name(tensor)}; expected a tensor.")
        if tuple(tensor.shape) != leading:
            raise KDError(f"{name}: got shape {tuple(tensor.shape)}; expected {leading}, as of {what}.")
        if tensor.device != x.device:
            raise KDError(f"{name}: got a tensor on {tensor.device}, {what} on {x.device}; move it there.")
        if tensor.dtype not in kinds:
            raise KDError(f"{name}: got {tensor.dtype}; expected {expected}.")
    items = rows["num_items"]
    if isinstance(items, Tensor):
        is_number("num_items", items)
    elif items is not None:
        items = whole_number("num_items", items, "an int or a 0-d tensor, the whole step's count,", 0)
    if not isinstance(config.temperature, Tensor):  # whose value is checked where the loss reads it
        check_temperature(config.temperature, targets.temperatures)
    constants = {name: getattr(config, name) for name in SCHEDULED} | {"weights": rows["weights"], "num_items": items}
    for name, value in constants.items():
        _check_constant(name, value)

    def there(number: Any) -> Any:
        """A number; where it is a tensor, on the device, without waiting for it."""
        return number.detach().to(x.device, non_blocking=True) if isinstance(number, Tensor) else number

    labels, mask, weights = (None if rows[n] is None else rows[n].reshape(-1) for n in ("labels", "mask", "weights"))
    return Call(
        labels=None if labels is None else labels.long().contiguous(),
        mask=None if mask is None else mask.contiguous(),
        weights=None if weights is None else weights.detach().contiguous(),
        num_items=there(items) if isinstance(items, Tensor) else None,
        items=-1 if items is None or isinstance(items, Tensor) else items,
        group=parallel[0],
        vocab_start=parallel[1],
        targets=targets if index is None else replace(targets, index=index.long().contiguous()),
        config=replace(
            config,
            impl=resolve_impl(config.impl, x, dtype),
            **{name: there(getattr(config, name)) for name in SCHEDULED},
        ),
    )


def _check_targets(what: str, x: Tensor, width: int, targets: SparseTargets) -> None:
    """Raise KDError unless targets fit the positions of x `[..., X]`, with `width` logits each."""
    leading, device = tuple(x.shape[:-1]), x.device
    _check_constant("targets.logprobs", targets.logprobs)
    _check_constant("targets.tail", targets.tail)
    if targets.device != device:
        raise KDError(f"targets: got tensors on {targets.device}, {what} on {device}; use targets.to({str(device)!r}).")
    if width < targets.vocab_size:
        raise KDError(
            f"{what}: got {width} logits a position, narrower than the targets' vocabulary; expected at least "
            f"{targets.vocab_size}, one for each of the teacher's tokens (a wider, padded LM head is allowed)."
        )
    positions = 1
    for size in leading:
        positions *= size
    if targets.index is None and len(targets) != positions:
        raise KDError(
            f"targets: got {len(targets)} rows for {what} over {leading} = {positions} positions; pass a row for "
            "each position, or compact targets with an index."
        )
    if targets.index is not None and len(targets) > positions:
        raise KDError(f"targets.index: got {len(targets)} rows for {what} over {positions} positions.")


def _check_constant(name: str, value: Any) -> None:
    """Raise KDError for a tensor that requires a gradient: the loss has gradients in the student alone."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise KDError(f"{name}: got a tensor that requires a gradient; expected a constant. Pass {name}.detach().")
