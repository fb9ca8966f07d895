"""The tensors of a training, by name, for checkpoints: weights, buffers and the optimizer's state."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..utils.distributed import ALONE, Processes
from .checkpoint import Checkpoint

MODEL, OPTIMIZER = "model", "optimizer"
"""Names of the groups of tensors in a checkpoint."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, shared ones once. They share memory with the model."""
    return {name: tensor.detach() for name, tensor in _named(model)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state of each parameter, named `parameter.key`. They share memory with the optimizer."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
    }


def load_model(checkpoint: Checkpoint, model: nn.Module, processes: Processes = ALONE) -> None:
    """Load a checkpoint's weights. Raises TrainError if they are those of another student."""
    tensors = model_tensors(model)
    _check(tensors, checkpoint)
    checkpoint.load(MODEL, tensors, processes)


def load_optimizer(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, model: nn.Module, processes: Processes = ALONE
) -> None:
    """Load a checkpoint's optimizer state, after `load_model` has checked that the parameters fit."""
    parameters = dict(model.named_parameters())
    on_device = {
        id(p) for group in optimizer.param_groups if group["fused"] or group["capturable"] for p in group["params"]
    }
    for full, (shape, dtype) in checkpoint.shapes(OPTIMIZER).items():
        name, _, key = full.rpartition(".")
        p = parameters[name]
        if key == "step":  # a counter, not sharded as the parameter is; torch wants it on the CPU or beside it
            optimizer.state[p][key] = torch.empty(shape, dtype=dtype, device=p.device if id(p) in on_device else None)
        else:
            optimizer.state[p][key] = torch.empty_like(p, dtype=dtype, requires_grad=False)
    checkpoint.load(OPTIMIZER, optimizer_tensors(optimizer, model), processes)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _check(ours: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    theirs, advice = checkpoint.shapes(MODEL), "Train into another folder, or with the student the run began with."
    where = checkpoint.folder
    if names := sorted(ours.keys() ^ theirs.keys()):
        side = "the checkpoint's student" if names[0] in theirs else "this student"
        raise TrainError(f"{where}: {names[0]} is in {side} alone ({len(names)} such tensors). {advice}")
    for name, tensor in ours.items():
        shape, dtype = theirs[name]
        if (shape, dtype) != (tuple(tensor.shape), tensor.dtype):
            raise TrainError(
                f"{where}: {name} is {shape} {dtype} there, {tuple(tensor.shape)} {tensor.dtype} in this student. "
                f"{advice}"
            )
