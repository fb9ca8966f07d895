"""A student's weights and its optimizer's state as whole tensors by name, whatever the processes divide them into."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import TrainError


def model_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once, whole, on the CPU. Every process calls it; keep: where they are
    wanted (elsewhere nothing is returned, nor in memory for long)."""
    return _whole(_named(model), keep)


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put the tensors in. TrainError where the student is another than the one they are of. where: for the message."""
    ours = dict(_named(model))
    _check(ours, tensors, where)
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(_like(tensors[name], tensor))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state of each parameter, as `parameter.key`; as `model_tensors`."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = (
        (f"{names[id(p)]}.{key}", value)
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
    )
    return _whole(found, keep)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the state in. The model's tensors were checked before."""
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        # what counts steps is a number beside the parameter, what is of its shape is divided as it is
        states.setdefault(name, {})[key] = _like(tensor, parameters[name]) if tensor.ndim else tensor.clone()
    for name, state in states.items():
        optimizer.state[parameters[name]] = state


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _whole(named: Any, keep: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in named:
        plain = tensor.detach()
        whole = plain.full_tensor() if isinstance(plain, DTensor) else plain
        if keep:
            found[name] = whole.to("cpu", copy=True)
    return found


def _like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor placed and divided as another."""
    moved = whole.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return moved.clone() if moved is whole else moved
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements)


def _check(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    other = "Train into another folder, or with the student it was begun with."
    if names := sorted(ours.keys() ^ theirs.keys()):
        side = "the checkpoint's student" if names[0] in theirs else "this student"
        raise TrainError(f"{where}: {names[0]} is in {side} alone ({len(names)} such tensors). {other}")
    for name, tensor in ours.items():
        found, need = theirs[name], tensor
        if (found.shape, found.dtype) != (need.shape, need.dtype):
            raise TrainError(
                f"{where}: {name} is {tuple(found.shape)} {found.dtype} there, {tuple(need.shape)} {need.dtype} in this"
                f" student. {other}"
            )
