"""Weights as GGUF stores them: f32, f16, and blocks of 32 values of a row that share a scale d in f16.

| type | values | bytes of a block |
|---|---|---|
| q8_0 | d times -127 to 127 | 34 |
| iq4_nl | d times one of 16 levels, which lie closer together near 0 | 18 |
| q4_0 | d times -8 to 7 | 18 |

A student loses less in iq4_nl than in q4_0; but one that was trained for int4 loses nothing in q4_0, whose values are
those of that training. llama.cpp multiplies such weights with inputs that it quantises to 8 bits in blocks of 32.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....errors import ExportError
from ....models.quantization import Weights, quantize
from .llama_cpp import quantize_rows

BLOCK = 32
LARGEST = float(np.finfo(np.float16).max)


def type_of(name: str, weight: Tensor, wanted: str) -> str:
    """The type of a weight in a file of a type. name: in GGUF. Vectors (norms, biases) are f32; in a file of 4 bits,
    the token embedding and the LM head have 8."""
    if weight.ndim < 2:
        return "f32"
    return "q8_0" if "q4" in wanted and name in ("token_embd.weight", "output.weight") else wanted


def encode(name: str, weight: Tensor, kind: str, of: str) -> NDArray[Any]:
    """The bytes of a weight `[O, I]`, as an array of `[O, bytes of a row]` uint8, or of its type for f32 and f16.

    of: the model, for messages. Raises ExportError for a value that float16 cannot hold.
    """
    import gguf

    if kind == "f32":
        return np.ascontiguousarray(weight.numpy(), np.float32)
    if (largest := float(weight.abs().max())) > LARGEST or largest != largest:
        raise ExportError(f"quantize: got {largest:g} in {name} of {of}; expected at most {LARGEST:g}, for {kind}.")
    if kind == "f16":
        return weight.half().numpy()
    if kind == "q4_0":
        return _scheme_int4(weight)
    number = gguf.GGMLQuantizationType[kind.upper()]
    if kind == "iq4_nl":  # which the package gguf can only read
        return quantize_rows(weight.numpy(), int(number), gguf.GGML_QUANT_SIZES[number])
    found: NDArray[Any] = gguf.quants.quantize(weight.numpy(), number)
    return found


def _scheme_int4(weight: Tensor) -> NDArray[np.uint8]:
    """Blocks of q4_0 with the values of the scheme int4 (`models.quantization`), but for the scale, rounded to f16."""
    codes, scales = quantize(weight, Weights(4, BLOCK))
    nibbles = (codes.reshape(-1, 2, BLOCK // 2) + 8).to(torch.uint8)
    packed = (nibbles[:, 0] | (nibbles[:, 1] << 4)).numpy()
    halves = scales.half().reshape(-1, 1).numpy().view(np.uint8)
    return np.concatenate([halves, packed], 1).reshape(len(weight), -1)
