"""Weights as GGUF stores them: f32, f16, and blocks of 32 values of a row that share a scale in f16.

| type | scale d of a block | codes | bytes for 32 values |
|---|---|---|---|
| q8_0 | max|w| / 127 | -127 to 127 | 34 |
| q4_0 | the value farthest from 0, / -8 | -8 to 7 | 18 |

A value is code times scale. llama.cpp multiplies such weights with inputs that it quantises to 8 bits in blocks of 32.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....errors import ExportError
from ....models.quantization import Weights, quantize

BLOCK = 32
LARGEST = float(np.finfo(np.float16).max)


def type_of(name: str, weight: Tensor, wanted: str) -> str:
    """The type of a weight in a file of a type. name: in GGUF. Vectors (norms, biases) are f32; in a file of 4 bits,
    the token embedding and the LM head have 8."""
    if weight.ndim < 2:
        return "f32"
    return "q8_0" if wanted == "q4_0" and name in ("token_embd.weight", "output.weight") else wanted


def encode(name: str, weight: Tensor, kind: str, of: str, *, trained: bool) -> NDArray[Any]:
    """The bytes of a weight `[O, I]`, as an array of `[O, bytes of a row]` uint8, or of its type for f32 and f16.

    of: the model, for messages. trained: it was trained with the scheme int4 (`models.quantization`), whose codes q4_0
    then has; without that training the scales of GGUF itself lose less (KL 0.28 against 0.33 nats, SmolLM2's student).
    Raises ExportError for a value that float16 cannot hold.
    """
    import gguf

    if kind == "f32":
        return np.ascontiguousarray(weight.numpy(), np.float32)
    if (largest := float(weight.abs().max())) > LARGEST or largest != largest:
        raise ExportError(f"quantize: got {largest:g} in {name} of {of}; expected at most {LARGEST:g}, for {kind}.")
    if kind == "f16":
        return weight.half().numpy()
    if kind == "q4_0" and trained:
        return _scheme_int4(weight)
    found: NDArray[Any] = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    return found


def _scheme_int4(weight: Tensor) -> NDArray[np.uint8]:
    """Blocks of q4_0 with the values of `fake_quantize`, but for the scale, which is rounded to f16."""
    codes, scales = quantize(weight, Weights(4, BLOCK))
    nibbles = (codes.reshape(-1, 2, BLOCK // 2) + 8).to(torch.uint8)
    packed = (nibbles[:, 0] | (nibbles[:, 1] << 4)).numpy()
    halves = scales.half().reshape(-1, 1).numpy().view(np.uint8)
    return np.concatenate([halves, packed], 1).reshape(len(weight), -1)
