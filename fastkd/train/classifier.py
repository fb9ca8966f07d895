"""A classifier as a student: it maps examples, as the teacher saw them, to logits."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..models.module import EXAMPLES, logits_width, output_of, run_probe
from ..models.protocol import Output
from ..stream.batch import ExampleBatch
from .student import Student, device_of


def of_classifier(model: nn.Module, name: str, example: Tensor) -> Student:
    """A module that maps examples `[B, ...]` to logits `[B, V]`, to an object with `logits`, or to `Hidden` (states
    `[B, D]` and a head). example: one, as a batch.

    Raises TrainError where it returns something else.
    """
    probe, training = example.to(device_of(model, name)), model.training
    model.eval()
    with torch.no_grad():
        width = logits_width(run_probe(model, probe, name, EXAMPLES, TrainError))
    model.train(training)
    notes = []
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        notes.append(
            f"{type(model).__name__}: its batch norms take the statistics of each micro-batch of each process, so what "
            "it learns depends on how steps are divided. nn.GroupNorm does not."
        )

    def says(module: Any, batch: ExampleBatch) -> Output:
        return output_of(module(batch.inputs), name, EXAMPLES, TrainError)

    return Student(model, says, name=name, vocab_size=width, notes=notes)
