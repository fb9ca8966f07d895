"""The processes that train one student together, and what wraps it in them: nothing, DDP or FSDP2.

Everything is torch.distributed's own; why, LOG.md says under "Training".
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..ending import grouped
from ..errors import TrainError
from ..kernels import KDLoss
from .batch import AnyBatch
from .model import Student
from .run import Reduce, summed_over


@dataclass(frozen=True, eq=False)
class Processes:
    """This process and those it works with. group: of the CPU, for what is counted, apart from what gradients use."""

    rank: int
    world_size: int
    device: torch.device
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    @property
    def reduce(self) -> Reduce | None:
        """What a loader sums its counts with."""
        return None if self.group is None else summed_over(self.group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """A tensor of the device, summed over all in place."""
        if self.group is not None:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, values: list[int]) -> Callable[[], list[int]]:
        """Begin a sum of integers over all; what it returns waits for it."""
        return (lambda: values) if self.group is None else summed_over(self.group)(values)

    def agree(self, value: int) -> int:
        """What the first process says."""
        return self.begin_sum([value if self.first else 0])()[0]

    def wait(self) -> None:
        """Until all are here."""
        self.begin_sum([0])()


ALONE = Processes(0, 1, torch.device("cpu"))


def process_count(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes there are: of the group that is there, else of torchrun's."""
    return dist.get_world_size() if dist.is_initialized() else int(environment.get("WORLD_SIZE", "1"))


@contextmanager
def together(device: str | None, environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """The processes that torchrun started, or that share the caller's process group; else this one alone.

    device: None, this process's GPU or the CPU. Raises TrainError where there is no such device.
    """
    where = _device(device, environment)
    began = False
    if not dist.is_initialized() and int(environment.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
        began = True
        grouped()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    try:
        if dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo")
            yield Processes(dist.get_rank(), dist.get_world_size(), where, group)
        else:
            yield Processes(0, 1, where)
    except BaseException:
        began = False  # the others may be waiting in the middle of something: only their end ends that
        raise
    finally:
        if began:
            dist.destroy_process_group()


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


def _device(device: str | None, environment: Mapping[str, str]) -> torch.device:
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise TrainError(f"device: found {device!r} ({error}); cpu, cuda or cuda:N is needed.") from error
    return found
