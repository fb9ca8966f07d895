"""Student: a model and its objective in one torch module that maps a micro-batch to losses; `make_student`."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache.errors import type_name
from ..cache.spec import CacheSpec
from ..data.examples import Examples
from ..errors import TeacherError, TrainError
from ..kernels import LMHead
from ..models.adapters import adapter_files, base_of, load_adapter, load_peft
from ..models.hf import load_causal_lm, probe_causal_lm
from ..models.hub import ModelFiles, brief, load_transformers, resolve
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
from ..models.taps import layers_of
from ..models.tokenizers import Tokenizer, load_tokenizer
from ..models.torchao import load_qat
from ..settings import TrainSettings
from ..stream.batch import AnyBatch, MicroBatch
from ..utils.factories import check_factory, is_factory, made_by
from ..utils.signals import Stopped
from .fake_quantisation import FakeQuantisation
from .given import given_files, given_name
from .in_forward import InForward
from .inner import InnerOutputs, inner_of
from .lora import base_type, check_trainable, frozen_names, notes_on, with_lora
from .objective import OUTPUTS, Objective, TokenKD, check_losses
from .optimizer import clip_all_

PROBE = (2, 5)
"""Rows and tokens on which the shapes of inner states are found."""


class Student(nn.Module):
    """A model to be trained; `of_transformers` and `of_module` make one.

    model: the model itself. run: calls it with a micro-batch. name: for messages. vocab_size: V, the width of its
    logits. max_positions: the longest sequence that it takes, or None if unknown. packs: whether it takes packed
    micro-batches. notes: for the user, a line each. autocast: the type of matrix products; None: that of the weights.
    objective: what `forward` computes. live: what answers micro-batches inside `forward`, before the objective; None
    for micro-batches that come with targets.

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
        self.live: InForward | None = None
        self.fake: FakeQuantisation | None = None
        """How its weights are quantised in the forward; None: they are not."""
        self.interrupted: Callable[[], bool] | None = None
        """Asked before each micro-batch of an evaluation, which ends with `Stopped` if it is true."""
        self._run, self._packs = run, packs
        self._inner: InnerOutputs | None = None
        self.context: int | None = None
        """Positions in the longest segment of the data, if they are known."""
        self.source: ModelFiles | None = None
        """The files that it was made from, if it is a model of transformers from a folder or the Hub."""
        self.given: str | None = None
        """What it was named by, if that was a text."""
        self.given_files: str | None = None
        """See `given.given_files`."""
        self.base: str | None = None
        """The model whose weights it began with: its id on the Hub if it is from there, or the name of its folder."""

    def read(self, objective: Objective) -> None:
        """Compute this objective from now on. Raises TrainError if the model lacks an inner state that it reads."""
        self.objective = objective
        names, context = inner_of(objective.outputs), self.context or self.max_positions
        if self._inner is not None:
            self._inner.close()
        self._inner = InnerOutputs(self.network, names, context) if names else None

    def inner_shapes(self, names: Iterable[str], data: Examples | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes of inner states, by name, for a probe of `PROBE` tokens. data: of a student of examples. Raises
        TrainError for a state that the model does not have."""
        if not (names := tuple(names)):
            return {}
        inner, training = InnerOutputs(self.network, names), self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                self.run(self.probe(data))
            return {name: tuple(value.shape) for name, value in inner.take().items()}
        finally:
            self.model.train(training)
            inner.close()

    def probe(self, data: Examples | None = None) -> Any:
        """A batch of `PROBE` tokens, or of the first example, for `run`."""
        device = next(self.model.parameters()).device
        probe = SimpleNamespace(layout="padded", input_ids=torch.zeros(PROBE, dtype=torch.int64, device=device))
        if data is not None:
            probe.inputs = data.first().to(device)
        return probe

    def forward(self, batch: AnyBatch, *, num_items: int | Tensor | None = None, **scheduled: Any) -> dict[str, Tensor]:
        """The losses of a micro-batch; see `Objective.losses`.

        Raises TrainError if the model does not take the micro-batch, or it lacks a signal of the objective; KDError if
        logits are not finite (on a GPU the loss is NaN instead).
        """
        objective = self.objective
        if missing := batch.lacks(objective.signals):
            raise TrainError(
                f"objective: {type(objective).__name__} needs the signal {missing[0]!r}, which the source's "
                f"{type(batch).__name__} lacks."
            )
        self.check_width(batch)
        with self._autocast(batch.device):
            output = self.run(batch)
            if self.live is not None:
                batch = self.live.answer(batch, output, self)
            outputs = self.outputs(batch, output)
            return dict(check_losses(objective, objective.losses(batch, outputs, num_items=num_items, **scheduled)))

    def check_width(self, batch: AnyBatch) -> None:
        """Raise TrainError for a micro-batch of a teacher with more logits than the student."""
        targets = getattr(batch, "targets", None)
        if targets is not None and targets.vocab_size > self.vocab_size:
            raise TrainError(
                f"{self.name}: got a vocabulary of {self.vocab_size}; expected at least {targets.vocab_size}, that of "
                "the teacher, whose targets the micro-batch has."
            )

    @torch.no_grad()
    def answered(self, batch: AnyBatch) -> AnyBatch:
        """The micro-batch with the targets that `live` gives it; without one, as it is."""
        if self.live is None:
            return batch
        with self._autocast(batch.device):
            return self.live.answer(batch, None, self)

    def logits(
        self, batch: AnyBatch, rows: Tensor | None = None, run: Callable[[AnyBatch], Output] | None = None
    ) -> Tensor:
        """Logits `[m, V]` at some of the flattened positions; None: at those that count. run: called, where parameters
        are complete, for the output whose logits they are, instead of the model."""
        if self.interrupted is not None and self.interrupted():
            raise Stopped
        with self._autocast(batch.device), self.paused() if run is None else nullcontext():
            output = (self.run if run is None else run)(batch)
            logits: Tensor = OUTPUTS["logits"](output, batch.targets.index if rows is None else rows)
            return logits

    def outputs(self, batch: AnyBatch, output: Output) -> dict[str, Any]:
        """What the objective reads of the last forward of the model, by name. output: what the model returned."""
        found = {name: OUTPUTS[name](output, batch.targets.index) for name in self.objective.outputs if name in OUTPUTS}
        if self._inner is not None:
            found |= self._inner.take(getattr(batch, "position_ids", None))
        return found

    def paused(self) -> AbstractContextManager[None]:
        """For a forward of the model whose inner states nobody reads."""
        return nullcontext() if self._inner is None else self._inner.paused()

    def copied_model(self) -> nn.Module:
        """A copy of the model, with its shared parameters shared. Make it before layers are compiled or wrapped."""
        if self._inner is not None:  # the copy of a hook would record for this student
            self._inner.close()
        try:
            return copy.deepcopy(self.model)
        finally:
            self.read(self.objective)

    @contextmanager
    def sampling(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """Context manager: the model in evaluation mode, without gradients, in the precision of the training, to sample
        tokens from it. Yields a function from token ids `[B, L]` (padded at the end) and flattened positions `[m]` to
        logits `[m, V]`. Not for FSDP2, whose parameters are complete only in `forward`."""
        training, device = self.model.training, next(self.model.parameters()).device

        def logits_of(tokens: Tensor, rows: Tensor) -> Tensor:
            logits: Tensor = OUTPUTS["logits"](self.run(SimpleNamespace(layout="padded", input_ids=tokens)), rows)
            return logits

        self.model.eval()
        try:
            held = nullcontext() if self.fake is None else self.fake.held()
            with torch.no_grad(), self._autocast(device), self.paused(), held:
                yield logits_of
        finally:
            self.model.train(training)

    @property
    def parameters_and_bytes(self) -> tuple[int, int]:
        """The number of the model's parameters, shared ones counted once, and their bytes."""
        return parameters_and_bytes(self.model)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, or none; see `layers_of`."""
        return layers_of(self.model)

    @property
    def parts(self) -> "Mapping[str, LoadedStudent]":
        """The students of this process of which it is made, by name; of a student that is one, none."""
        return {}

    @property
    def alone(self) -> bool:
        """Whether this process trains it on the whole batch, whatever other processes do."""
        return False

    @property
    def absent(self) -> tuple[str, ...]:
        """How the names of tensors begin that only other processes have."""
        return ()

    @property
    def network(self) -> nn.Module:
        """The model, as its parts are named: of a PeftModel, the one inside."""
        found: nn.Module = base_of(self.model)
        return found

    @property
    def left_out(self) -> frozenset[str]:
        """The names of parameters that checkpoints leave out: the frozen base of adapters, also in the copy of a model
        that answers (`live.model`)."""
        frozen = frozen_names(self.model)
        return frozenset(f"{where}.{name}" for where in ("model", "live.model") for name in frozen)

    def clip_(self, most: float | None) -> dict[str, Tensor]:
        """Clip the gradients to the norm `most`, and return what is logged of them: "grad_norm", the norm before."""
        return {"grad_norm": clip_all_(self, most)}

    def run(self, batch: Any, model: nn.Module | None = None) -> Output:
        """What the model returns for a micro-batch. model: a copy of it, to run instead; under FSDP2, within its own
        forward. Raises TrainError if it does not take the micro-batch."""
        if isinstance(batch, MicroBatch):
            self._check(batch)
        output = self._run(self.model if model is None else model, batch)
        if self.fake is not None and model is None:
            output = self.fake.before_lm_head(output)
        if isinstance(output, Hidden) and isinstance(output.lm_head, LMHead) and self.autocast is None:
            # autocast would convert both
            return Hidden(output.states.to(output.lm_head.weight.dtype), output.lm_head)
        return output

    def _check(self, batch: MicroBatch) -> None:
        longest = batch.max_seqlen if batch.layout == "packed" else batch.input_ids.shape[1]
        if self.max_positions is not None and longest > self.max_positions:
            raise TrainError(
                f"{self.name}: got a sequence of {longest} tokens from the cache; this student takes "
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
    if probed.lm_head is None or not probed.lm_head.fusable:
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
    probe = (torch.zeros((1, 4), dtype=torch.int64) if example is None else example).to(parameter.device)

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
        states = base_of(model).base_model(**inputs).last_hidden_state
        return Hidden(states, match.read(model, width))

    return run


def _position_ids(batch: MicroBatch) -> dict[str, Tensor]:
    """Position ids separate the documents of packed rows; padded rows need none."""
    return {"position_ids": batch.position_ids} if batch.layout == "packed" else {}


DEFAULTS = TrainSettings()
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


class LoadedStudent(NamedTuple):
    """A student, and its tokenizer if it has one."""

    student: Student
    tokenizer: Tokenizer | None


def check_source(source: Any, settings: TrainSettings = DEFAULTS, data: Examples | None = None) -> None:
    """Raise TrainError for what cannot be the source of a student (see `make_student`), or a tokenizer for it, as far
    as can be said without loading a model; and for packages that are needed and not installed."""
    if data is not None:
        _check_of_examples(source)
    try:
        if settings.tokenizer is not None:
            load_tokenizer(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
        if settings.lora_rank is not None:
            load_peft()
        if isinstance(source, (str, Path)) and is_factory(str(source)):
            check_factory(str(source), TrainError)
        elif isinstance(source, (str, Path)):
            resolve(source, settings.revision)
    except TeacherError as error:
        raise TrainError(f"student: {error}") from error
    if settings.quantize != "none":
        load_qat(TrainError, f"quantize={settings.quantize}")


def _check_of_examples(source: Any) -> None:
    """Raise TrainError for a source that is of transformers."""
    if not (callable(source) or isinstance(source, LoadedStudent) or is_factory(str(source))):
        raise TrainError(
            f"student: got {source!r} for a cache of examples; expected a torch module, a callable that returns "
            "one, or module:factory."
        )


def make_student(
    source: Any, spec: CacheSpec | None, settings: TrainSettings = DEFAULTS, data: Examples | None = None
) -> LoadedStudent:
    """The student of a training, on the CPU, with weights in float32 (a module's weights keep their types).

    source: a folder or a name on the Hub with a model of transformers, or with an adapter, whose config names its base;
        a folder with a config.json and no weights, or a config: the weights are then new, by the settings' seed; a
        torch module or a callable that returns one, which is copied; or module:factory, which returns any of these.
        With lora_rank, a model of transformers becomes the frozen base of a new adapter.
    spec: of the cache; None for another source of batches. data: for a cache of examples, these; the student is then a
        module, or a callable that returns one. A `LoadedStudent` is returned as it is.
    Raises TrainError if it cannot be loaded, or does not fit the cache: fewer logits than the teacher, or another
    tokenizer.
    """
    if isinstance(source, LoadedStudent):
        return source
    files: ModelFiles | None = None
    files_before = given_files(source) if isinstance(source, (str, Path)) else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            student, files = _student(source, settings, data)
        tokenizer = _tokenizer(files, settings)
    except TeacherError as error:
        raise TrainError(f"student: {error}") from error
    if isinstance(source, (str, Path)):
        student.given, student.given_files = given_name(source), files_before
    if spec is not None:
        check_fits(student, tokenizer, spec, allow_other_tokenizer=settings.allow_other_tokenizer)
    return LoadedStudent(student, tokenizer)


def check_fits(
    student: Student, tokenizer: Tokenizer | None, spec: CacheSpec, *, allow_other_tokenizer: bool = False
) -> None:
    """Raise TrainError if a student does not fit a cache: fewer logits than the teacher, or another tokenizer.
    tokenizer: the student's; None if it is not known."""
    if student.vocab_size < spec.vocab_size:  # more is fine: a padded vocabulary
        raise TrainError(
            f"{student.name}: got a vocabulary of {student.vocab_size}; expected at least {spec.vocab_size}, that of "
            f"the teacher. Give the student vocab_size={spec.vocab_size} (or more, padded), or use a teacher of its "
            "vocabulary."
        )
    known = spec.provenance.tokenizer and spec.provenance.tokenizer.sha256
    if tokenizer and known and tokenizer.identity != known and not allow_other_tokenizer:
        raise TrainError(
            f"tokenizer {tokenizer.name} (sha256 {tokenizer.identity[:12]}…) is not the one of the cache (sha256 "
            f"{known[:12]}…): the student would be trained with other tokens than it is used with. Use the cache's "
            "tokenizer (--tokenizer), or --allow-other-tokenizer if both give the same ids."
        )


def _student(source: Any, settings: TrainSettings, data: Examples | None) -> tuple[Student, ModelFiles | None]:
    if isinstance(source, nn.Module):
        model, name = copy.deepcopy(source), type(base_of(source)).__name__
        if data is None and hasattr(model, "get_output_embeddings"):
            return _of_model(model, name, settings, getattr(source, "name_or_path", "")), None
        if settings.lora_rank is not None:
            raise TrainError(
                f"lora_rank: got {settings.lora_rank} for {name}, a torch module; expected a causal model of "
                "transformers. Leave it out."
            )
        return of_module(model, name, None if data is None else data.first()), None
    if isinstance(source, (str, Path)) and is_factory(str(source)):
        return _student(made_by(str(source), TrainError), settings, data)
    if data is not None:
        _check_of_examples(source)
    if isinstance(source, (str, Path)):
        return _from_files(source, settings)
    if hasattr(source, "get_text_config"):
        model = _new_model(source, settings)
        return _of_model(model, type(model).__name__, settings, None), None
    if callable(source):
        made = source()
        if not isinstance(made, nn.Module):
            raise TrainError(f"student: got {type_name(made)} from {source!r}; expected a torch module.")
        return _student(made, settings, data)  # copied, since the callable may return the same module again
    raise TrainError(
        f"student: got {type_name(source)}; expected a folder, a name, a config of transformers, a torch "
        "module, or a callable that returns one."
    )


def _from_files(source: str | Path, settings: TrainSettings) -> tuple[Student, ModelFiles]:
    transformers = load_transformers()
    files = resolve(source, settings.revision)
    adapter, remote = adapter_files(files), settings.trust_remote_code
    if adapter is None and not files.gguf and not any(next(files.folder.glob(kind), None) for kind in _WEIGHTS):
        if not (files.folder / "config.json").exists():
            raise TrainError(f"{source}: got neither a config.json nor weights; expected the folder of a model.")
        try:
            config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=remote)
        except Exception as error:
            raise TrainError(f"{source}: config.json cannot be read ({brief(error)}).") from error
        student = _of_model(_new_model(config, settings), files.name, settings, None)
        student.source = files
        return student, files
    notes: list[str] = []
    options: dict[str, Any] = {"attention": settings.attention, "notes": notes, "trust_remote_code": remote}
    if adapter is not None:
        base = load_causal_lm(
            adapter.base, adapter.base_files, dtype=base_type(adapter.base_files, settings), **options
        )
        model = load_adapter(base, adapter, trained=True)
    else:
        # float32: in half precision the change of a step would be lost in rounding
        dtype = torch.float32 if settings.lora_rank is None else base_type(files, settings)
        model = load_causal_lm(source, files, dtype=dtype, **options)
    student = _of_model(model, files.name, settings, str(source))
    student.notes[:0] = notes
    began = files if adapter is None else adapter.base_files
    student.source, student.base = files, began.hub or began.name
    return student, files


def _of_model(model: Any, name: str, settings: TrainSettings, base: str | None) -> Student:
    """A causal model of transformers as a student, with the adapter of the settings. base: what the model was named by,
    "" if that is unknown; None if its weights are new."""
    if settings.lora_rank is not None:
        model = with_lora(model, name, settings, base)
    check_trainable(model, name)
    student = of_transformers(model, name)
    student.notes += notes_on(model)
    return student


def _new_model(config: Any, settings: TrainSettings) -> nn.Module:
    transformers = load_transformers()
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "dtype": torch.float32}
    if settings.attention is not None:
        options["attn_implementation"] = settings.attention
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    except Exception as error:
        raise TrainError(
            f"student: transformers cannot make a causal language model of {type(config).__name__} ({brief(error)})."
        ) from error
    return model


def _tokenizer(files: ModelFiles | None, settings: TrainSettings) -> Tokenizer | None:
    """The tokenizer of the settings; otherwise the one in the student's folder, or of an adapter in that of its base,
    if there is one."""
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    if files is None:
        return None
    adapter = adapter_files(files)
    for one in [files] if adapter is None else [files, adapter.base_files]:
        if one.gguf or any(one.folder.glob("tokenizer*")):
            return load_tokenizer(one.path, trust_remote_code=settings.trust_remote_code)
    return None
