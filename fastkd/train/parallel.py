"""The processes that train one student together, and what wraps it in them: nothing, DDP or FSDP2.

Everything is torch.distributed's own; why, LOG.md says under "Training".
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..errors import TrainError
from ..kernels import KDLoss
from ..stream.batch import AnyBatch
from ..utils.distributed import Processes
from .student import Student


class Wrapped:
    """A student as the processes share it: call it with a micro-batch, go backward from what it returns.

    DDP and FSDP2 average gradients over the processes. A micro-batch's loss is divided by the count of the whole step,
    on all of them, so the average is undone: `backward` multiplies the loss by their number.
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
            fully_shard(student, mesh=mesh)
            register_fsdp_forward_method(student, "logits")
        else:
            on_gpu = processes.device.type == "cuda"
            self._module = module = DistributedDataParallel(
                student, device_ids=[processes.device] if on_gpu else None, gradient_as_bucket_view=True
            )
            # alike from the start; the argument of this name is deprecated, and what replaces it is not in torch 2.6
            module.broadcast_buffers = False

    def forward_backward(self, batch: AnyBatch, *, last: bool, **settings: Any) -> KDLoss:
        """Loss of a micro-batch, and its gradients added to what is there. last: of the step; then they are summed over
        the processes. Only the loss's parts are of use afterwards."""
        module = self._module
        if isinstance(module, FSDPModule):
            module.set_is_last_backward(last)
            module.set_requires_gradient_sync(last)
            return self._both(batch, settings)
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                return self._both(batch, settings)
        return self._both(batch, settings)

    def evaluated(self) -> None:
        """To be called after `logits`, which leaves FSDP2's outermost parameters whole: back to parts, as an optimizer
        and a checkpoint know them."""
        for module in self.student.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _both(self, batch: AnyBatch, settings: dict[str, Any]) -> KDLoss:
        out: KDLoss = self._module(batch, **settings)
        loss = out.loss * self._world if self._world > 1 else out.loss
        loss.backward()  # type: ignore[no-untyped-call]
        return KDLoss(out.loss.detach(), out.hard, out.soft)


def checkpoint_layers(student: Student) -> None:
    """Keep of each layer only what goes in and out, and compute the rest again in the backward.

    Raises TrainError where no layers are found. The loss is not among them: it computes its gradients in the forward.
    """
    model: Any = student.model
    if getattr(model, "supports_gradient_checkpointing", False):
        options = {"use_reentrant": False}
        if (enable := getattr(model, "activation_checkpointing_enable", None)) is not None:
            enable(activation_checkpointing_kwargs=options)
        else:  # what older ones call it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return
    for layer in _layers(student, "activation_checkpointing"):
        run = layer.forward
        layer.forward = lambda *args, _run=run, **kwargs: checkpoint(_run, *args, use_reentrant=False, **kwargs)


def compile_layers(student: Student) -> None:
    """torch.compile each layer: they are alike, so one compilation serves them. TrainError where there are none."""
    for layer in _layers(student, "compile"):
        layer.compile()


def _layers(student: Student, setting: str) -> list[nn.Module]:
    if not student.layers:
        raise TrainError(
            f"{setting}: {student.name} has no list of layers (an nn.ModuleList of one class), which it goes by. Leave "
            "it out."
        )
    return student.layers
