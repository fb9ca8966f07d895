"""A student on several processes: as it is, in DDP, or in FSDP2; activation checkpointing and compilation of layers."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..errors import TrainError
from ..models.taps import layers_of
from ..stream.batch import AnyBatch
from ..utils.distributed import Processes
from .student import Student


class ParallelStudent:
    """A student on all processes, by DDP or FSDP2; with one process, the student itself.

    DDP and FSDP2 average gradients over processes. Here a micro-batch's loss is divided by the count of the whole step,
    on all processes, so that gradients have to be summed: the loss is multiplied by the number of processes.
    """

    def __init__(self, student: Student, processes: Processes, *, parallel: str) -> None:
        self.student, self._world = student, processes.world_size
        self._module: nn.Module = student
        if self._world == 1:
            return
        if parallel == "fsdp":
            mesh = init_device_mesh(processes.device.type, (self._world,))
            for layer in student.layers:
                fully_shard(layer, mesh=mesh)
            if isinstance(live := student.live, nn.Module):
                for layer in layers_of(live):
                    fully_shard(layer, mesh=mesh)
                fully_shard(live, mesh=mesh)
                if hasattr(live, "logits"):
                    register_fsdp_forward_method(live, "logits")
            fully_shard(student, mesh=mesh)
            for method in ("logits", "answered"):
                register_fsdp_forward_method(student, method)
        else:
            on_gpu = processes.device.type == "cuda"
            self._module = module = DistributedDataParallel(
                student, device_ids=[processes.device] if on_gpu else None, gradient_as_bucket_view=True
            )
            # equal from the start; the argument of this name is deprecated, its successor is not in torch 2.6
            module.broadcast_buffers = False

    def forward_backward(self, batch: AnyBatch, *, last: bool, **arguments: Any) -> dict[str, Tensor]:
        """The student's losses for a micro-batch, detached; their gradients are accumulated. last: of the step, after
        which gradients are summed over processes."""
        return forward_backward(self._module, batch, self._world, last=last, **arguments)

    def forward(self, batch: AnyBatch, **arguments: Any) -> None:
        """Compute the student's losses for a micro-batch, without gradients, for what the objective notes meanwhile."""
        with torch.no_grad():
            self._module(batch, **arguments)

    def reshard(self) -> None:
        """Shard parameters again after `Student.logits` and `answered`, which leave FSDP2's outermost ones complete."""
        for module in self.student.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def forward_backward(
    module: nn.Module, batch: AnyBatch, processes: int, *, last: bool, **arguments: Any
) -> dict[str, Tensor]:
    """See `ParallelStudent.forward_backward`. module: a student, or what wraps it. processes: over which gradients are
    averaged."""
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(last)
    with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
        losses: dict[str, Tensor] = module(batch, **arguments)
        loss = losses["loss"]
        (loss * processes if processes > 1 else loss).backward()  # type: ignore[no-untyped-call]
    return {name: value.detach() for name, value in losses.items()}


def checkpoint_layers(student: Student) -> None:
    """Activation checkpointing of each layer. Raises TrainError if the student has no list of layers.

    The loss is excluded, since it computes its gradients in the forward.
    """
    for part in student.parts.values():
        checkpoint_layers(part.student)
    if student.parts:
        return
    model: Any = student.model
    if getattr(model, "supports_gradient_checkpointing", False):
        options = {"use_reentrant": False}
        if (enable := getattr(model, "activation_checkpointing_enable", None)) is not None:
            enable(activation_checkpointing_kwargs=options)
        else:  # its name in older versions
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return
    for layer in _layers(student, "activation_checkpointing"):
        run = layer.forward
        layer.forward = lambda *args, _run=run, **kwargs: checkpoint(_run, *args, use_reentrant=False, **kwargs)


def compile_layers(student: Student, **options: Any) -> None:
    """torch.compile each layer, also of a teacher inside the student: equal layers share a compilation. options: for
    torch.compile. Raises TrainError without a list of layers.

    dynamic: else the first length and the first number of rows are compiled for themselves. What is left, with lengths
    in buckets (see `stream/buckets.py`), is one case each of training and evaluating, of one row and more, of rows with
    a mask and without.
    """
    inside: list[nn.Module] = layers_of(student.live) if isinstance(student.live, nn.Module) else []
    for layer in [*_layers(student, "compile"), *inside]:
        layer.compile(dynamic=True, **options)


def _layers(student: Student, setting: str) -> list[nn.Module]:
    if not student.layers:
        raise TrainError(
            f"{setting}: {student.name} has no list of layers (an nn.ModuleList of one class), which it needs. "
            "Leave it out."
        )
    return student.layers
