"""A student as an ONNX graph with dynamic batch and length, by `torch.onnx.export(dynamo=True)`.

A causal model of transformers gets one graph for prefill and decoding, with the names that Optimum and Transformers.js
use: input_ids `[batch, length]`, attention_mask `[batch, past + length]`, position_ids `[batch, length]`, and
past_key_values.N.key and .value `[batch, heads, past, width]` (past may be 0) give logits `[batch, rows, V]`, and
present.N.key and .value. num_logits_to_keep, an optional scalar, is the number of last positions that get logits; 0,
its default, means all. Any other model gets a graph from "input" to "logits".
"""

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ....cache.errors import type_name
from ....errors import ExportError
from ....models.hub import brief
from ....utils.quiet import quiet
from ...model import Deployable
from .layers import TRACED, Layers, LayersDiffer, alike_layers, first_layers, repeat_layers
from .ops import ATTENTION, OneOperation, register_attention, table

OPSET = 18
PAST = (3, 5)  # tokens of the example that are in its cache, and that are not
KEEP = "num_logits_to_keep"


class Cached(nn.Module):
    """A causal model of transformers as a function from tensors to tensors. past: keys and values of each layer in
    turn; rows int64 `[R]`: the positions that get logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, rows: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        with OneOperation():
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
                use_cache=True, logits_to_keep=rows,
            )  # fmt: skip
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


class Plain(nn.Module):
    """A model from one tensor to its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        with OneOperation():
            found: Tensor = self.model(inputs)
        return found


def cached_graph(model: Deployable, past: list[Tensor]) -> Any:
    """The graph with a KV cache, as an `onnx_ir.Model`. past: of `keys_and_values`. Raises whatever the export does."""
    alike = alike_layers(model.model, len(past) // 2)
    if alike is not None:
        try:
            return _cached_graph(model, past, alike)
        except LayersDiffer:
            pass  # each has nodes of its own
    return _cached_graph(model, past, None)


def _cached_graph(model: Deployable, past: list[Tensor], alike: Layers | None) -> Any:
    """alike: layers of which the first are traced, and the others repeated."""
    before, length = PAST
    past = past if alike is None else past[: 2 * TRACED]
    layers, dim = len(past) // 2, torch.export.Dim.DYNAMIC
    names = [f"{n}.{kind}" for n in range(layers) for kind in ("key", "value")]
    inputs = {
        "input_ids": model.example[:, :1].repeat(1, length),
        "attention_mask": torch.ones((2, before + length), dtype=torch.int64),
        "position_ids": torch.arange(before, before + length).repeat(2, 1),
        "rows": torch.tensor([1, 2]),
        "past": past,
    }
    both = {0: dim, 1: dim}
    shapes = {"input_ids": both, "attention_mask": both, "position_ids": both, "rows": {0: dim}}
    config: Any = model.model.config
    register_attention()
    kept = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        with nullcontext() if alike is None else first_layers(alike):
            graph = _exported(
                Cached(model.model), inputs, shapes | {"past": [{0: dim, 2: dim}] * len(past)},
                [*list(shapes), *(f"past_key_values.{name}" for name in names)],
                ["logits", *(f"present.{name}" for name in names)],
                lambda graph: None if alike is None else repeat_layers(graph, alike, "model."),
            )  # fmt: skip
    finally:
        config._attn_implementation = kept
    axes = {"input_ids": ("batch", "length"), "attention_mask": ("batch", "total"), "rows": ("rows",)}
    sizes: dict[str, str] = {}
    for value in reversed(graph.graph.inputs):  # those of input_ids last: a size that is the same has its name
        known = axes.get(value.name, ("batch", "length") if value.name == "position_ids" else ("batch", "", "past", ""))
        sizes |= {str(size): name for size, name in zip(value.shape, known, strict=True) if not isinstance(size, int)}
    _name_dimensions(graph, sizes)
    _count_rows_from_the_end(graph)
    return graph


def plain_graph(model: Deployable) -> Any:
    """The graph without a KV cache, as an `onnx_ir.Model`. Raises ExportError if it cannot be exported."""
    dim = torch.export.Dim.DYNAMIC
    shape = {0: dim, 1: dim} if model.kind == "text" else {0: dim}
    try:
        graph = _exported(
            Plain(model.plain), {"inputs": model.example}, {"inputs": shape}, ["input"], ["logits"], lambda _: None
        )
    except Exception as error:
        raise ExportError(
            f"{model.name}: got {type_name(model.model)}, which torch.onnx.export cannot take ({brief(error)}); "
            "expected a model without Python control flow that depends on its inputs."
        ) from error
    sizes = [str(size) for size in graph.graph.inputs[0].shape]
    _name_dimensions(graph, dict(zip(sizes, ["batch", "length"] if model.kind == "text" else ["batch"], strict=False)))
    return graph


def keys_and_values(model: Deployable) -> list[Tensor] | str:
    """The keys and values of each layer, in turn, of an example `[2, PAST[0]]`; or why the model has no such cache."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    takes = inspect.signature(model.model.forward).parameters
    if lacking := [n for n in ("position_ids", "past_key_values", "logits_to_keep") if n not in takes]:
        return f"its forward takes no {lacking[0]}"
    with torch.no_grad():
        cache = model.model(input_ids=model.example[:, : PAST[0]], use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    if not isinstance(cache, DynamicCache) or not all(isinstance(layer, DynamicLayer) for layer in layers):
        return "not all of its layers keep keys and values"
    found = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return found if all(t is not None and t.ndim == 4 for t in found) else "some of its layers share keys and values"


def _exported(
    model: nn.Module, inputs: Any, shapes: Any, names: list[str], outputs: list[str], complete: Callable[[Any], Any]
) -> Any:
    """complete: what is done to the graph before it is made smaller."""
    import onnxscript.optimizer

    with quiet(), torch.no_grad():
        program = torch.export.export(model.eval(), (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
        found = torch.onnx.export(
            program, (), kwargs=inputs, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            input_names=names, output_names=outputs, custom_translation_table=table(),
        )  # fmt: skip
        assert found is not None
        complete(found.model.graph)
        onnxscript.optimizer.optimize_ir(found.model, num_iterations=1, onnx_shape_inference=False)
    return found.model


def _name_dimensions(model: Any, names: dict[str, str]) -> None:
    """Replace the exporter's names of sizes, also in sums, in the inputs and outputs of a graph."""
    import onnx_ir as ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([
            size if isinstance(size, int) else re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(size))
            for size in value.shape
        ])  # fmt: skip


def _count_rows_from_the_end(model: Any) -> None:
    """Replace the input "rows" by `KEEP`: the number of last positions of input_ids that get logits, by default all."""
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    rows = next(value for value in graph.inputs if value.name == "rows")
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    keep = ir.Value(
        name=KEEP, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array(0, np.int64), name=KEEP),
    )  # fmt: skip
    tape = ir.tape.Tape()
    zero, one, end = (
        tape.initializer(ir.tensor(np.array(value, np.int64), name=f"rows.{name}"))
        for name, value in (("zero", 0), ("one", 1), ("end", [2**62]))
    )
    axis = tape.initializer(ir.tensor(np.array([0], np.int64), name="rows.axis"))
    size = tape.op("Squeeze", [tape.op("Shape", [ids], attributes={"start": 1, "end": 2}), axis])
    # [-n:] is the last n for n > 0, and all for n = 0
    begin = tape.op("Unsqueeze", [tape.op("Neg", [keep]), axis])
    found = tape.op("Slice", [tape.op("Range", [zero, size, one]), begin, end, axis])
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.insert_before(graph[0], tape.nodes)
    rows.replace_all_uses_with(found)
    graph.inputs.remove(rows)
    graph.inputs.append(keep)
    graph.register_initializer(keep)
