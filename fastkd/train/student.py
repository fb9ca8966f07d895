"""Student: a model whose forward takes a micro-batch and returns its loss, which is all that a wrapper sees of it.
Those of text are made here, those of examples in `classifier.py`.

student = make_student(config, cache.spec).student
loss = student(batch, alpha=alpha, temperature=temperature, num_items=step.count).loss
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..kernels import KDLoss, kd_loss, linear_kd_loss
from ..kernels.lm_head import LMHead
from ..models.hf import probe_causal_lm
from ..models.lm_head import LMHeadMatch, logits_of
from ..models.module import TEXT, logits_width, output_of, parameters_and_bytes, run_probe, separates_documents
from ..models.protocol import Hidden, Logits, Output
from ..stream.batch import AnyBatch, MicroBatch


class Student(nn.Module):
    """A model to be trained; `of_transformers`, `of_module` and `of_classifier` make one.

    model: the model itself, the only submodule. name: for people. notes: what they should know, a line each.
    vocab_size: V, the width of its head. max_positions: the longest piece it takes, None where it is not known.
    autocast: the type of its matrix products; None: that of its weights.

    DDP's and FSDP2's parameters are whole only within `forward` (and, of FSDP2, `logits`, which has to be registered):
    head and loss are therefore inside.
    """

    def __init__(
        self,
        model: nn.Module,
        said: Callable[..., Output],
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
        self._said, self._packs = said, packs

    def forward(
        self,
        batch: AnyBatch,
        *,
        alpha: float | Tensor = 0.5,
        temperature: float | Tensor = 1.0,
        num_items: int | Tensor | None = None,
        **settings: Any,
    ) -> KDLoss:
        """The loss of the positions of a micro-batch that count, their sum divided by num_items: the count of the whole
        optimizer step. settings: others of `kd_loss`, as divergence, treatment, beta, skew.

        Only hidden states at `batch.targets.index` go through the head, in chunks that are fused with the loss, where
        the head is one matrix. Raises TrainError where the micro-batch is not one that the model takes, KDError where
        its logits are not finite (of a GPU, the loss is NaN).
        """
        settings |= {"alpha": alpha, "temperature": temperature, "num_items": num_items}
        labels, targets = batch.labels.flatten(), batch.targets
        with self._autocast(batch.device):
            said = self._run(batch)
            if isinstance(said, Logits):
                return kd_loss(said.values.flatten(0, -2), targets, labels, **settings)
            states, head = said.states.flatten(0, -2), said.lm_head
            if isinstance(head, LMHead):
                return linear_kd_loss(
                    self._alike(states, head), head.weight, targets, labels, bias=head.bias, softcap=head.softcap,
                    logit_scale=head.logit_scale, **settings,
                )  # fmt: skip
            assert targets.index is not None
            logits = head(states[targets.index])
            return kd_loss(logits, replace(targets, index=None), labels[targets.index], **settings)

    def logits(self, batch: AnyBatch, rows: Tensor | None = None) -> Tensor:
        """Logits `[m, V]` of the flattened positions asked for; None: of those that count."""
        rows = batch.targets.index if rows is None else rows
        assert rows is not None
        with self._autocast(batch.device):
            said = self._run(batch)
            if isinstance(said, Logits):
                return said.values.flatten(0, -2)[rows]
            states = said.states.flatten(0, -2)[rows]
            return logits_of(
                self._alike(states, said.lm_head) if isinstance(said.lm_head, LMHead) else states, said.lm_head
            )

    @property
    def parameters_and_bytes(self) -> tuple[int, int]:
        """How many numbers it is made of, each once, and their bytes."""
        return parameters_and_bytes(self)

    @property
    def layers(self) -> list[nn.Module]:
        """Its layers: what its longest list of modules of one class holds; none where there is no such list."""
        lists = [
            list(m) for m in self.model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1
        ]
        return max(lists, key=len, default=[])

    def _run(self, batch: AnyBatch) -> Output:
        if isinstance(batch, MicroBatch):
            self._check(batch)
        return self._said(self.model, batch)

    def _check(self, batch: MicroBatch) -> None:
        if self.max_positions is not None and batch.max_seqlen > self.max_positions:
            raise TrainError(
                f"{self.name}: found a piece of {batch.max_seqlen} tokens in the cache; this student takes "
                f"{self.max_positions}. Use a student of a longer context, or capture with context={self.max_positions}"
                " or less."
            )
        if batch.layout == "packed" and not self._packs:
            raise TrainError(
                f"{self.name}: packed micro-batches are for models that keep the pieces apart by their position_ids, "
                "and this one does not. Use layout='padded'."
            )

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def _alike(self, states: Tensor, head: LMHead) -> Tensor:
        """Hidden states in the head's type, where nothing else brings the two together."""
        return states if self.autocast is not None else states.to(head.weight.dtype)


def of_transformers(model: Any, name: str) -> Student:
    """A causal model of transformers as a student; its LM head is fused with the loss if it can be read from its
    config and reproduces its logits.

    Raises TeacherError if the model cannot be run, or is not causal.
    """
    model.eval()  # dropout would change the outputs that are compared
    probed = probe_causal_lm(model, name, [])
    with torch.no_grad():
        packs = separates_documents(lambda **inputs: model(use_cache=False, **inputs).logits, probed.tokens)
    model.train()
    if probed.lm_head is None or not isinstance(probed.lm_head.lm_head, LMHead):
        probed.notes.append(
            f"{type(model).__name__}: its LM head is not one matrix with a use that its config tells, so full logits "
            "[positions, V] are materialized for every micro-batch, which costs memory and time."
        )
    return Student(
        model, _said_by_transformers(probed.lm_head, probed.vocab_size), name=name, vocab_size=probed.vocab_size,
        max_positions=probed.max_positions, packs=packs, notes=probed.notes,
    )  # fmt: skip


def of_module(model: nn.Module, name: str) -> Student:
    """Any module as a student: it maps token ids `[B, L]` to logits `[B, L, V]`, to an object with `logits`, or to
    `Hidden` (states and an LM head); its output at a position must not depend on later ones.

    For packed micro-batches its forward takes `position_ids`, and keeps documents apart by them.
    Raises TrainError if it returns something else.
    """
    probe = torch.zeros((1, 4), dtype=torch.int64, device=device_of(model, name))
    notes: list[str] = []
    takes = "position_ids" in inspect.signature(model.forward).parameters
    training = model.training
    model.eval()
    with torch.no_grad():
        output = run_probe(model, probe, name, TEXT, TrainError)
        width = logits_width(output)
        packs = takes and separates_documents(
            lambda input_ids, **more: _first(output_of(model(input_ids, **more), name, TEXT, TrainError)), probe
        )
    model.train(training)
    if isinstance(output, Logits) or not isinstance(output.lm_head, LMHead):
        notes.append(
            f"{type(model).__name__} returns logits, so [positions, V] of them are held for every micro-batch, which "
            "costs memory and time. Return fastkd.teachers.Hidden (states and an LMHead) instead."
        )

    def says(module: nn.Module, batch: MicroBatch) -> Output:
        return output_of(module(batch.input_ids, **_places(batch)), name, TEXT, TrainError)

    return Student(model, says, name=name, vocab_size=width, packs=packs, notes=notes)


def _said_by_transformers(found: LMHeadMatch | None, width: int) -> Callable[[Any, MicroBatch], Output]:
    def says(model: Any, batch: MicroBatch) -> Output:
        inputs = {"input_ids": batch.input_ids, "use_cache": False, **_places(batch)}
        if found is None:
            return Logits(model(**inputs).logits)
        states = model.base_model(**inputs).last_hidden_state
        if not isinstance(found.lm_head, LMHead):
            return Hidden(states, found.lm_head)
        # asked for anew each time: what a wrapper puts in the parameters' place is there
        module = model.get_output_embeddings()
        weight, bias = module.weight, module.bias
        if len(weight) != width:
            weight, bias = weight[:width], None if bias is None else bias[:width]
        return Hidden(states, LMHead(weight, bias, found.lm_head.softcap, found.lm_head.logit_scale))

    return says


def _places(batch: MicroBatch) -> dict[str, Tensor]:
    """What keeps pieces apart; rows with pads behind are apart."""
    return {"position_ids": batch.position_ids} if batch.layout == "packed" else {}


def _first(said: Output) -> Tensor:
    return said.values if isinstance(said, Logits) else said.states


def device_of(model: nn.Module, name: str) -> torch.device:
    """Where a module's parameters are. TrainError where it has none."""
    if (parameter := next(model.parameters(), None)) is None:
        raise TrainError(f"{name}: {type(model).__name__} has no parameters; there is nothing to train.")
    return parameter.device
