"""Quantisation-aware training (`--quantize int8|int4`): a student whose forward computes with quantised weights.

The weights that are trained stay as they are. Where a module reads its weight, it gets the quantised one, by torchao's
fake quantizers and the schemes of `fastkd.models.quantization`; its gradient is passed to the weight itself, except
where the code was clipped (the straight-through estimator). So the loss, also the one that is fused with the LM head,
is that of the student as its file will be, and its own weights can still be exported in any format.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..kernels import LMHead
from ..models.adapters import has_adapters
from ..models.protocol import Hidden, Output
from ..models.quantization import (
    NONE,
    NOTE,
    SCHEMES,
    Scheme,
    Weights,
    problem_of,
    quantised_modules,
    quantised_weights,
)
from ..models.torchao import load_qat
from ..settings import TrainSettings
from ..utils.distributed import is_dtensor
from .settings_check import check_quantize_after

_MUCH = 0.02  # of the parameters
_MADE = "fastkd_fake_quantised"  # by `_class_of`


class FakeQuantisation:
    """A model whose modules read quantised weights while it is enabled; at first, it is not.

    model: changed in place: the classes of its linear layers, embeddings and convolutions become subclasses, of the
    same names; its parameters, and their names, stay. name: for messages. after: the steps that are made before it is
    enabled. notes: for the user, a line each.
    Raises TrainError if the model cannot be quantised so.
    """

    def __init__(self, model: nn.Module, name: str, scheme: Scheme, after: int) -> None:
        self.scheme, self.after = scheme, after
        _check(model, name, scheme)
        qat = load_qat(TrainError, f"quantize={scheme.name}")
        self.notes = _notes(model, scheme)
        self._weights: list[_FakeWeight] = []
        self._inputs = _FakeInputs(_inputs_of(qat)) if scheme.activation_bits is not None else None
        for module, how in list(quantised_modules(model, scheme)):
            weight = _FakeWeight(_quantizer_of(qat, how))
            self._weights.append(weight)
            kind: Any = type(module)
            module.__class__ = _class_of(kind)
            module.fake_weight = weight
            module.fake_inputs = self._inputs if isinstance(module, nn.Linear) else None
        if (config := getattr(model, "config", None)) is not None:
            setattr(config, NOTE, scheme.to_json())
        self.enable(False)

    def enable(self, enabled: bool) -> None:
        """Whether modules read quantised weights from now on, or their own."""
        self.enabled = enabled
        for one in self._weights:
            one.quantizer.enabled = enabled
        if self._inputs is not None:
            self._inputs.quantizer.enabled = enabled

    @contextmanager
    def always(self) -> Iterator[None]:
        """Context manager: enabled, as for an evaluation."""
        before = self.enabled
        self.enable(True)
        try:
            yield
        finally:
            self.enable(before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager, without gradients: each weight is quantised once, as for the many forwards of sampling, and
        none may change meanwhile. Not for FSDP2, whose parameters come and go."""
        try:
            for one in self._weights:
                one.held = True
            yield
        finally:
            for one in self._weights:
                one.held, one.value = False, None

    def before_lm_head(self, output: Output) -> Output:
        """What the model returned, with the inputs of its LM head quantised: a fused loss does not call that module."""
        if self._inputs is None or not isinstance(output, Hidden) or not isinstance(output.lm_head, LMHead):
            return output
        return replace(output, states=self._inputs(output.states))


class _FakeWeight:
    """A weight as its module reads it. quantizer: torchao's. held: whether it is quantised once, and then kept."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer, self.held = quantizer, False
        self.value: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        if not self.quantizer.enabled:
            return weight
        if self.value is not None:
            return self.value
        # in float32, as the reference: torchao would round the scales of half precision
        value: Tensor = self.quantizer(weight.float().flatten(1)).view(weight.shape).to(weight.dtype)
        if self.held:
            self.value = value
        return value


class _FakeInputs:
    """Inputs of linear layers, each row quantised by its own range. quantizer: torchao's, which has no parameters; it
    is no part of the module."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def __call__(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.quantizer(inputs)
        return found


@cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class of modules whose weight is read as a quantised one."""
    if hasattr(kind, _MADE):  # of a model that was trained before
        return kind

    def weight(self: Any) -> Tensor:
        own: Tensor = self._parameters["weight"]
        # FSDP2 looks for its shards here, outside of forwards
        found: Tensor = own if is_dtensor(own) else self.fake_weight(own)
        return found

    def forward(self: Any, inputs: Tensor, *more: Any, **options: Any) -> Any:
        if self.fake_inputs is not None:
            inputs = self.fake_inputs(inputs)
        return kind.forward(self, inputs, *more, **options)

    def looked_up(self: Any, *given: Any, **options: Any) -> Any:
        rows: Tensor = kind.forward(self, *given, **options)
        # each row has its own scale: the same as rows of the quantised table, which is large
        return self.fake_weight(rows.flatten(0, -2)).view(rows.shape)

    members: dict[str, Any] = {_MADE: True, "weight": property(weight), "forward": forward}
    if kind is nn.Embedding:  # another may scale the rows, which has to come after
        members = {_MADE: True, "forward": looked_up}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), members | names)


def _quantizer_of(qat: Any, how: Weights) -> Any:
    kind = torch.int8 if how.bits == 8 else getattr(torch, f"int{how.bits}")
    options = {"granularity": "per_channel"} if how.group is None else {"group_size": how.group}
    return qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(kind, is_symmetric=True, **options))


def _inputs_of(qat: Any) -> Any:
    return qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))


def _check(model: nn.Module, name: str, scheme: Scheme) -> None:
    got = f"quantize: got {scheme.name!r} for {name}"
    if has_adapters(model):
        raise TrainError(
            f"{got}, which has adapters: in a file they are merged into its weights, which would then be others; "
            "expected a whole model. Merge the adapter (--lora-merge), and train the merged student with quantize."
        )
    if (problem := problem_of(model, scheme)) is not None:
        advice = " Use int8." if scheme.linear.group is not None and "multiple" in problem else ""
        raise TrainError(f"quantize: {problem}.{advice}")
    weights = dict(model.named_parameters())
    for path in quantised_weights(model, scheme):
        if (dtype := weights[path].dtype) not in (torch.float32, torch.bfloat16, torch.float16):
            raise TrainError(f"{got}, whose {path} is {dtype}; expected float32, or half precision.")


def _notes(model: nn.Module, scheme: Scheme) -> list[str]:
    found = quantised_weights(model, scheme)
    rest = {name: p.numel() for name, p in model.named_parameters() if name not in found and p.ndim > 1}
    total = sum(p.numel() for p in model.parameters())
    notes = [
        f"it is trained for {scheme.name}, and evaluated with quantised weights; its folder has the weights before "
        f"they are quantised, for `fastkd export --quantize {scheme.name}`"
    ]
    if sum(rest.values()) > _MUCH * total:
        largest = sorted(rest, key=lambda path: -rest[path])[:2]
        notes.append(
            f"{sum(rest.values()) / total:.0%} of its parameters are in matrices that {scheme.name} leaves as they are "
            f"({', '.join(largest)}{', …' * (len(rest) > 2)})"
        )
    return notes


def fake_quantisation(model: Any, name: str, settings: TrainSettings, steps: int) -> FakeQuantisation | None:
    """What the settings ask for, on a model; None for none, and the model's config then says so. steps: of the
    training. Raises TrainError if it is not possible."""
    if settings.quantize == NONE:
        if hasattr(config := getattr(model, "config", None), NOTE):  # of an earlier training
            delattr(config, NOTE)
        return None
    after = settings.quantize_after or 0
    check_quantize_after(after, steps)
    return FakeQuantisation(model, name, SCHEMES[settings.quantize], after)
