"""What is exported as one operation each: attention, and linear layers. Traced through, with symbolic shapes, they
would take most of the time of an export, and most of the nodes of its graph.

`TABLE` translates attention to standard operators of ONNX: keys and values are not repeated for grouped queries, but
the queries of a group become rows of one matrix. Linear layers become nodes `fastkd::Linear` (x, weight[, bias]), which
`weights.py` replaces: only there is it known how the weight is quantised.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ATTENTION = "fastkd_onnx"
"""The name of the attention implementation in transformers."""
DOMAIN = "fastkd"


class OneOperation(TorchFunctionMode):
    """Within it, `torch.nn.functional.linear` is one operation of a trace."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return operations()[0](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@cache
def operations() -> tuple[Any, Any]:
    """linear(x, weight, bias), and attention(query, key, value, bias, scale, softcap), registered with torch."""

    @torch.library.custom_op("fastkd::linear", mutates_args=())
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = x @ weight.T
        return product if bias is None else product + bias

    @linear.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @torch.library.custom_op("fastkd::attention", mutates_args=())
    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float) -> Tensor:
        """query `[B, H, L, d]`, key and value `[B, K, T, d]`, bias `[B or 1, 1, L, T]`; returns `[B, L, H, d]`.
        softcap: 0 for none."""
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        mixed = torch.softmax(scores + bias, -1) @ value.repeat_interleave(groups, 1)
        return mixed.transpose(1, 2).contiguous()

    @attention.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float) -> Tensor:
        return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))

    return torch.ops.fastkd.linear.default, torch.ops.fastkd.attention.default


def attention_of(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    softcap: float | None = None, **given: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention implementation `ATTENTION` of transformers. Raises ValueError for what it cannot compute."""
    if attention_mask is None or any(given.get(name) is not None for name in ("position_bias", "s_aux")):
        raise ValueError("its attention has more than a scale, a mask and a soft cap")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return operations()[1](query, key, value, attention_mask, scale, softcap or 0.0), None


@cache
def register_attention() -> None:
    """Make `ATTENTION` known to transformers, with a mask that is added."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, attention_of)
    AttentionMaskInterface.register(ATTENTION, eager_mask)


def table() -> dict[Any, Any]:
    """From operations of torch to functions that build their ONNX nodes, for `torch.onnx.export`."""
    import onnxscript
    from onnx.defs import OpSchema
    from onnxscript import opset18 as op

    one, maybe = OpSchema.FormalParameterOption.Single, OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        "Linear", DOMAIN, 1, type_constraints=[("T", ["tensor(float)"], "")],
        inputs=[OpSchema.FormalParameter(name, "T", param_option=option)
                for name, option in (("x", one), ("weight", one), ("bias", maybe))],
        outputs=[OpSchema.FormalParameter("y", "T")],
    )  # fmt: skip
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), "Linear", schema)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        return node(x, weight) if bias is None else node(x, weight, bias)

    def attention(query: Any, key: Any, value: Any, bias: Any, scale: float, softcap: float) -> Any:
        (heads, width), (kv_heads, value_width) = (
            (int(query.shape[1]), int(query.shape[3])), (int(key.shape[1]), int(value.shape[3])),
        )  # fmt: skip
        groups = heads // kv_heads
        if groups > 1:  # [B, H, L, d] to [B, K, groups * L, d], which lies in memory in the same way
            query = op.Reshape(query, op.Constant(value_ints=[0, kv_heads, -1, width]))
            bias = op.Concat(*[bias] * groups, axis=2)
        query = op.Mul(query, op.Constant(value_float=scale))
        scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
        if softcap:
            scores = op.Tanh(op.Mul(scores, op.Constant(value_float=1 / softcap)))
            scores = op.Mul(scores, op.Constant(value_float=softcap))
        mixed = op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), value)
        if groups > 1:
            mixed = op.Reshape(mixed, op.Constant(value_ints=[0, heads, -1, value_width]))
        return op.Transpose(mixed, perm=[0, 2, 1, 3])

    operations()
    return dict(zip(operations(), (linear, attention), strict=True))
