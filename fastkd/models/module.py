"""A torch module's return value as an `Output`, and properties of a module, determined with a probe input."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.errors import type_name
from ..kernels import LMHead
from .hub import brief
from .protocol import Hidden, Logits, Output

TEXT, EXAMPLES = "[B, L, V]", "[B, V]"  # shapes of logits


def output_of(value: Any, name: str, shape: str | None, error: type[Exception]) -> Output:
    """A module's return value as an `Output`: `Hidden` and `Logits` as they are, a tensor of logits, or an object or a
    dictionary with `logits`.

    name: of the model, for messages. shape: of the logits, `TEXT` or `EXAMPLES`; None: either. error: the exception
    raised for any other value.
    """
    if isinstance(value, (Hidden, Logits)):
        return value
    if isinstance(value, Mapping) and not hasattr(value, "logits"):
        logits = value.get("logits")
    else:
        logits = value if isinstance(value, Tensor) else getattr(value, "logits", None)
    dimensions = (2, 3) if shape is None else (shape.count(",") + 1,)
    if isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim in dimensions:
        return Logits(logits)
    expected = shape or f"{TEXT} or {EXAMPLES}"
    of_shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
    raise error(
        f"{name}: got {type_name(value)}{of_shape} from the model; expected logits {expected}, an object or a "
        "dictionary with `logits`, or fastkd.teachers.Hidden."
    )


def detached(output: Output) -> Output:
    """An output as a teacher's answer: without gradients, and under autocast with states and LM head in its type, as
    the loss has them."""
    if isinstance(output, Logits):
        return Logits(output.values.detach())
    states, head = output.states.detach(), output.lm_head
    if not isinstance(head, LMHead):
        return Hidden(states, head)
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Hidden(states.to(dtype), replace(head, weight=head.weight.detach().to(dtype), bias=bias))


def run_probe(model: Callable[..., Any], probe: Tensor, name: str, shape: str, error: type[Exception]) -> Output:
    """The output of a module for a probe input, a batch of one. Raises `error` if the module fails on it."""
    try:
        value = model(probe)
    except Exception as problem:
        raise error(failure_on(model, probe, name, problem)) from problem
    return output_of(value, name, shape, error)


def failure_on(model: Callable[..., Any], probe: Tensor, name: str, problem: Exception) -> str:
    """That a model fails on an input, a batch of one, with what to do about it: a sentence or two."""
    what = "token ids" if probe.dtype == torch.int64 and probe.ndim == 2 else "an example"
    text = f"{name}: {type(model).__name__} fails on {what} of shape {tuple(probe.shape)} {probe.dtype} "
    text += f"({brief(problem)}). "
    if what == "token ids":
        return text + (
            "Expected a module that maps them to logits, or to hidden states and an LM head. For a classifier, give "
            "its examples as the data."
        )
    takes = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if _runs(model, probe, dtype)]
    if not takes:
        return text + "Expected a module that maps examples `[B, ...]` to logits `[B, V]`."
    scaled = ", scaled as in its training, such as pixels / 255 and then its normalization"
    return (
        text + f"It takes {_plain(takes[0])}: give examples of that type{'' if probe.is_floating_point() else scaled}."
    )


def _runs(model: Callable[..., Any], probe: Tensor, dtype: torch.dtype) -> bool:
    try:
        with torch.no_grad():
            model(probe.to(dtype))
    except Exception:  # whatever a model raises, it does not take these
        return False
    return True


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def logits_width(output: Output) -> int:
    """V, the width of an output's logits."""
    if isinstance(output, Logits):
        return int(output.values.shape[-1])
    if isinstance(output.lm_head, LMHead):
        return len(output.lm_head.weight)
    return int(output.lm_head(output.states.flatten(0, -2)[:1]).shape[-1])


def separates_documents(run: Callable[..., Tensor], tokens: Tensor) -> bool:
    """Whether a model separates the documents of a packed row by their position_ids: whether its output for a document
    is the same behind another one as alone.

    run: called with input_ids and position_ids `[1, L]`. tokens int64 `[B, L]`: the first row is used.
    """
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)[None]
    other = (tokens[:1] + 1) % (int(tokens.max()) + 2)
    try:
        alone = run(input_ids=tokens[:1], position_ids=positions)
        packed = run(input_ids=torch.cat([other, tokens[:1]], 1), position_ids=torch.cat([positions, positions], 1))
    except Exception:  # takes no position_ids, or fails on restarting ones
        return False
    bound = max(1e-5, 4 * torch.finfo(alone.dtype).eps) * float(alone.abs().max())
    return bool(((packed[:, length:] - alone).abs() <= bound).all())


def parameters_and_bytes(model: nn.Module) -> tuple[int, int]:
    """The number of a module's parameters, shared ones counted once, and their bytes."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def state_sha256(module: nn.Module) -> str:
    """sha256 of a module's parameters and buffers: names, types, shapes and bytes."""
    return tensors_sha256({**dict(module.named_parameters()), **dict(module.named_buffers())})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{plain.dtype}:{tuple(plain.shape)};".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
