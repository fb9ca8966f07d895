"""The loss as it is defined: dense, in float64, differentiated by autograd. The oracle of the tests."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..divergences import find_divergence
from ..lm_head import LMHead
from ..targets import TargetsAt
from ..vocab_parallel import gather_columns
from .call import Call, RowOptions, saveable
from .checks import check_student
from .torch_impl import counted_rows

_INF = float("inf")


def divergence_rows(u_NV: Tensor, ids_NK: Tensor, at: TargetsAt, divergence: str, parameter: float) -> Tensor:
    """A divergence `[N]`, in nats, of softmax(u) from a teacher's outcomes: the entries of S and, last, the tail.

    parameter: the value of the divergence's parameter; not used by those that have none.
    """
    in_support = at.log_q > -_INF
    ids = ids_NK.long().masked_fill(~in_support, 0)
    on_support = torch.zeros_like(u_NV, dtype=torch.int32).scatter_add_(1, ids, in_support.int()) > 0
    log_p = torch.log_softmax(u_NV, 1)
    log_p_tail = _logsumexp(log_p.masked_fill(on_support, -_INF))
    # entries outside S have probability 0, and the logarithm of it no gradient
    log_p = torch.cat([log_p.gather(1, ids).masked_fill(~in_support, -_INF), log_p_tail[:, None]], 1)
    log_q = torch.cat([at.log_q, at.log_q_tail[:, None]], 1)
    weight = torch.cat([at.weights, at.log_q_tail.exp()[:, None]], 1)
    terms = find_divergence(divergence).oracle_terms(weight, log_q, log_p, parameter)
    rows = torch.where(in_support.any(1), terms.sum(1), 0.0)
    return torch.where(at.log_q_tail.isnan(), torch.nan, rows)


def cross_entropy_rows(z_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy `[N]` in nats; a label outside the vocabulary stands for a row that does not count: 0."""
    valid = (labels_N >= 0) & (labels_N < z_NV.shape[1])
    picked = torch.log_softmax(z_NV, 1).gather(1, labels_N.masked_fill(~valid, 0)[:, None])[:, 0]
    return torch.where(valid, -picked, 0.0)


def kd_loss_reference(
    logits_NV: Tensor, call: Call, upstream: Tensor | None, out_NV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hard and soft of logits; the gradient times `upstream` goes to `out`."""
    part = call.vocab_part(logits_NV.shape[1], RowOptions(want_grad=out_NV is not None))
    whole = logits_NV if part is None else gather_columns(logits_NV, part)
    *losses, gradients = _differentiate(lambda x_CV: x_CV, [whole], [out_NV is not None], call, whole.shape, "logits")
    if out_NV is not None and gradients[0] is not None:
        own = gradients[0] if part is None else gradients[0][:, part.start : part.start + part.size]
        out_NV.copy_(own if upstream is None else own * upstream)
    return losses[0], losses[1], losses[2]


def linear_reference(
    hidden_ND: Tensor, lm_head: LMHead, call: Call, want: list[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Loss, hard, soft of hidden states, and the gradients in hidden, weight and bias; None for those not wanted."""

    def logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        z = hidden_CD @ weight_VD.T
        z = z if bias_V is None else z + bias_V
        z = z if lm_head.logit_scale is None else z * lm_head.logit_scale
        # a masked logit stays −inf
        cap = lm_head.softcap
        return z if cap is None else torch.where(z == -_INF, -_INF, cap * torch.tanh(z / cap))

    weight, bias = lm_head.weight, lm_head.bias
    options = RowOptions(
        softcap=lm_head.softcap, logit_scale=lm_head.logit_scale, want_grad=any(want), what="hidden @ weight.T"
    )
    part = call.vocab_part(weight.shape[0], options)
    if part is not None:
        weight = gather_columns(weight.T, part).T
        bias = None if bias is None else gather_columns(bias[None], part)[0]
    shape = (hidden_ND.shape[0], weight.shape[0])
    *losses, gradients = _differentiate(logits, [hidden_ND, weight, bias], want, call, shape, "hidden @ weight.T")
    if part is not None:
        own = slice(part.start, part.start + part.size)
        gradients = [gradients[0], *(g if g is None else g[own] for g in gradients[1:])]
    return losses[0], losses[1], losses[2], gradients


def _differentiate(
    logits: Callable[..., Tensor],
    inputs: list[Tensor | None],
    want: list[bool],
    call: Call,
    shape: tuple[int, ...],
    what: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Loss, hard, soft, and the gradients in the inputs; None for those not wanted.

    logits: a function of those rows of the first input that count, and of the other inputs. what: its name in messages.
    """
    saved = Call(*map(saveable, call))._replace(targets=call.targets.map(saveable))
    call, index, divisor = counted_rows(saved, *shape)

    def run() -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        leaves = [None if x is None else saveable(x.detach().double()).requires_grad_() for x in inputs]
        # rows that do not count never meet a weight: 0 * NaN would reach its gradient
        rows = leaves[0] if index is None or leaves[0] is None else leaves[0][index]
        z = logits(rows, *leaves[1:])
        check_student(~z.detach().amax(1).isfinite(), what)
        loss, hard, soft = _total(z, call, divisor)
        wanted = [leaf for leaf, w in zip(leaves, want, strict=True) if w and leaf is not None]
        gradients = iter(torch.autograd.grad(loss, wanted) if wanted else ())
        each = [next(gradients) if w else None for w in want]
        return loss.detach().float(), hard.detach().float(), soft.detach().float(), each

    # Inside an operator autograd is off for this thread; in a new one it is on.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _total(z_CV: Tensor, call: Call, divisor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alpha, t = call.numbers()
    at = call.targets.at(t, call.treatment(t), dtype=torch.float64)
    soft = t * t * divergence_rows(z_CV / t, call.targets.ids, at, call.config.divergence, call.config.parameter)
    hard = torch.zeros_like(soft) if call.labels is None else cross_entropy_rows(z_CV, call.labels.long())
    if call.weights is not None:
        soft, hard = soft * call.weights.double(), hard * call.weights.double()
    hard_mean, soft_mean = hard.sum() / divisor.double(), soft.sum() / divisor.double()
    if call.labels is None:
        return soft_mean, torch.full_like(soft_mean, torch.nan), soft_mean
    # a part with factor 0 adds nothing, even where it is infinite
    loss = (alpha * hard_mean if alpha else torch.zeros_like(hard_mean)) + ((1 - alpha) * soft_mean if alpha < 1 else 0)
    return loss, hard_mean, soft_mean


def _logsumexp(x: Tensor) -> Tensor:
    """logsumexp over dim 1 whose gradient is 0, not NaN, in a row that is empty."""
    empty = (x == -_INF).all(1)
    return torch.where(empty, -_INF, torch.logsumexp(x.masked_fill(empty[:, None], 0.0), 1))
