"""Smoothing: the scale of input channels is moved into the weights, so that 8 bits hold more of layers' inputs.

A few channels of what a norm gives are far larger than the others, and set the scale that all share. As in SmoothQuant
(Xiao et al. 2022), channel i of a layer's inputs is divided by s_i, and the weights that it meets are multiplied by it:
(x / s) · (W s) = x · W. The division is part of what gives the inputs:

| inputs of | are divided in |
|---|---|
| linear layers after a norm (q, k, v; gate, up; the LM head) | the norm's weight, and bias |
| the last layer of a gated MLP | the rows of the layer that the gate multiplies |

A tied LM head takes the token embedding with it, whose rows are then divided as they are read (`DividedEmbedding`).

s_i = sqrt(rms of input i / rms of its weights), which makes both alike over the channels. That the smoothed model gives
the same logits is checked.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.quantization import NONE, ends_of, noted_scheme
from .model import Deployable

POSITIONS = 512
"""Positions of text, or examples, on which inputs are measured at least."""
TOLERANCE = 1e-4


class DividedEmbedding(nn.Embedding):
    """A token embedding whose rows are multiplied by factor `[D]`."""

    factor: Tensor

    def __init__(self, embedding: nn.Embedding, factor: Tensor) -> None:
        tokens, width = embedding.weight.shape
        super().__init__(tokens, width, embedding.padding_idx, _weight=embedding.weight.detach())
        self.weight = embedding.weight  # the parameter itself, which an LM head shares
        self.register_buffer("factor", factor)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


class _Group(NamedTuple):
    """Linear layers that read the same inputs, and what gives these: a norm, or the linear layer that a gate
    multiplies."""

    source: Any
    readers: list[Any]


def smoothed(model: Deployable, inputs: Iterable[Tensor] | None, *, tied: bool = True) -> tuple[Deployable, list[str]]:
    """A copy of a model whose layers' inputs are smoothed, and notes; the model itself where that cannot be, or where
    training has fitted its weights to the codes that they have.

    inputs: batches of the training split (see `Calibration`), or None without a cache. tied: whether an LM head that
    shares its weight with the token embedding is smoothed, which needs a format in which embeddings can be divided.
    """
    given = model.model
    if model.folder is not None and noted_scheme(model.folder) != NONE:
        return model, []
    shared = {id(tensor): tensor for tensor in (*given.parameters(), *given.buffers())}
    made = replace(model, model=copy.deepcopy(given, shared))  # of the modules, not of the weights
    with torch.no_grad():
        groups = _groups(made, tied=tied)
        if not groups:
            return model, []
        if inputs is None:
            return model, ["inputs of layers are not smoothed, which costs quality: that needs a cache."]
        for group, squares in zip(groups, _mean_squares(made, groups, inputs), strict=True):
            _divide(made.model, group, squares)
        expected = model.plain(model.example)
        error = float((made.plain(model.example) - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        return model, [f"inputs of layers are not smoothed: logits would differ by {error:.2g} of the largest."]
    return made, []


def _groups(model: Deployable, *, tied: bool) -> list[_Group]:
    """What can be smoothed, by a pass over the example: linear layers whose inputs are what a norm gave, in memory."""
    module = model.model
    ends = ends_of(module)
    weights: dict[int, int] = {}  # modules that have a parameter
    for one in module.modules():
        for parameter in one.parameters(recurse=False):
            weights[id(parameter)] = weights.get(id(parameter), 0) + 1
    calls: dict[Any, int] = {}
    given: dict[Any, Any] = {}
    found: dict[Any, list[Any]] = {}
    kept: list[Tensor] = []  # so that no place in memory is used twice

    def called(one: Any, args: Any, output: Any) -> None:
        calls[one] = calls.get(one, 0) + 1
        if isinstance(output, Tensor) and _is_norm(one) and output.shape[-1] == one.weight.shape[0]:
            given[_place(output)] = one
            kept.append(output)
        elif isinstance(one, nn.Linear) and (norm := given.get(_place(args[0]))) is not None:
            found.setdefault(norm, []).append(one)

    with _hooked([one for one in module.modules() if _is_norm(one) or isinstance(one, nn.Linear)], called):
        model.plain(model.example)
    groups = [_Group(*pair) for pair in found.items()]
    for one in module.modules():
        parts = dict(one.named_children())
        gate, up, down = (parts.get(name) for name in ("gate_proj", "up_proj", "down_proj"))
        if all(isinstance(part, nn.Linear) for part in (gate, up, down)):
            groups.append(_Group(up, [down]))

    def alone(one: Any) -> bool:
        """Whether it runs once, and no other module has its parameters: but for a tied LM head."""
        most = 2 if tied and len(ends) == 2 and one is ends[1] and ends[0].weight is one.weight else 1
        return calls.get(one) == 1 and all(weights[id(p)] <= most for p in one.parameters())

    return [group for group in groups if all(alone(one) for one in (group.source, *group.readers))]


def _is_norm(one: nn.Module) -> bool:
    """Whether it has a weight per channel, and no other modules: RMSNorm and LayerNorm, of whatever name."""
    weight = getattr(one, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and not any(one.children())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    handles = [one.register_forward_hook(hook) for one in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_squares(model: Deployable, groups: list[_Group], inputs: Iterable[Tensor]) -> list[Tensor]:
    """Of each group's inputs, by channel, over `POSITIONS`."""
    sums: dict[Any, Tensor] = {}
    rows: dict[Any, int] = {}

    def measure(one: Any, args: Any, output: Any) -> None:
        flat = args[0].reshape(-1, args[0].shape[-1])
        sums[one] = sums.get(one, 0) + flat.double().square().sum(0)
        rows[one] = rows.get(one, 0) + len(flat)

    seen = 0
    with _hooked([group.readers[0] for group in groups], measure):
        for batch in inputs:
            some = batch[:, : model.max_positions] if model.kind == "text" else batch
            model.plain(some)
            seen += some.numel() if model.kind == "text" else len(some)
            if seen >= POSITIONS:
                break
    return [sums[group.readers[0]] / rows[group.readers[0]] for group in groups]


def _divide(model: Any, group: _Group, squares: Tensor) -> None:
    """Divide a group's inputs by s, in place; parameters become new ones."""
    weights = torch.cat([one.weight for one in group.readers]).double().square().mean(0)
    usable = (squares > 0) & (weights > 0)
    exponents = torch.where(usable, (squares / weights).log() / 4, 0.0)
    middle = exponents.sum() / usable.sum().clamp_min(1)
    scale = torch.where(usable, (exponents - middle).exp(), 1.0).float()
    ends: list[Any] = [*ends_of(model)]
    for one in group.readers:
        tied = one in ends and isinstance(ends[0], nn.Embedding) and ends[0].weight is one.weight
        one.weight = _parameter(one.weight * scale)
        if tied:
            ends[0].weight = one.weight
            model.set_input_embeddings(DividedEmbedding(ends[0], getattr(ends[0], "embed_scale", 1.0) / scale))
    source = group.source
    if getattr(source, "bias", None) is not None:
        source.bias = _parameter(source.bias / scale)
    if isinstance(source, nn.Linear):
        source.weight = _parameter(source.weight / scale[:, None])
    elif _adds_one(source):
        source.weight = _parameter((1 + source.weight) / scale - 1)
    else:
        source.weight = _parameter(source.weight / scale)


def _adds_one(norm: Any) -> bool:
    """Whether a norm multiplies by 1 + weight, as Gemma's: with a weight of zeros, its output is then none."""
    other = copy.deepcopy(norm)
    other.weight, other.bias = _parameter(torch.zeros_like(norm.weight)), None
    return bool(other(torch.arange(1.0, 1.0 + len(norm.weight))[None]).any())


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
