"""attach: a causal model of transformers whose forward computes the distillation loss, if it is given targets.

The loss is computed inside the forward of the model, so DDP, FSDP2, DeepSpeed's engine, gradient checkpointing and
accelerate see an ordinary model. It changes the class of the model, to a subclass of the same name: the state dict,
`save_pretrained`, copies and pickles are those of the model.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from ...cache.errors import type_name
from ...errors import TeacherError, TrainError
from ...kernels import LMHead
from ...models.adapters import base_of
from ...models.lm_head import LowRankHead
from ...models.protocol import Hidden
from ...settings import TrainSettings
from ...settings_changes import AttachChanges, check_names
from ...stream.batch import MicroBatch
from ...stream.tensors import ITEMS, PREFIX, batch_of_tensors
from ...train.objective import Objective, TokenKD, check_losses, check_objective
from ...train.student import Student, of_transformers

if TYPE_CHECKING:
    from .output import DistillOutput

LOSS_SETTINGS = frozenset(f.name for f in fields(TokenKD)) - {"config"} | {
    "alpha", "temperature", "divergence", "treatment", "beta", "skew",
}  # fmt: skip
"""The fields of TrainSettings that `attach` takes."""
_SWITCHES = ("kd_logits", "kd_scheduled")
# what a Trainer or a collator gives beside the tensors of a micro-batch, and a forward with targets does not need
_BESIDE = {"labels", "attention_mask", "num_items_in_batch", "use_cache", "return_dict"}


def attach(
    model: Any, objective: Objective | None = None, *, full_logits: bool = False, **settings: Unpack[AttachChanges]
) -> Any:
    """The same model, whose forward computes the loss when it is called with the tensors of a micro-batch
    (`fastkd.stream.batch_to_tensors`); called without them, it is the model's own forward.

    The output then has `loss`, a sum over the positions of the micro-batch divided by the positions that count in the
    whole optimizer step (on all ranks, in all micro-batches), and `hard` and `soft`, its parts; logits
    `[positions, V]` are never materialized. What averages gradients over processes, as DDP and FSDP2 do, needs the loss
    times the number of processes: transformers' Trainer multiplies it.

    model: a causal model of transformers, before it is wrapped or prepared. objective: an `Objective`; default:
    `TokenKD` of the settings, fields of `LossConfig` and `TrainSettings` such as alpha=0.3, temperature=2.0,
    alpha_end=0.1. full_logits: accept a model whose LM head is not one matrix: its logits are then materialized.

    Raises TrainError for a model that is not causal, whose LM head is not found, or that is attached or prepared
    already; and for settings that are not possible.
    """
    if objective is not None and settings:
        raise TrainError(f"attach: got an objective and {', '.join(settings)}; expected one of the two.")
    check_names("attach", settings, sorted(LOSS_SETTINGS))
    if is_attached(model):
        raise TrainError(
            "attach: got a model that is attached already; detach it first (fastkd.integrations.hf.detach)."
        )
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise TrainError(f"attach: got {type_name(model)}; expected a causal model of transformers.")
    if "forward" in vars(model):
        raise TrainError(
            f"attach: got a {type(model).__name__} whose forward was replaced, as Accelerator.prepare does; expected "
            "one that is not prepared yet. Attach it first."
        )
    if objective is None:
        objective = TokenKD.from_settings(TrainSettings(**settings))
    check_objective(objective)
    if isinstance(objective, nn.Module) and any(True for _ in objective.parameters()):
        raise TrainError(
            f"attach: got a {type(objective).__name__} with parameters, as of --match, which checkpoints of the model "
            "would not have; expected an objective without. Use `fastkd train --match 20:16:mse:0.1`, or "
            "fastkd.train(..., objective=...), whose checkpoints have them."
        )
    attachment = Attachment(objective, full_logits)
    attachment.probe(model)
    model.__class__ = _attached_class(type(model))
    vars(model)["_kd"] = attachment
    if (base := base_of(model)) is not model:  # a Trainer reads there whether the count of a step is passed on
        vars(base)["accepts_loss_kwargs"] = True
    return model


def detach(model: Any) -> Any:
    """The same model as it was before `attach`, also after a training, for which accelerate replaces its forward by one
    with autocast. Raises TrainError if it is not attached."""
    if not is_attached(model):
        raise TrainError(f"detach: got a {type(model).__name__} that is not attached.")
    if (base := getattr(type(model), "attached_to", None)) is None or base not in type(model).__bases__:
        raise TrainError(f"detach: got a {type(model).__name__} that is sharded by FSDP2; expected one that is not.")
    attachment = vars(model).pop("_kd")
    attachment.close()
    for name in ("forward", "_original_forward"):  # of accelerate, around that of the attached model
        vars(model).pop(name, None)
    vars(base_of(model)).pop("accepts_loss_kwargs", None)
    model.__class__ = base
    return model


def is_attached(model: Any) -> bool:
    """Whether a model was attached."""
    return isinstance(model, _Attached)


class Attachment:
    """The objective of an attached model, and the `Student` that runs it.

    Copies and pickles have the objective; the student is found again, by a probe, when the copy is used.
    """

    def __init__(self, objective: Objective, full_logits: bool) -> None:
        self.objective, self.full_logits = objective, full_logits
        self._student: Student | None = None
        self.of_trainer = False
        """Whether a DistillTrainer attached the model."""
        self.inside = False
        """Whether the model is called by its own forward, which is then not to compute a loss."""

    def probe(self, model: Any) -> Student:
        """The student of a model, which is run on a few tokens. Raises TrainError."""
        training = [(module, module.training) for module in model.modules()]
        try:
            student = of_transformers(model, type(model).__name__)
            model.eval()
            with torch.no_grad():
                output = student.run(student.probe())
        except TeacherError as error:
            raise TrainError(f"attach: {error}") from error
        finally:
            for module, mode in training:
                module.training = mode
        fusable = isinstance(output, Hidden) and isinstance(output.lm_head, (LMHead, LowRankHead))
        if not self.full_logits and not fusable:
            raise TrainError(
                f"attach: got a {type(model).__name__} whose LM head is not found as one matrix that reproduces its "
                "logits; expected one, so that logits [positions, V] need not be materialized. With full_logits=True "
                "they are."
            )
        student.read(self.objective)
        self._student = student
        return student

    def use(self, model: Any, objective: Objective) -> None:
        """Compute another objective from now on. Raises TrainError if the model lacks what it reads."""
        self.student(model).read(objective)
        self.objective = objective

    def student(self, model: Any) -> Student:
        """The student of the model that this belongs to."""
        found = self._student
        if found is None:
            self.inside = True
            try:
                found = self.probe(model)
            finally:
                self.inside = False
        return found

    def forward(self, model: Any, given: Mapping[str, Any]) -> "DistillOutput":
        """The output of a forward with the tensors of a micro-batch."""
        from .output import DistillOutput, output_of

        student = self.student(model)
        batch = batch_of_tensors({name: one for name, one in given.items() if name not in _SWITCHES})
        student.check_width(batch)
        device = batch.device.type
        student.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.inside = True
        try:
            if given.get("kd_logits"):
                with student.paused():
                    return DistillOutput(logits=student.logits(batch, run=student.run))
            output = student.run(batch)
        finally:
            self.inside = False
        scheduled = given.get("kd_scheduled") or self.objective.schedule(0, 1)
        count = batch.counts.get("targets")
        if count is not None and (theirs := given.get("num_items_in_batch")) is not None:
            _check_count(theirs, count)
        items = given.get(ITEMS, count)
        return output_of(self._losses(student, batch, output, items, scheduled))

    def _losses(
        self, student: Student, batch: MicroBatch, output: Any, items: Any, scheduled: Mapping[str, Any]
    ) -> dict[str, Any]:
        outputs = student.outputs(batch, output)
        found = self.objective.losses(batch, outputs, num_items=items, **scheduled)
        return dict(check_losses(self.objective, found))

    def close(self) -> None:
        """Remove the hooks of inner states."""
        if self._student is not None and self._student._inner is not None:
            self._student._inner.close()
        self._student = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_student": None, "inside": False}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_count(theirs: Any, ours: int) -> None:
    """Raise TrainError if the step of a Trainer has other positions than the dataset's, by whose count the loss is
    divided: the gradient would be scaled. theirs: a number, or a tensor of equal ones."""
    number = int(torch.as_tensor(theirs).flatten()[0])
    if number != ours:
        raise TrainError(
            f"forward: got a micro-batch of a step of {ours} positions in a Trainer's step of {number}; expected the "
            "same step: give DistillDataset micro_batches=args.gradient_accumulation_steps, with 1 for an "
            "eval_dataset; on several processes, use DistillMixin."
        )


class _Attached(nn.Module):
    """Before the class of a model in that of an attached one."""

    accepts_loss_kwargs = True
    attached_to: Any
    _kd: Attachment

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._kd.inside:  # its hooks are those of the call that is under way
            return self.attached_to.forward(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (type(self).attached_to,), *reduced[2:])


def _forward_of(base: type) -> Any:
    """The forward of attached models of a class. Its signature is the model's own, which transformers reads."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(name.startswith(PREFIX) for name in kwargs):
            return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if other := sorted(
            name for name in kwargs if not name.startswith(PREFIX) and name not in _TENSORS and name not in _BESIDE
        ):
            raise TrainError(
                f"forward: got {', '.join(other)} beside the tensors of a micro-batch; expected those alone."
            )
        return self._kd.forward(self, kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


_TENSORS = ("input_ids", "shift_labels", "position_ids")
_CLASSES: dict[type, type] = {}


def _attached_class(base: type) -> type:
    """A subclass of a model's class, of the same name: a config names the class of its model."""
    if base not in _CLASSES:
        names = {"attached_to": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
        names |= {"__doc__": base.__doc__, "forward": _forward_of(base)}
        _CLASSES[base] = type(base.__name__, (_Attached, base), names)
    return _CLASSES[base]


def _new(base: type) -> Any:
    """An attached model without contents, to be filled by a copy or a pickle."""
    cls: Any = _attached_class(base)
    return cls.__new__(cls)
