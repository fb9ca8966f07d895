"""Student: a model and its objective, in one torch module whose forward maps a micro-batch to losses.

student = make_student(config, cache.spec).student
loss = student(batch, num_items=step.count)["loss"]
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..kernels import LMHead
from ..models.hf import probe_causal_lm
from ..models.lm_head import LMHeadMatch
from ..models.module import (
    EXAMPLES,
    TEXT,
    logits_width,
    output_of,
    parameters_and_bytes,
    run_probe,
    separates_documents,
)
from ..models.protocol import Hidden, Logits, Output
from ..stream.batch import AnyBatch, MicroBatch
from .objective import OUTPUTS, Objective, TokenKD, check_losses


class Student(nn.Module):
    """A model to be trained; `of_transformers` and `of_module` make one.

    model: the model itself. run: calls it with a micro-batch. name: for messages. vocab_size: V, the width of its
    logits. max_positions: the longest sequence that it takes, or None if unknown. packs: whether it takes packed
    micro-batches. notes: for the user, a line each. autocast: the type of matrix products; None: that of the weights.
    objective: what `forward` computes.

    The parameters of DDP and FSDP2 are complete only in `forward` (and with FSDP2 in `logits`, which has to be
    registered): so the objective is called there.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[..., Output],
        *,
        name: str,
        vocab_size: int,
        max_positions: int | None = None,
        packs: bool = False,
        notes: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name, self.vocab_size, self.max_positions = name, vocab_size, max_positions
        self.notes = [] if notes is None else notes
        self.autocast: torch.dtype | None = None
        self.objective: Objective = TokenKD()
        self._run, self._packs = run, packs

    def forward(self, batch: AnyBatch, *, num_items: int | Tensor | None = None, **scheduled: Any) -> dict[str, Tensor]:
        """The losses of a micro-batch; see `Objective.losses`.

        Raises TrainError if the model does not take the micro-batch, or it lacks a signal of the objective; KDError if
        logits are not finite (on a GPU the loss is NaN instead).
        """
        objective = self.objective
        if missing := [name for name in objective.signals if not hasattr(batch, name)]:
            raise TrainError(
                f"objective: {type(objective).__name__} needs the signal {missing[0]!r}, which the source's "
                f"{type(batch).__name__} lacks."
            )
        with self._autocast(batch.device):
            output = self._output(batch)
            outputs = {name: OUTPUTS[name](output, batch.targets.index) for name in objective.outputs}
            return dict(check_losses(objective, objective.losses(batch, outputs, num_items=num_items, **scheduled)))

    def logits(self, batch: AnyBatch, rows: Tensor | None = None) -> Tensor:
        """Logits `[m, V]` at some of the flattened positions; None: at those that count."""
        with self._autocast(batch.device):
            logits: Tensor = OUTPUTS["logits"](self._output(batch), batch.targets.index if rows is None else rows)
            return logits

    @property
    def parameters_and_bytes(self) -> tuple[int, int]:
        """The number of the model's parameters, shared ones counted once, and their bytes."""
        return parameters_and_bytes(self.model)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers: the modules of the longest nn.ModuleList of a single class; none if there is no such list."""
        lists = [
            list(m) for m in self.model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
        ]
        return max(lists, key=len, default=[])

    def _output(self, batch: AnyBatch) -> Output:
        if isinstance(batch, MicroBatch):
            self._check(batch)
        output = self._run(self.model, batch)
        if isinstance(output, Hidden) and isinstance(output.lm_head, LMHead) and self.autocast is None:
            # autocast would convert both
            return Hidden(output.states.to(output.lm_head.weight.dtype), output.lm_head)
        return output

    def _check(self, batch: MicroBatch) -> None:
        if self.max_positions is not None and batch.max_seqlen > self.max_positions:
            raise TrainError(
                f"{self.name}: got a sequence of {batch.max_seqlen} tokens from the cache; this student takes "
                f"{self.max_positions}. Use a student with a longer context, or capture with "
                f"context={self.max_positions} or less."
            )
        if batch.layout == "packed" and not self._packs:
            raise TrainError(
                f"{self.name}: got a packed micro-batch; expected a model that separates documents by their "
                "position_ids, which this one does not. Use layout='padded'."
            )

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)


def of_transformers(model: Any, name: str) -> Student:
    """A causal model of transformers as a student; its LM head is fused with the loss if it can be read from its
    config and reproduces its logits.

    Raises TeacherError if the model cannot be run, or is not causal.
    """
    model.eval()  # dropout would change the outputs that are compared
    notes: list[str] = []
    probed = probe_causal_lm(model, name, notes)
    with torch.no_grad():
        packs = separates_documents(lambda **inputs: model(use_cache=False, **inputs).logits, probed.tokens)
    model.train()
    if probed.lm_head is None or not isinstance(probed.lm_head.lm_head, LMHead):
        notes.append(
            f"{type(model).__name__}: its LM head is not one matrix with a use that its config tells, so full logits "
            "[positions, V] are materialized for every micro-batch, which costs memory and time."
        )
    return Student(
        model, _run_transformers(probed.lm_head, probed.vocab_size), name=name, vocab_size=probed.vocab_size,
        max_positions=probed.max_positions, packs=packs, notes=notes,
    )  # fmt: skip


def of_module(model: nn.Module, name: str, example: Tensor | None = None) -> Student:
    """Any module as a student. It returns logits, an object with `logits`, or `Hidden` (states and an LM head).

    Without an example, it maps token ids `[B, L]` to logits `[B, L, V]`; its output at a position must not depend on
    later ones. If its forward has an argument `position_ids`, packed micro-batches are possible.
    example: one input of a classifier, as a batch; it maps `[B, ...]` to logits `[B, V]`.
    Raises TrainError if it returns something else.
    """
    if (parameter := next(model.parameters(), None)) is None:
        raise TrainError(f"{name}: {type(model).__name__} has no parameters; there is nothing to train.")
    shape = TEXT if example is None else EXAMPLES
    probe = torch.zeros((1, 4), dtype=torch.int64) if example is None else example
    probe = probe.to(parameter.device)

    def run(module: Any, batch: Any) -> Output:
        value = module(batch.inputs) if example is not None else module(batch.input_ids, **_position_ids(batch))
        return output_of(value, name, shape, TrainError)

    def states(input_ids: Tensor, **more: Tensor) -> Tensor:
        output = output_of(model(input_ids, **more), name, shape, TrainError)
        return output.values if isinstance(output, Logits) else output.states

    training, packs = model.training, False
    model.eval()
    with torch.no_grad():
        output = run_probe(model, probe, name, shape, TrainError)
        width = logits_width(output)
        if example is None and "position_ids" in inspect.signature(model.forward).parameters:
            packs = separates_documents(states, probe)
    model.train(training)
    notes = []
    if example is None and (isinstance(output, Logits) or not isinstance(output.lm_head, LMHead)):
        notes.append(
            f"{type(model).__name__} returns logits, so full logits [positions, V] are materialized for every "
            "micro-batch, which costs memory and time. Return fastkd.teachers.Hidden (states and an LMHead) instead."
        )
    if example is not None and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        notes.append(
            f"{type(model).__name__}: its batch norms take the statistics of each micro-batch of each process, so the "
            "result depends on how steps are divided. nn.GroupNorm does not."
        )
    return Student(model, run, name=name, vocab_size=width, packs=packs, notes=notes)


def _run_transformers(match: LMHeadMatch | None, width: int) -> Callable[[Any, MicroBatch], Output]:
    def run(model: Any, batch: MicroBatch) -> Output:
        inputs = {"input_ids": batch.input_ids, "use_cache": False, **_position_ids(batch)}
        if match is None:
            return Logits(model(**inputs).logits)
        states = model.base_model(**inputs).last_hidden_state
        if not isinstance(match.lm_head, LMHead):
            return Hidden(states, match.lm_head)
        # read anew in each forward: FSDP2 replaces the parameters
        module = model.get_output_embeddings()
        weight, bias = module.weight, module.bias
        if len(weight) != width:
            weight, bias = weight[:width], None if bias is None else bias[:width]
        return Hidden(states, LMHead(weight, bias, match.lm_head.softcap, match.lm_head.logit_scale))

    return run


def _position_ids(batch: MicroBatch) -> dict[str, Tensor]:
    """Position ids separate the documents of packed rows; padded rows need none."""
    return {"position_ids": batch.position_ids} if batch.layout == "packed" else {}
