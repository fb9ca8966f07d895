"""How weights are quantised: one description for training (`--quantize`), for every export format, and for their tests.

| weights of | int8 | int4 |
|---|---|---|
| linear layers | 8 bits, a scale per output channel | 4 bits, a scale per group of 32 inputs |
| token embedding, LM head (also tied) | 8 bits, a scale per token | 8 bits, a scale per token |
| convolutions | 8 bits, a scale per output channel | 8 bits, a scale per output channel |
| biases, norms, all else | as they are | as they are |

Symmetric: a group of weights w with the scale s = max|w| / (2^(b-1) - 1/2) has the codes c = clamp(round(w / s),
-2^(b-1), 2^(b-1) - 1), to even at ties, and the values c · s. This is torchao's `MappingType.SYMMETRIC`, which its QAT
and ExecuTorch's 8da4w compute: a positive maximum, at 7.5 steps, is clipped to 7. Inputs of linear layers are also
quantised in int8, anew for each row (`fake_quantize_rows`); in int4 they stay as they are.

`fake_quantize` is the reference: weights as a file of this scheme holds them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

NONE = "none"
SchemeName = Literal["none", "int8", "int4"]
NOTE = "fastkd_quantize"
"""The key of config.json that names the scheme with which a student was trained."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Weights:
    """How one matrix is quantised. bits: of a code. group: inputs that share a scale; None: all of an output channel.

    A weight of more than two dimensions, as a convolution's `[O, I, h, w]`, is taken as `[O, I·h·w]`.
    """

    bits: int
    group: int | None = None

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def text(self) -> str:
        scales = "output channel" if self.group is None else f"group of {self.group} inputs"
        return f"{self.bits} bits, a scale per {scales}"


@dataclass(frozen=True)
class Scheme:
    """linear: of linear layers. ends: of the token embedding, the LM head and convolutions. activation_bits: of the
    inputs of linear layers (and of the LM head); None: they stay as they are."""

    name: str
    linear: Weights
    ends: Weights
    activation_bits: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is noted in config.json."""
        return {"scheme": self.name, "group": self.linear.group}


SCHEMES = {
    "int8": Scheme("int8", Weights(8), Weights(8), activation_bits=8),
    "int4": Scheme("int4", Weights(4, 32), Weights(8)),
}
"""By the name that `--quantize` has."""


class Codes(NamedTuple):
    """A quantised weight. codes int8 `[O, I]`; scales float32 `[O, groups]`, one group where each row has one scale."""

    codes: Tensor
    scales: Tensor


def quantize(weight: Tensor, how: Weights) -> Codes:
    """Codes and scales of a weight `[O, I, ...]`. Raises ValueError if its inputs are no multiple of the group.

    Computed in float32; a group of zeros has the smallest normal number as its scale, as in torchao.
    """
    rows = weight.detach().float().flatten(1)
    inputs = rows.shape[1]
    group = how.group or inputs
    if inputs % group:
        raise ValueError(f"got {inputs} inputs; expected a multiple of {group}")
    groups = rows.reshape(len(rows), -1, group)
    largest = groups.abs().amax(2, keepdim=True)
    scales = (largest / ((how.high - how.low) / 2)).clamp(min=torch.finfo(torch.float32).smallest_normal)
    codes = (groups * (1.0 / scales)).round().clamp(how.low, how.high)  # as torchao: not a division by the scale
    return Codes(codes.flatten(1).to(torch.int8), scales[:, :, 0])


def dequantize(quantized: Codes) -> Tensor:
    """The weight `[O, I]`, float32, that codes and scales stand for."""
    codes, scales = quantized
    groups: Tensor = codes.float().reshape(*scales.shape, -1) * scales[:, :, None]
    return groups.flatten(1)


def fake_quantize(weight: Tensor, how: Weights) -> Tensor:
    """A weight as it is once quantised, in its own shape and type: the reference that all else is compared with.

    Without gradients. Raises ValueError as `quantize`.
    """
    return dequantize(quantize(weight, how)).view(weight.shape).to(weight.dtype)


def fake_quantize_rows(inputs: Tensor, bits: int = 8) -> Tensor:
    """Inputs `[..., I]` of a linear layer as they are once quantised, each row by its own smallest and largest value
    (0 included): dynamic, asymmetric. torchao's int8 per token."""
    low, high = Weights(bits).low, Weights(bits).high
    rows = inputs.detach().float()
    least, most = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
    scale = ((most - least) / (high - low)).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = (low - (least / scale).round()).clamp(low, high)
    codes = ((rows * (1.0 / scale)).round() + zero).clamp(low, high)
    found: Tensor = ((codes - zero) * scale).to(inputs.dtype)
    return found


def quantised_weights(model: nn.Module, scheme: Scheme) -> dict[str, Weights]:
    """How each weight of a model is quantised, by its name as in `named_parameters`; all others stay as they are.

    A weight that several modules share is named once, and is quantised as an end of the model if it is one.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Weights] = {}
    for module, how in quantised_modules(model, scheme):
        name = names[id(module.weight)]
        found[name] = scheme.ends if found.get(name) == scheme.ends else how
    return found


def quantised_modules(model: nn.Module, scheme: Scheme) -> Iterator[tuple[Any, Weights]]:
    """The modules of a model whose weight is quantised, and how."""
    ends = {id(end) for end in ends_of(model)}
    for module in model.modules():
        if id(module) in ends or isinstance(module, _CONVOLUTIONS):
            yield module, scheme.ends
        elif isinstance(module, nn.Linear):
            yield module, scheme.linear


def ends_of(model: Any) -> list[nn.Module]:
    """The token embedding and the LM head of a causal model of transformers, which may share one weight; of any other
    module, none: its embeddings are left as they are, and its last layer is a linear layer as the others."""
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    ends = [getter() for getter in getters if getter is not None]
    return [end for end in ends if isinstance(end, (nn.Embedding, nn.Linear))]


def problem_of(model: nn.Module, scheme: Scheme) -> str | None:
    """Why a model cannot be quantised so, as "got ...; expected ...", or None if it can."""
    names = {id(module): name for name, module in model.named_modules()}
    ends, layers = {id(end) for end in ends_of(model)}, 0
    for module, how in quantised_modules(model, scheme):
        layers += id(module) not in ends
        inputs = module.weight[0].numel()
        if how.group is not None and inputs % how.group:
            return (
                f"got {scheme.name} for {names[id(module)]}, which has {inputs} inputs; expected a multiple of "
                f"{how.group}, the group that shares a scale"
            )
    kind = type(model).__name__
    return None if layers else f"got {scheme.name} for {kind}; expected linear layers or convolutions, which it lacks"


def noted_scheme(folder: Path) -> str:
    """The scheme with which the student in a folder was trained: by its config.json, otherwise by the run.json beside
    the folder; "none" if they say nothing."""
    for path, keys in (
        (folder / "config.json", (NOTE, "scheme")),
        (folder.parent / "run.json", ("settings", "quantize")),
    ):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
        except (OSError, ValueError, KeyError, TypeError):  # absent, or says nothing of it
            continue
        if found in SCHEMES:
            return str(found)
    return NONE
