"""From a teacher's logits, or its last hidden states, to SparseTargets: top-k entries, tails and draws."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, Unpack

import torch
from torch import Tensor

from ..arguments import describe, whole_number
from ..errors import KDError
from ..lm_head import LMHead, as_lm_head, check_floats, check_lm_head
from ..targets import SparseTargets
from ..vocab_parallel import VocabPart, check_vocab_start, exchange_parts, group_name, read_part
from .config import TopKCall, TopKConfig, TopKSettings, topk_config
from .fill import fill_rows, unfilled
from .torch_impl import TORCH

Fill = Callable[[Tensor, SparseTargets, TopKCall, Tensor, int], None]  # fills in targets of rows: see `fill_rows`
IMPLEMENTATIONS = ("auto", "torch", "numba", "triton")
MAX_TRITON_K = 1024

CHUNK_TOKENS = 2048  # of the LM head's product on a GPU, where the product is then as fast as an unchunked one
ROW_ALIGNMENT = 64  # logits
CHUNK_BYTES = 64 << 20  # of the same on a CPU: the weights are read again for every chunk


@torch.no_grad()
def topk_targets(
    logits: Tensor,
    k: int | None = None,
    *,
    config: TopKConfig | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    impl: str = "auto",
    **settings: Unpack[TopKSettings],
) -> SparseTargets:
    """Sparse targets of a teacher's logits: top-k entries, the tail's log-partitions, and draws from the tail.

    logits `[N, V]` or `[..., V]`: rows in row-major order; bfloat16, float16, float32 or float64, of any stride. −inf
        marks a token that is no outcome.
    k, settings: fields of TopKConfig as keyword arguments (mass=0.9, draws=16, temperatures=(1.0, 2.0), ...), which
        win over the config's.
    positions: int64, shape `[N]` or that of the logits without V: each row's number in the data set (default: 0 to
        N - 1). With the seed and the logits it decides the draws, bit for bit, on any device and in any batching. See
        `draws.py` for what is approximated.
    logit_scale, softcap: the LM head's transform of the logits: z = logits·logit_scale (1e-30 to 1e30), then
        softcap·tanh(z/softcap) (1e-3 to 1e4; right to softcap·1e-7), in float32 (float64 for float64 logits).
    impl: "triton" (CUDA, or a CPU under the Triton interpreter), "numba" (a CPU, with Numba installed), "torch", or
        "auto": triton for CUDA tensors, except float64 ones and k above 1024; numba on a CPU if it is installed, except
        for float64; else torch. All give the same top-k entries and draws to the bit, and sums within 1e-6.

    Returns targets of K = min(k, V) + draws entries a row, detached from autograd. Drawn entries follow the top-k
    entries, best first; a row with an empty tail has none.

    A row with NaN, with +inf, with no finite logit, or with logits that float32 cannot hold after `logit_scale` or
    relative to the row's best, raises KDError on the CPU; on a GPU nothing waits for the device, and the row's logprobs
    and tail are NaN. KDError if the arguments do not fit together.
    """
    check_floats("logits", logits)
    call = _call("logits", logits.shape[-1], topk_config(k, config, settings), softcap, logit_scale)
    positions_N = _positions(positions, logits, "logits")
    fill = _filler(impl, logits, call)
    out = unfilled(call, positions_N.numel(), logits.device)
    start = 0
    for rows_NV in _as_rows(logits):
        some = slice(start, start + len(rows_NV))
        fill(rows_NV, out[some], call, positions_N[some], start)
        start = some.stop
    return out


@torch.no_grad()
def linear_topk_targets(
    hidden: Tensor,
    weight: Tensor | LMHead,
    k: int | None = None,
    *,
    config: TopKConfig | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    chunk_tokens: int | None = None,
    positions: Tensor | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    impl: str = "auto",
    **settings: Unpack[TopKSettings],
) -> SparseTargets:
    """`topk_targets` of the logits `hidden @ weight.T + bias`, of which only a chunk of tokens is ever in memory.

    hidden `[N, D]` or `[..., D]`, weight `[V, D]`, bias `[V]`, all of one dtype on one device. weight may be an LMHead,
    which brings bias, softcap and logit_scale with it.
    chunk_tokens: tokens whose logits are computed at a time, into one reused buffer of that dtype (default: 2048 on a
        GPU, about 64 MB of logits on a CPU).
    group: a torch.distributed.ProcessGroup over whose ranks the vocabulary is divided: `weight` and `bias` hold this
        rank's part, of any size from 1. All other arguments are the same on all ranks, and so is the result: that of
        the whole vocabulary, with global ids. Top-k entries and draws are to the bit what one rank makes of the same
        logits, sums within 1e-6. For each chunk, ranks exchange their best entries and sums, some (16·k + 60) bytes a
        row; then draws, which take one exchange of some bytes a draw more. Draws wait for the device.
    vocab_start: this rank's first column. Default: the parts lie in the order of the ranks.

    The other arguments, the result and the errors are those of `topk_targets`.
    """
    lm_head = as_lm_head(weight, bias, softcap, logit_scale)
    check_floats("hidden", hidden)
    check_lm_head(hidden, lm_head)
    if chunk_tokens is not None:
        chunk_tokens = whole_number("chunk_tokens", chunk_tokens, "a number of positions", 1)
    positions_N = _positions(positions, hidden, "hidden")
    vocab, vocab_start, part = len(lm_head.weight), check_vocab_start(vocab_start, group), None
    if group is not None:
        name = group_name(group)
        known = (
            topk_config(k, config, settings),
            lm_head.softcap,
            lm_head.logit_scale,
            chunk_tokens,
            positions_N.numel(),
        )
        part = read_part(name, exchange_parts(name, vocab, vocab_start, hidden.device, repr(known)), None, "weight")
        hidden = hidden.reshape(-1, hidden.shape[-1])  # chunks are the same on all ranks, whatever the strides
    total, widest = (vocab, vocab) if part is None else (part.total, part.widest)
    call = _call("weight", total, topk_config(k, config, settings), lm_head.softcap, lm_head.logit_scale)
    fill = _filler(impl, hidden, call) if part is None else _divided_filler(impl, hidden, call, part)
    rows = positions_N.numel()
    if chunk_tokens is None:
        chunk_tokens = default_chunk(hidden, widest)
    out = unfilled(call, rows, hidden.device)
    # On a GPU, rows that all begin at an aligned address: kernels load vectors whatever the vocabulary.
    width = vocab if hidden.device.type == "cpu" else -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT
    buffer = torch.empty((min(chunk_tokens, rows), width), dtype=hidden.dtype, device=hidden.device)[:, :vocab]
    start = 0
    # autocast would turn the operands of a matrix product into another dtype than the buffer's
    with torch.autocast(hidden.device.type, enabled=False):
        for some_hidden in _as_rows(hidden):
            for first in range(0, len(some_hidden), chunk_tokens):
                chunk_CD = some_hidden[first : first + chunk_tokens]
                some = slice(start, start + len(chunk_CD))
                logits_CV = buffer[: len(chunk_CD)]
                if lm_head.bias is None:
                    torch.mm(chunk_CD, lm_head.weight.t(), out=logits_CV)
                else:
                    torch.addmm(lm_head.bias, chunk_CD, lm_head.weight.t(), out=logits_CV)
                fill(logits_CV, out[some], call, positions_N[some], start)
                start = some.stop
    return out


def default_chunk(hidden: Tensor, vocab_size: int) -> int:
    """Tokens whose logits `linear_topk_targets` computes at a time, for these hidden states."""
    if hidden.device.type != "cpu":
        return CHUNK_TOKENS
    return max(1, CHUNK_BYTES // (vocab_size * hidden.element_size()))


def _as_rows(tensor: Tensor) -> list[Tensor]:
    """`[..., V]` as as few `[n, V]` views as its strides allow, in row-major order. Nothing is copied."""
    if tensor.ndim <= 2:
        return [tensor[None] if tensor.ndim == 1 else tensor]
    try:
        return [tensor.view(-1, tensor.shape[-1])]
    except RuntimeError:  # these leading dimensions have no single stride: logits[:, :-1], for one
        return [rows for part in tensor for rows in _as_rows(part)]


def _call(name: str, vocab_size: int, config: TopKConfig, softcap: float | None, logit_scale: float | None) -> TopKCall:
    """The config applied to rows of `vocab_size` logits. name: the argument that has them, for a message."""
    if vocab_size < 1:
        raise KDError(f"{name}: got a vocabulary of 0 tokens; expected at least one.")
    return TopKCall(**vars(config), vocab_size=vocab_size, softcap=softcap, logit_scale=logit_scale)


def _positions(positions: Tensor | None, rows: Tensor, what: str) -> Tensor:
    """Global positions int64 `[N]` for `rows` `[..., X]`."""
    leading = tuple(rows.shape[:-1])
    count = math.prod(leading)
    if positions is None:
        return torch.arange(count, device=rows.device)
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        raise KDError(f"positions: got {describe(positions)}; expected a tensor of torch.int64.")
    if tuple(positions.shape) not in (leading, (count,)):
        raise KDError(f"positions: got shape {tuple(positions.shape)}; expected ({count},), a row of {what} each.")
    if positions.device != rows.device:
        raise KDError(f"positions: got a tensor on {positions.device}; expected {rows.device}, as of {what}.")
    return positions.reshape(-1)


def _filler(impl: str, rows: Tensor, call: TopKCall) -> Fill:
    """The function that fills in targets of rows of this type on this device. KDError for an `impl` that cannot."""
    impl = _implementation(impl, rows, call)
    if impl == "triton":
        from .triton_impl import fill_triton

        return fill_triton
    if impl == "numba":
        from .numba_impl import NUMBA

        return partial(fill_rows, NUMBA)
    return partial(fill_rows, TORCH)


def _divided_filler(impl: str, rows: Tensor, call: TopKCall, part: VocabPart) -> Fill:
    """`_filler` of rows of which this rank has the columns `part`."""
    from .divided import DividedFill

    impl = _implementation(impl, rows, call)
    if impl == "triton":
        from .triton_impl import TritonSweeps

        return DividedFill(TritonSweeps(), part)
    if impl == "numba":
        from .numba_impl import NUMBA

        return DividedFill(NUMBA, part)
    return DividedFill(TORCH, part)


def _implementation(impl: str, rows: Tensor, call: TopKCall) -> str:
    """ "triton", "numba" or "torch" for rows of this type on this device."""
    if impl not in IMPLEMENTATIONS:
        raise KDError(f"impl: got {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}.")
    half_or_single, on_gpu = rows.dtype != torch.float64, rows.device.type == "cuda"
    numba = rows.device.type == "cpu" and half_or_single and _numba_installed()
    if impl == "auto":
        triton = on_gpu and half_or_single and call.entries <= MAX_TRITON_K
        return "triton" if triton else "numba" if numba else "torch"
    if impl == "triton":
        from .triton_impl import INTERPRETED

        if not half_or_single or call.entries > MAX_TRITON_K:
            raise KDError(
                f"impl: got 'triton' for {rows.dtype} and {call.entries} top-k entries; expected at most float32 and "
                f"{MAX_TRITON_K} entries. Use impl='torch'."
            )
        if not on_gpu and not INTERPRETED:
            raise KDError(
                f"impl: got 'triton' for tensors on {rows.device}; expected CUDA tensors, or the Triton interpreter "
                "(TRITON_INTERPRET=1 before triton is imported). Use impl='auto'."
            )
    if impl == "numba" and not numba:
        raise KDError(
            f"impl: got 'numba' for {rows.dtype} on {rows.device}; expected a CPU tensor, at most float32, and the "
            "package numba (pip install 'fastkd[cpu]'). Use impl='auto'."
        )
    return impl


def prepare_topk(device: torch.device) -> str:
    """Compile the CPU code of `topk_targets` now, not in its first call. Returns a message for the user, or ""."""
    if device.type != "cpu":
        return ""
    if not _numba_installed():
        return "top-k: by PyTorch, at a third of the speed of compiled code: pip install 'fastkd[cpu]' (Numba)"
    from .numba_impl import compile_all

    seconds = compile_all()
    return f"top-k: compiled for this CPU in {seconds:.0f} s, and kept" if seconds > 3 else ""


@lru_cache(maxsize=1)
def _numba_installed() -> bool:
    return find_spec("numba") is not None
