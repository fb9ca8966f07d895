"""The weights of an exported graph: as they are, or quantised by the scheme of `fastkd.models.quantization`.

| weight | int8 | int4 |
|---|---|---|
| linear layers | DynamicQuantizeMatMul, four scales per output channel; MatMulNBits where I > O | MatMulNBits, 4 bits |
| embedding, LM head | rows of 8-bit codes, MatMulNBits; one copy where they are tied | the same |
| convolutions | 8-bit codes, a scale per output channel, DequantizeLinear | the same |

Both are operators of ONNX Runtime that quantise their inputs to 8 bits, anew for each call, and multiply integers.
DynamicQuantizeMatMul has one range for all rows, so rows are divided by their largest value before it, and multiplied
after: a scale per row, of each quarter of the inputs, as outliers are in few of them.
MatMulNBits has a scale per block of inputs, of weights too: more exact, but with 8 bits slower
than float32 for many rows. So it is used where a layer has more inputs than outputs (the last of an MLP, whose inputs
have outliers), and for the LM head, which is given a single row. Its weights have a scale per block of 32 inputs,
finer than the scheme's per output channel.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ....models.quantization import SCHEMES, Weights, ends_of, quantised_weights, quantize
from .ops import DOMAIN

MICROSOFT = "com.microsoft"
INTEGER_INPUTS = 4  # accuracy_level: 8-bit inputs
PARTS = 4  # of the inputs of a layer, each with its own scales
BLOCK = 32  # inputs that share a scale in MatMulNBits; a last one that is shorter is filled up


class Quantised(NamedTuple):
    """A parameter `[O, I]`, how it is quantised, and whether it is the token embedding or the LM head."""

    values: Tensor
    how: Weights
    end: bool

    @property
    def by_rows(self) -> bool:
        """Whether it is for DynamicQuantizeMatMul."""
        return not self.end and self.how == Weights(8) and self.values.shape[0] >= self.values.shape[1]


def place_weights(graph: Any, model: nn.Module, quantize: str, *, convolutions: bool = True) -> None:
    """Replace what reads weights in an `onnx_ir.Model` of a model (in place): linear layers by products of matrices,
    and where weights are quantised all that reads them. convolutions: whether theirs are."""
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = quantised_weights(model, SCHEMES[quantize]) if quantize in SCHEMES else {}
    ends = {id(end.weight) for end in ends_of(model)}
    quantised: dict[str, Quantised] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (how := chosen.get(names[id(parameter)])) is not None:
            quantised[name] = Quantised(parameter, how, id(parameter) in ends)
    others = SCHEMES[quantize].ends if convolutions and quantize in SCHEMES else None
    _Weights(graph, quantised, others).replace()


class _Weights:
    """quantised: by the name of a parameter. convolutions: how theirs are, if at
    all: by value, as the exporter may have changed them by a normalization that follows."""

    def __init__(self, model: Any, quantised: Mapping[str, Quantised], convolutions: Weights | None) -> None:
        self._model, self._graph, self._convolutions = model, model.graph, convolutions
        self._given = quantised
        self._quantised: dict[Any, Quantised] = {}
        self._made: dict[Any, Any] = {}

    def replace(self) -> None:
        for node in list(self._graph.all_nodes()):
            for value in node.inputs:
                if value is not None and value.is_initializer() and (found := self._find(value.name)) is not None:
                    self._quantised[value] = found
        for node in list(self._graph.all_nodes()):
            if node.domain == DOMAIN:
                self._linear(node)
            elif node.op_type == "Gather" and node.inputs[0] in self._quantised:
                self._embedding(node, node.inputs[0])
            elif node.op_type == "Conv" and self._convolutions is not None and node.inputs[1].is_initializer():
                self._convolution(node, node.inputs[1], self._convolutions)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_input():
                del self._graph.initializers[name]
        self._model.opset_imports.pop(DOMAIN, None)
        if any(node.domain == MICROSOFT for node in self._graph.all_nodes()):
            self._model.opset_imports[MICROSOFT] = 1

    def _find(self, name: str) -> Quantised | None:
        """The parameter of an initializer: its name follows those of the modules around the model."""
        for begin in ("model.model.", "model."):
            if name.startswith(begin) and (found := self._given.get(name.removeprefix(begin))) is not None:
                return found
        return None

    def _linear(self, node: Any) -> None:
        import onnx_ir as ir

        inputs, weight, *bias = node.inputs
        tape = ir.tape.Tape()
        given = self._quantised.get(weight)
        if given is not None and given.by_rows:
            found = self._product_of_rows(inputs, weight, tape)
        elif given is not None:
            parameter, how = given.values, given.how
            codes, scales, block = self._blocks(weight)
            found = tape.op(
                "MatMulNBits", [inputs, codes, scales], domain=MICROSOFT,
                attributes={"K": parameter.shape[1], "N": parameter.shape[0], "bits": how.bits, "block_size": block,
                            "accuracy_level": INTEGER_INPUTS},
            )  # fmt: skip
        else:
            found = tape.op("MatMul", [inputs, self._transposed(weight, tape)])
        for one in bias:
            found = tape.op("Add", [found, one])
        self._put(node, tape, found)

    def _product_of_rows(self, inputs: Any, weight: Any, tape: Any) -> Any:
        """Inputs `[..., I]` times a weight, as the sum over `PARTS` of I: in each, a row is in 8 bits by its largest
        value, and an output channel by its own."""
        values = self._quantised[weight].values
        parts = 1 if values.shape[1] % PARTS else PARTS
        if (weight, "columns") not in self._made:
            self._made[weight, "columns"] = [
                self._columns(some, f"{weight.name}.{part}") for part, some in enumerate(values.chunk(parts, 1))
            ]
        if (inputs, "rows") not in self._made:  # layers that read the same inputs share them
            self._made[inputs, "rows"] = self._rows(inputs, values.shape[1], parts, tape)
        products = [
            tape.op("Mul", [tape.op("DynamicQuantizeMatMul", [rows, *columns], domain=MICROSOFT), largest])
            for (rows, largest), columns in zip(self._made[inputs, "rows"], self._made[weight, "columns"], strict=True)
        ]
        return products[0] if parts == 1 else tape.op("Sum", products)

    def _columns(self, values: Tensor, name: str) -> list[Any]:
        """Codes uint8 `[I, O]`, scales `[O]` and zero points `[O]` of a weight `[O, I]`."""
        import onnx_ir as ir

        codes, scales = quantize(values, Weights(8))
        stored = np.ascontiguousarray((codes.int() + 128).numpy().astype(np.uint8).T)
        zeros = np.full(len(codes), 128, np.uint8)
        return [
            self._initializer(f"{name}.{kind}", ir.tensor(array, name=f"{name}.{kind}"))
            for kind, array in (("codes", stored), ("scales", scales[:, 0].contiguous().numpy()), ("zeros", zeros))
        ]

    def _rows(self, inputs: Any, width: int, parts: int, tape: Any) -> list[tuple[Any, Any]]:
        """For each part of the inputs: its rows divided by their largest value, and that."""
        last, tiny = self._constant("last", np.array([-1], np.int64)), self._constant("tiny", np.float32(1e-30))
        found = []
        for part in range(parts):
            some = inputs
            if parts > 1:
                begin, end = (
                    self._constant(f"at{at}", np.array([at], np.int64))
                    for at in (part * width // parts, (part + 1) * width // parts)
                )
                some = tape.op("Slice", [inputs, begin, end, last])
            largest = tape.op("ReduceMax", [tape.op("Abs", [some]), last], attributes={"keepdims": 1})
            largest = tape.op("Max", [largest, tiny])
            found.append((tape.op("Div", [some, largest]), largest))
        return found

    def _transposed(self, weight: Any, tape: Any) -> Any:
        """The weight `[O, I]` as `[I, O]`: kept so in the file, but for one that is also read otherwise, which is kept
        once and transposed by the runtime."""
        import onnx_ir as ir

        alone = all(node.domain == DOMAIN and index == 1 for node, index in weight.uses())
        if not weight.is_initializer() or not (alone or (weight, "transposed") in self._made):
            return tape.op("Transpose", [weight], attributes={"perm": [1, 0]})
        if (weight, "transposed") not in self._made:
            stored, name = weight.const_value, f"{weight.name}.transposed"
            turned = ir.LazyTensor(
                lambda: ir.tensor(np.ascontiguousarray(stored.numpy().T), name=name),
                dtype=stored.dtype, shape=ir.Shape(tuple(stored.shape)[::-1]), name=name,
            )  # fmt: skip
            self._made[weight, "transposed"] = self._initializer(name, turned)
        return self._made[weight, "transposed"]

    def _embedding(self, node: Any, weight: Any) -> None:
        """Rows of codes, times their scales."""
        import onnx_ir as ir

        tape, rank = ir.tape.Tape(), len(node.inputs[1].shape)
        width = self._quantised[weight].values.shape[1]
        codes, scales, block = self._blocks(weight)
        rows = tape.op("Cast", [tape.op("Gather", [codes, node.inputs[1]])], attributes={"to": ir.DataType.FLOAT})
        rows = tape.op("Sub", [rows, self._constant("zero", np.float32(128))])
        scale = tape.op(
            "Unsqueeze", [tape.op("Gather", [scales, node.inputs[1]]), self._constant("last", np.array([-1], np.int64))]
        )
        found = tape.op(
            "Reshape", [tape.op("Mul", [rows, scale]), self._constant("flat", np.array([0] * rank + [-1], np.int64))]
        )
        if width % block:
            begin, axis = (
                self._constant("begin", np.array([0], np.int64)),
                self._constant("axis", np.array([rank], np.int64)),
            )
            found = tape.op("Slice", [found, begin, self._constant(f"width{width}", np.array([width], np.int64)), axis])
        self._put(node, tape, found)

    def _convolution(self, node: Any, weight: Any, how: Weights) -> None:
        import onnx_ir as ir

        if (weight, "codes") not in self._made:
            values = torch.from_numpy(np.array(weight.const_value.numpy()))
            codes, scales = quantize(values, how)
            stored = (codes.view(values.shape).numpy(), scales[:, 0].contiguous().numpy())
            self._made[weight, "codes"] = [
                self._initializer(f"{weight.name}.{kind}", ir.tensor(array, name=f"{weight.name}.{kind}"))
                for kind, array in zip(("codes", "scales"), stored, strict=True)
            ]
        tape = ir.tape.Tape()
        plain = tape.op("DequantizeLinear", self._made[weight, "codes"], attributes={"axis": 0})
        self._graph.insert_before(node, tape.nodes)
        node.replace_input_with(1, plain)

    def _blocks(self, weight: Any) -> tuple[Any, Any, int]:
        """Codes uint8 `[O, blocks, bytes of a block]`, scales float32 `[O, blocks]`, and inputs per block."""
        import onnx_ir as ir

        if (weight, "blocks") not in self._made:
            parameter, how, _ = self._quantised[weight]
            block = how.group or BLOCK
            finer = how if parameter.shape[1] % block else replace(how, group=block)
            arrays = packed(parameter, finer, block)
            self._made[weight, "blocks"] = (
                *(
                    self._initializer(f"{weight.name}.{kind}", ir.tensor(array, name=f"{weight.name}.{kind}"))
                    for kind, array in zip(("codes", "scales"), arrays, strict=True)
                ),
                block,
            )
        codes, scales, block = self._made[weight, "blocks"]
        return codes, scales, block

    def _constant(self, name: str, value: Any) -> Any:
        import onnx_ir as ir

        name = f"fastkd.{name}"
        found = self._graph.initializers.get(name)
        return self._initializer(name, ir.tensor(np.asarray(value), name=name)) if found is None else found

    def _initializer(self, name: str, tensor: Any) -> Any:
        import onnx_ir as ir

        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _put(self, node: Any, tape: Any, found: Any) -> None:
        """Nodes in the place of a node with one output."""
        before = node.outputs[0]
        found.shape, found.type = before.shape, before.type
        name = before.name
        self._graph.insert_before(node, tape.nodes)
        before.replace_all_uses_with(found, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        found.name = name


def packed(weight: Tensor, how: Weights, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A weight `[O, I]` as MatMulNBits reads it: codes `[O, blocks, block * bits / 8]`, the zero added, of 4 bits two
    in a byte, the lower half first; scales `[O, blocks]`. A last block that is shorter is filled up with zeros."""
    codes, scales = quantize(weight, how)
    outputs, inputs = codes.shape
    count = -(-inputs // block)
    stored = nn.functional.pad(codes.int() - how.low, (0, count * block - inputs), value=-how.low)
    blocks: NDArray[Any] = stored.view(outputs, count, block).numpy().astype(np.uint8)
    if how.bits == 4:
        blocks = blocks[..., ::2] | (blocks[..., 1::2] << 4)
    return blocks, np.ascontiguousarray(scales.expand(outputs, count).numpy(), dtype=np.float32)
