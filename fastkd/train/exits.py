"""Early exits of a student (`--exits 6,12`): their objective, their evaluation, and a student that ends at one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.errors import said
from ..data.examples import Examples
from ..errors import TeacherError, TrainError
from ..kernels import LossConfig, TopKConfig
from ..models.adapters import has_adapters
from ..models.final_norm import find_final_norm
from ..models.protocol import Hidden, Logits, Output
from ..models.pruned import truncated
from ..models.taps import Taps, replaced, resolve
from ..models.tokenizers import Tokenizer
from ..settings import TrainSettings
from ..stream.batch import AnyBatch
from .objective import Objective, TokenKD, WeightedSum
from .objectives.exits import ExitKD, Read
from .result import write_model
from .student import Student

TERM, LAST = "exits", "answers"
"""The names of the terms of the exits, and of what the last layer learns."""
ENTRIES, DRAWS = 48, 16
"""What is kept of the last layer's answers: as much as a cache keeps of a teacher's."""


def with_exits(
    settings: TrainSettings, student: Student, objective: Objective | None, data: Examples | None = None
) -> WeightedSum:
    """An objective (None: that of the settings) with the student's exits as one more term.

    data: of a student of examples. Raises TrainError for exits that the student cannot have.
    """
    if settings.export_exit is not None:
        cut(student.model, settings.export_exit)  # refused now, not after the training
    exits = {layers: output_name(student, layers) for layers in exits_of(settings, student)}
    temperature = float(settings.temperature)
    targets = TopKConfig(
        k=ENTRIES, draws=DRAWS, draw_temperature=temperature, seed=settings.seed,
        temperatures=tuple(dict.fromkeys((1.0, temperature))),
    )  # fmt: skip
    loss = TokenKD(LossConfig(alpha=settings.exit_alpha, temperature=temperature))
    own = ExitKD(exits, reader(student, data), loss, targets, student.vocab_size)
    if isinstance(objective, WeightedSum):
        given: dict[str, Any] = {**objective.weights, **dict.fromkeys(objective.auto, "auto")}
        return WeightedSum({**objective.terms, TERM: own}, {**given, TERM: settings.exit_weight})
    last = TokenKD.from_settings(settings) if objective is None else objective
    return WeightedSum({LAST: last, TERM: own}, {TERM: settings.exit_weight})


def exits_of(settings: TrainSettings, student: Student) -> tuple[int, ...]:
    """The exits of the settings, ascending. Raises TrainError if the student does not have them."""
    layers, listed = len(student.layers), ", ".join(map(str, settings.exits))
    if not layers or len({id(layer) for layer in student.layers}) < layers:
        has = "one layer in several places" if layers else "no list of layers (an nn.ModuleList of one class)"
        raise TrainError(
            f"exits: got {listed}, and {student.name} has {has}: there are none between which it could end. Leave "
            "exits out."
        )
    for number in settings.exits:
        if not isinstance(number, int) or not 0 < number < layers:
            which = ", its last layer, which is no early exit" if number == layers else ""
            raise TrainError(
                f"exits: got {number!r}{which}; expected numbers from 1 to {layers - 1}, as {student.name} has "
                f"{layers} layers."
            )
    return tuple(sorted(int(number) for number in settings.exits))


def output_name(student: Student, layers: int) -> str:
    """The output of a student's first layers, as objectives read it."""
    module, modules = student.layers[layers - 1], dict(student.network.named_modules())
    return f"module:{next(name for name, one in modules.items() if one is module)}"


def reader(student: Student, data: Examples | None = None) -> Read:
    """How a student's output follows from the state that one of its layers returns: for a model of transformers by its
    final norm and LM head; for a module by all that its forward does after its layers.

    It is proven on a probe, for the last layer. Raises TrainError if it does not hold.
    """
    model: Any = student.network
    name = output_name(student, len(student.layers))
    with _evaluating(model), torch.no_grad():
        try:
            read = _norm_and_lm_head(model) if hasattr(model, "get_output_embeddings") else _rest(student)
            batch = student.probe(data)
            with Taps(model, [name], TrainError) as taps:
                output = student.run(batch)
                state = taps.values[name]
            found = read(batch, state, output)
        except TrainError:
            raise
        except TeacherError as error:
            raise TrainError(f"exits: {error}") from error
        except Exception as error:
            raise TrainError(
                f"exits: {type(model).__name__} cannot be run on from the state behind its layers ({error}). Leave "
                "exits out."
            ) from error
    if not torch.equal(_values(found), _values(output)):
        raise TrainError(
            f"exits: the output of {type(model).__name__} does not follow from the state behind its last layer alone, "
            "so it cannot end at an earlier one. Leave exits out."
        )
    return read


def _norm_and_lm_head(model: Any) -> Read:
    norm = find_final_norm(model)

    def read(batch: AnyBatch, state: Tensor, output: Output) -> Output:
        if not isinstance(output, Hidden):
            raise TrainError(
                f"exits: the LM head of {type(model).__name__} cannot be read from its config, so states of inner "
                "layers cannot be projected. Leave exits out."
            )
        return Hidden(norm(state).to(output.states.dtype), output.lm_head)

    return read


def _rest(student: Student) -> Read:
    layers = student.layers
    (tap,) = resolve(student.network, [output_name(student, len(layers))], TrainError)

    def read(batch: AnyBatch, state: Tensor, output: Output) -> Output:
        # once more from the beginning, with layers that do nothing, the last of which returns the state
        with student.paused(), replaced(tap, state, layers):
            return student.run(batch)

    return read


def _values(output: Output) -> Tensor:
    return output.values if isinstance(output, Logits) else output.states


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class ExitStudent(nn.Module):
    """A student that ends at one of its exits, to be evaluated: it has `logits`, as a `Student`."""

    def __init__(self, student: Student, exits: ExitKD, layer: int) -> None:
        super().__init__()
        self.student, self._exits, self._name = student, exits, exits.exits[layer]

    def logits(self, batch: AnyBatch, rows: Tensor | None = None) -> Tensor:
        return self.student.logits(batch, rows, self._run)

    def answered(self, batch: AnyBatch) -> AnyBatch:
        """See `Student.answered`."""
        return self.student.answered(batch)

    def _run(self, batch: AnyBatch) -> Output:
        output = self.student.run(batch)
        return self._exits.read(batch, self.student.outputs(batch, output)[self._name], output)


def exit_students(student: Student) -> Mapping[str, ExitStudent]:
    """The exits that the student's objective trains, as students, by name: exit6, exit12."""
    terms = student.objective.terms.values() if isinstance(student.objective, WeightedSum) else [student.objective]
    return {
        f"exit{layer}": ExitStudent(student, term, layer)
        for term in terms
        if isinstance(term, ExitKD)
        for layer in term.exits
    }


def cut(model: Any, layers: int) -> Any:
    """A model of the first layers of another, with meta tensors as weights. Raises TrainError if it cannot be cut."""
    if has_adapters(model):
        raise TrainError(
            f"export_exit: got {layers} for a student with an adapter; expected a whole model. Leave it out."
        )
    if not hasattr(model, "save_pretrained"):
        raise TrainError(
            f"export_exit: got {layers}, and {type(model).__name__} is a module, whose code has to be cut; expected a "
            "model of transformers. Leave it out: the student's weights are those of its exits."
        )
    try:
        return truncated(model, layers)
    except ValueError as error:
        raise TrainError(f"export_exit: got {layers}; {said(error)}. Leave it out.") from error


def write_exit(
    folder: Path, student: Student, layers: int, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> None:
    """Write the student cut at an exit, as a whole model. tensors: of the whole `Student`, by name."""
    model = cut(student.model, layers)
    names = model.state_dict().keys()
    plain = {name: tensors[f"model.{name}"] for name in names if f"model.{name}" in tensors}
    write_model(folder, model, plain, tokenizer, student.source)
