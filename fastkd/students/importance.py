"""How much each part of a teacher contributes, by its activations on a sample of its cache: one forward pass.

As in Minitron (Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation"), what
matters little is found from activations alone, without gradients. The scores here are mean squares of what a part adds
where it is read, so that a large weight counts as a large activation does:

- a key-value head g, with its query heads: E‖Wo_g o_g‖², of the outputs o_g of its query heads `[H·d]`, by their second
  moments C_g = E[o_g o_gᵀ]: the trace of Wo_g C_g Wo_gᵀ;
- an MLP unit j: E[a_j²] ‖Wdown_j‖², of its activation a_j, which is that of its contribution a_j Wdown_j;
- a hidden channel i: E[x_i²] ‖W_i‖² of the normed states x that the weights W read, as a share of the sum over
  channels, in the mean over what reads states (each attention, each MLP, and the LM head).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.axes import ModelAxes, Shape
from ..models.prune import Kept
from ..models.taps import layers_of
from ..stream.batch import MicroBatch

_OUTPUTS = {"groups": ("self_attn.o_proj", "attn.c_proj"), "mlp": ("mlp.down_proj", "mlp.c_proj")}
_READERS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"),
    ("attn.c_attn",), ("mlp.c_fc",),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Importance:
    """groups `[L, G]`, mlp `[L, M]`, hidden `[D]`: the scores, float64; larger is more important."""

    groups: Tensor
    mlp: Tensor
    hidden: Tensor

    def kept(self, axes: ModelAxes, layers: tuple[int, ...], shape: Shape) -> Kept:
        """The most important parts of each kind, as many as a shape has. layers: those that stay."""
        whole = axes.shape
        return Kept(
            layers,
            None if shape.hidden == whole.hidden else best(self.hidden, shape.hidden),
            {} if shape.groups == whole.groups else {n: best(self.groups[n], shape.groups) for n in layers},
            {} if shape.mlp == whole.mlp else {n: best(self.mlp[n], shape.mlp) for n in layers},
        )


def best(scores: Tensor, count: int) -> Tensor:
    """The numbers of the highest scores, ascending; of equal ones, the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values.cpu()


class Tally:
    """Sums of squares of what enters some modules of a model, recorded by hooks within a `with` statement.

    with Tally(model, axes) as tally:
        for batch in batches:
            tally.of(run)(batch)
    tally.importance()
    """

    def __init__(self, model: Any, axes: ModelAxes) -> None:
        # [B, L] bool: which positions of the micro-batch that is run are no padding; None: nothing is recorded
        self._real: Tensor | None = None
        self._axes, self._model = axes, model
        self._layers = [dict(layer.named_modules()) for layer in layers_of(model)]
        block = axes.query_heads * axes.head_width
        device = model.device
        self._handles: list[Any] = []
        self._out = [next(m[n] for n in _OUTPUTS["groups"] if n in m) for m in self._layers]
        self._down = [next(m[n] for n in _OUTPUTS["mlp"] if n in m) for m in self._layers]
        self._read = [[found for names in _READERS if (found := [m[n] for n in names if n in m])] for m in self._layers]
        shape, count = axes.shape, len(self._layers)
        self._moments = torch.zeros(count, shape.groups, block, block, device=device)
        self._squares = torch.zeros(count, shape.mlp, dtype=torch.float64, device=device)
        self._states = [
            [torch.zeros(shape.hidden, dtype=torch.float64, device=device) for _ in found] for found in self._read
        ]
        self._last = torch.zeros(shape.hidden, dtype=torch.float64, device=device)
        for n in range(count):
            self._on(self._out[n], partial(self._add_heads, self._moments[n]))
            self._on(self._down[n], partial(_add_squares, self._squares[n]))
            for total, readers in zip(self._states[n], self._read[n], strict=True):
                self._on(readers[0], partial(_add_squares, total))
        final = next(m for n, m in model.base_model.named_children() if n in ("norm", "ln_f"))

        def last(module: nn.Module, given: Any, result: Tensor) -> None:
            if self._real is not None:
                _add_squares(self._last, result[self._real].float())

        self._handles.append(final.register_forward_hook(last))

    def _on(self, module: nn.Module, add: Callable[[Tensor], object]) -> None:
        def record(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            if self._real is not None:
                add(given[0][self._real].float())

        self._handles.append(module.register_forward_pre_hook(record))

    def _add_heads(self, moments: Tensor, x: Tensor) -> None:
        blocks = self._blocks(x)
        moments += blocks.transpose(1, 2) @ blocks

    def _blocks(self, x: Tensor) -> Tensor:
        """`[N, Q]` as `[G, N, Q / G]`, by key-value head."""
        return x.reshape(len(x), self._axes.shape.groups, -1).transpose(0, 1)

    def of(self, run: Callable[[MicroBatch], Tensor]) -> Callable[[MicroBatch], Tensor]:
        """A function that runs the model on a micro-batch, and is recorded."""

        def recorded(batch: MicroBatch) -> Tensor:
            self._real = batch.padding_mask()
            try:
                return run(batch)
            finally:
                self._real = None

        return recorded

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def importance(self) -> Importance:
        """The scores, of what was recorded."""
        groups, mlp = [], []
        for n in range(len(self._layers)):
            blocks = self._blocks(inputs_last(self._out[n]))
            groups.append(((blocks @ self._moments[n]) * blocks).sum((1, 2)).double())
            mlp.append(self._squares[n] * column_squares(self._down[n]))
        hidden = [
            total * sum(column_squares(module) for module in readers)
            for found, totals in zip(self._read, self._states, strict=True)
            for readers, total in zip(found, totals, strict=True)
        ]
        hidden.append(self._last * column_squares(self._model.get_output_embeddings()))
        shares = torch.stack([one / one.sum() for one in hidden])
        return Importance(torch.stack(groups), torch.stack(mlp), shares.mean(0))


def _add_squares(total: Tensor, x: Tensor) -> None:
    """Add the sum of squares over positions. total `[D]`, x `[N, D]`."""
    total += x.square().sum(0)


def inputs_last(module: Any) -> Tensor:
    """The weight of a linear module as `[outputs, inputs]`, float32."""
    weight: Tensor = module.weight.float()
    return weight if isinstance(module, nn.Linear) else weight.T  # transformers' Conv1D


def column_squares(module: Any) -> Tensor:
    """‖W_i‖² for each input i, float64."""
    return inputs_last(module).square().sum(0).double()
