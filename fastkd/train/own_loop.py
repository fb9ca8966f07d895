"""For training loops of one's own: a module whose forward is the loss, and the backward pass of a step."""

from typing import Any, Unpack

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..cache.errors import type_name
from ..errors import TrainError
from ..kernels import LossConfig
from ..kernels.loss.config import LossSettings
from ..stream.batch import Step
from ..utils.distributed import is_fsdp
from .objective import Objective, TokenKD, check_objective
from .parallel import forward_backward
from .student import Student, of_module, of_transformers


def distill_module(
    model: nn.Module,
    objective: Objective | None = None,
    *,
    example: Tensor | None = None,
    **settings: Unpack[LossSettings],
) -> Student:
    """A module around a model, whose forward maps a micro-batch to its losses: `module(batch, num_items=step.count)`
    returns "loss", a sum over the micro-batch's positions divided by num_items, and its parts "hard" and "soft".

    DDP and FSDP2 average the gradients of what is computed in the forward of the module that they wrap: so wrap this
    one. `fastkd.backward` does the rest of a step.

    model: a causal model of transformers, whose LM head is found; or a module that maps token ids `[B, L]` to
    `fastkd.teachers.Hidden` (states and an LM head) or to logits; with an example, one input of a classifier as a
    batch. It is not copied. objective: an `Objective`; default: the distillation loss of the settings, fields of
    `LossConfig` such as alpha=0.3, temperature=2.0.

    Raises TrainError or TeacherError for a model that cannot be used like that, KDError for the settings.
    """
    if objective is not None and settings:
        raise TrainError(f"distill_module: got an objective and {', '.join(settings)}; expected one of the two.")
    objective = TokenKD(LossConfig(**settings)) if objective is None else objective
    check_objective(objective)
    name, causal = type(model).__name__, hasattr(model, "get_output_embeddings")
    student = of_transformers(model, name) if causal and example is None else of_module(model, name, example)
    student.read(objective)
    return student


def backward(module: nn.Module, step: Step, **scheduled: Any) -> dict[str, Tensor]:
    """Forward and backward of all micro-batches of a step: afterwards the parameters' gradients are those of the whole
    step, of all processes. Returns this process's losses, detached; those of all processes add up.

    module: of `distill_module`, as it is or wrapped in DDP, or sharded by FSDP2. Gradients are exchanged once, after
    the last micro-batch. DDP and FSDP2 average them over processes, and a step's loss is divided by its positions on
    all of them: so the loss is multiplied by the number of processes. scheduled: numbers that change during the
    training, as 0-d tensors (alpha, temperature).

    Raises TrainError for a model that is not in `distill_module`, or something else than a `Step`.
    """
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    if hasattr(inner, "get_output_embeddings"):
        raise TrainError(f"backward: got {type_name(inner)}; expected distill_module(model), which has its loss.")
    if not isinstance(step, Step):
        raise TrainError(f"backward: got {type_name(step)}; expected a Step, which a DistillLoader yields.")
    if isinstance(module, DistributedDataParallel):
        processes = dist.get_world_size(module.process_group)
    else:
        processes = dist.get_world_size() if is_fsdp(module) else 1
        if processes == 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise TrainError(
                f"backward: got a {type(module).__name__} in one of {dist.get_world_size()} processes; expected it in "
                "DistributedDataParallel, or sharded by FSDP2, which exchange gradients."
            )
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(step.micro_batches, 1):
        last = number == len(step.micro_batches)
        losses = forward_backward(module, batch, processes, last=last, num_items=step.count, **scheduled)
        sums = {name: value + sums[name] if sums else value for name, value in losses.items()}
    return sums
