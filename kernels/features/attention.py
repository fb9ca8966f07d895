"""Queries, keys and values of one attention layer, and its maps for a block of query rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..errors import KDError
from .segments import Block, Segments

MASKED = -1e30
"""The logit of a key that a query does not see. It is finite, so that 0 times a difference of two is 0."""


class QueriesKeysValues(NamedTuple):
    """What enters the attention of a layer, at N positions.

    queries `[N, H, d]`; keys `[N, G, d]`; values `[N, G, d]`, or None. Each of the G key heads serves H / G consecutive
        query heads.
    scale: logits are scale · query · key; None: 1 / sqrt(d).
    softcap: they become softcap · tanh(logits / softcap); None: they do not.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None

    @property
    def heads(self) -> int:
        return self.queries.shape[1]

    @property
    def logit_scale(self) -> float:
        return self.queries.shape[2] ** -0.5 if self.scale is None else self.scale

    def check(self, name: str) -> None:
        """Raise KDError, naming the argument that it came from, unless the shapes fit together."""
        q, k, v = self.queries, self.keys, self.values
        fits = q.ndim == k.ndim == 3 and q.shape[::2] == k.shape[::2] and q.shape[1] % max(k.shape[1], 1) == 0
        if not fits or (v is not None and (v.ndim != 3 or v.shape[:2] != k.shape[:2])):
            got = ", ".join(str(tuple(x.shape)) for x in (q, k, v) if x is not None)
            raise KDError(f"{name}: got shapes {got}; expected queries [N, H, d] and keys, values [N, G, d], G | H.")


def split_heads(x_NQ: Tensor, heads: int) -> Tensor:
    """Vectors of all heads as `[N, heads, d]`."""
    return x_NQ.reshape(x_NQ.shape[0], heads, x_NQ.shape[1] // heads)


class KeyHeads:
    """The queries and keys of a layer, those of a key head together, in one floating-point type."""

    def __init__(self, layer: QueriesKeysValues, dtype: torch.dtype) -> None:
        self.scale, self.softcap = layer.logit_scale, layer.softcap
        self.queries, self.groups = layer.queries.detach(), layer.keys.shape[1]
        self.dtype = dtype
        self.keys_GNd = layer.keys.detach().to(dtype).transpose(0, 1).contiguous()

    def queries_of(self, block: Block) -> Tensor:
        """The block's queries, scaled, `[G, H / G · Q, d]`."""
        rows = self.queries[block.start : block.stop].to(self.dtype)
        count, heads, width = rows.shape
        grouped = rows.view(count, self.groups, heads // self.groups, width).permute(1, 2, 0, 3)
        return grouped.reshape(self.groups, -1, width) * self.scale

    def log_maps(self, queries: Tensor, block: Block, mask_QK: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The logarithm of the maps of a block `[H, Q, K]`; the derivative of the softcap, or None without one."""
        logits = queries @ self.keys_GNd[:, block.first : block.last].transpose(1, 2)
        logits = logits.view(-1, block.stop - block.start, block.last - block.first)
        slope = None
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            slope = 1 - logits.square()
            logits.mul_(self.softcap)
        if mask_QK is not None:
            logits.masked_fill_(mask_QK, MASKED)
        return logits.log_softmax(-1), slope


def mask_of(block: Block, visible: tuple[Tensor, Tensor]) -> Tensor | None:
    """The keys of a block that its queries do not see, `[Q, K]` bool; None if they see all. visible:
    `Segments.visible`."""
    if not block.mask:
        return None
    first, last = (x[block.start : block.stop, None] for x in visible)
    keys = torch.arange(block.first, block.last, device=first.device)
    return (keys < first) | (keys >= last)


def attention_maps(
    layer: QueriesKeysValues, rows: slice, segments: Segments | None = None, *, causal: bool = True
) -> Tensor:
    """The attention maps of some query rows, `[H, Q, N]` float32 (float64 of such queries): 0 for keys that a query
    does not see. rows: a slice of the N rows without a step."""
    layer.check("layer")
    start, stop, step = rows.indices(len(layer.queries))
    if step != 1:
        raise KDError(f"rows: got {rows}; expected a slice without a step.")
    dtype = torch.float64 if layer.queries.dtype == torch.float64 else torch.float32
    segments = segments or Segments.one(len(layer.queries))
    block = Block(start, max(start, stop), 0, len(layer.keys), True)
    heads = KeyHeads(layer, dtype)
    mask = mask_of(block, segments.visible(causal, layer.queries.device))
    with without_autocast(layer.queries.device):
        return heads.log_maps(heads.queries_of(block), block, mask)[0].exp_()
