"""Losses of several students that learn from each other: each LM head's logits serve its targets and its loss.

Apart (`linear_topk_targets`, then `linear_kd_loss`) every student's logits are computed twice: for the targets that the
others learn from, and for its own loss. Here a chunk of them is computed once, read by top-k, and then replaced by its
gradient: a student costs what it costs alone, and one more read of its logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import whole_number
from ..errors import KDError
from ..lm_head import LMHead, check_floats, check_lm_head
from ..targets import SparseTargets
from ..topk.api import topk_targets
from ..topk.config import TopKConfig
from .api import KDLoss, autocast_type, make_call
from .call import RowOptions
from .config import LossConfig
from .linear import add_outer_product_, default_chunk, row_stride, rows_of

Sources = Callable[[slice, Sequence[SparseTargets | None]], Sequence[Sequence[SparseTargets]]]
"""For a stretch of the rows: from the targets made of each student (None where none are made) to those that each one
learns from. All without an index, of as many rows as the stretch has."""


def linear_kd_losses(
    hidden: Sequence[Tensor],
    lm_heads: Sequence[LMHead],
    labels: Tensor,
    index: Tensor,
    sources: Sources,
    *,
    topk: Sequence[TopKConfig | None],
    config: LossConfig,
    num_items: int | Tensor,
    positions: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> list[KDLoss]:
    """`linear_kd_loss` of several students on the same rows, a mean over the targets that each learns from; a student
    that learns from none has the hard loss alone (alpha = 1). Targets are made of the students' logits as
    `topk_targets` makes them, by `topk` (None: none of this student), before any loss is computed.

    hidden `[N, D_i]` of each student, lm_heads its LM head, labels `[N]`; index `[m]` int64: the rows that count, which
    have a label, each once. positions `[m]` int64: their numbers, which seed the draws. num_items: what sums are
    divided by, as in `kd_loss`. chunk_tokens: rows whose logits are in memory at once, of every student.

    Raises KDError as these functions do, and for float16: its gradients are scaled in the backward.
    """
    count, flat = len(hidden), [x.detach().flatten(0, -2) for x in hidden]
    heads, types, want = [], [], []
    for x, lm_head in zip(hidden, lm_heads, strict=True):
        autocast = autocast_type(x)
        check_floats("hidden", x)
        check_lm_head(x, lm_head, any_type=autocast is not None)
        types.append(x.dtype if autocast is None else autocast)
        parts = (x, lm_head.weight, lm_head.bias)
        want.append([torch.is_grad_enabled() and one is not None and one.requires_grad for one in parts])
        bias = None if lm_head.bias is None else lm_head.bias.detach().to(types[-1])
        heads.append(replace(lm_head, weight=lm_head.weight.detach().to(types[-1]), bias=bias))
    if torch.float16 in types:
        raise KDError("hidden: got float16; expected bfloat16, float32 or float64.")
    rows, device, labels_M = len(index), index.device, labels.reshape(-1)[index]
    widths = [len(head.weight) for head in heads]
    if chunk_tokens is None:
        chunk = min(
            default_chunk(device, width, dtype.itemsize, rows=rows) for width, dtype in zip(widths, types, strict=True)
        )
    else:
        chunk = whole_number("chunk_tokens", chunk_tokens, "a number of positions", 1)
    buffers = [
        torch.empty(min(chunk, rows), row_stride(width, device, config.impl), dtype=dtype, device=device)[:, :width]
        for width, dtype in zip(widths, types, strict=True)
    ]
    sums = [[torch.zeros((), device=device) for _ in KDLoss._fields] for _ in range(count)]
    gradients = [_gradients(x, head, dtype, w) for x, head, dtype, w in zip(flat, heads, types, want, strict=True)]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for first in range(0, rows, chunk):
            at = slice(first, min(first + chunk, rows))
            states = [x[index[at]].to(dtype) for x, dtype in zip(flat, types, strict=True)]
            logits = [
                torch.mm(x, head.weight.t(), out=buffer[: len(x)])
                if head.bias is None
                else torch.addmm(head.bias, x, head.weight.t(), out=buffer[: len(x)])
                for x, head, buffer in zip(states, heads, buffers, strict=True)
            ]
            numbers = None if positions is None else positions[at]
            own = [
                None
                if one is None
                else topk_targets(z, config=one, positions=numbers, softcap=h.softcap, logit_scale=h.logit_scale)
                for z, h, one in zip(logits, heads, topk, strict=True)
            ]
            for i, targets in enumerate(sources(at, own)):
                losses = _losses_(logits[i], targets, labels_M[at], heads[i], config, num_items, want_grad=any(want[i]))
                sums[i] = [total + one for total, one in zip(sums[i], losses, strict=True)]
                _add_(gradients[i], logits[i], states[i], heads[i], index[at], first == 0)
    return [_attach(*one) for one in zip(sums, hidden, lm_heads, gradients, strict=True)]


def _gradients(flat: Tensor, head: LMHead, dtype: torch.dtype, want: Sequence[bool]) -> list[Tensor | None]:
    """Of hidden states, weight and bias, to be added to; None for those not wanted."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        torch.zeros_like(flat) if want[0] else None,
        torch.zeros_like(head.weight, dtype=accumulator) if want[1] else None,
        torch.zeros_like(head.bias, dtype=accumulator) if want[2] and head.bias is not None else None,
    ]


def _losses_(
    x_CV: Tensor, sources: Sequence[SparseTargets], labels_C: Tensor, head: LMHead, config: LossConfig,
    num_items: int | Tensor, *, want_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss, hard and soft of raw logits, means over the sources; the logits become the gradient of the loss."""
    if not sources:
        empty = SparseTargets.empty(len(x_CV), 0, vocab_size=x_CV.shape[1], device=x_CV.device)
        sources, config = [empty], replace(config, alpha=1.0, temperature=1.0)
    found, total = [], None
    for number, targets in enumerate(sources, 1):
        # the last one may write over the logits
        z_CV = x_CV if number == len(sources) else x_CV.clone()
        rows = {"labels": labels_C, "mask": None, "weights": None, "num_items": num_items}
        call = make_call("logits", z_CV, z_CV.shape[1], z_CV.dtype, targets, config, rows)
        options = RowOptions(softcap=head.softcap, logit_scale=head.logit_scale, want_grad=want_grad)
        each = rows_of(call, len(z_CV), z_CV.shape[1], z_CV.dtype, options)
        each.loss_(z_CV, 0)
        found.append(each.total())
        if len(sources) > 1 and want_grad:
            total = z_CV.float() if total is None else total.add_(z_CV)
    if total is not None:
        x_CV.copy_(total.div_(len(sources)))
    return tuple(torch.stack(one).mean() for one in zip(*found, strict=True))


def _add_(
    gradients: Sequence[Tensor | None], x_CV: Tensor, states_CD: Tensor, head: LMHead, index: Tensor, first: bool
) -> None:
    """Add a chunk's share to the gradients. x: the gradient of its logits."""
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        d_hidden[index] = torch.mm(x_CV, head.weight).to(d_hidden.dtype)
    if d_weight is not None:
        add_outer_product_(d_weight, x_CV, states_CD, first=first)
    if d_bias is not None:
        d_bias += x_CV.sum(0, dtype=d_bias.dtype)


def _attach(sums: Sequence[Tensor], hidden: Tensor, lm_head: LMHead, gradients: Sequence[Tensor | None]) -> KDLoss:
    loss, hard, soft = sums
    inputs = (lm_head.weight, hidden, lm_head.bias)
    d_hidden, d_weight, d_bias = gradients
    found = (d_weight, None if d_hidden is None else d_hidden.view(hidden.shape), d_bias)
    if wanted := [i for i, gradient in enumerate(found) if gradient is not None]:
        loss = torch.ops.fastkd.attach(
            loss, [inputs[i] for i in wanted], [found[i] for i in wanted], None, None, "torch"
        )
    return KDLoss(loss, hard, soft)
