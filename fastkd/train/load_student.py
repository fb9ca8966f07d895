"""`make_student`: a student from a folder, a name, a config, a torch module, or a callable that returns one."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cache.spec import CacheSpec
from ..data.examples import Examples
from ..errors import TeacherError, TrainError
from ..models.hf import load_causal_lm
from ..models.hub import ModelFiles, brief, load_transformers, resolve
from ..models.tokenizers import Tokenizer, load_tokenizer
from ..settings import TrainSettings
from ..utils.factories import is_factory, made_by
from .student import Student, of_module, of_transformers

DEFAULTS = TrainSettings()
_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


class LoadedStudent(NamedTuple):
    """A student, and its tokenizer if it has one."""

    student: Student
    tokenizer: Tokenizer | None


def make_student(
    source: Any, spec: CacheSpec | None, settings: TrainSettings = DEFAULTS, data: Examples | None = None
) -> LoadedStudent:
    """The student of a training, on the CPU, with weights in float32 (a module's weights keep their types).

    source: a folder or a name on the Hub with a model of transformers; a folder with a config.json and no weights, or a
        config: the weights are then new, by the settings' seed; a torch module or a callable that returns one, which is
        copied; or module:factory, which returns any of these.
    spec: of the cache; None for another source of batches. data: for a cache of examples, these; the student is then a
        module, or a callable that returns one.
    Raises TrainError if it cannot be loaded, or does not fit the cache: fewer logits than the teacher, or another
    tokenizer.
    """
    files: ModelFiles | None = None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            student, files = _student(source, settings, data)
        tokenizer = _tokenizer(files, settings)
    except TeacherError as error:
        raise TrainError(f"student: {error}") from error
    if spec is not None:
        check_vocabulary(student, spec)
    if spec is not None and tokenizer is not None and not settings.allow_other_tokenizer:
        check_tokenizer(tokenizer, spec)
    return LoadedStudent(student, tokenizer)


def check_vocabulary(student: Student, spec: CacheSpec) -> None:
    """Raise TrainError if the student has fewer logits than the teacher. It may have more: a padded vocabulary."""
    if student.vocab_size < spec.vocab_size:
        raise TrainError(
            f"{student.name}: got a vocabulary of {student.vocab_size}; expected at least {spec.vocab_size}, that of "
            f"the cache's teacher. Give the student vocab_size={spec.vocab_size} (or more, padded), or capture with a "
            "teacher of its vocabulary."
        )


def check_tokenizer(tokenizer: Tokenizer, spec: CacheSpec) -> None:
    """Raise TrainError if the cache's tokens were made by another tokenizer."""
    expected = spec.provenance.tokenizer
    if expected is not None and expected.sha256 not in (None, tokenizer.identity):
        raise TrainError(
            f"tokenizer {tokenizer.name} (sha256 {tokenizer.identity[:12]}…) is not the one of the cache (sha256 "
            f"{expected.sha256:.12}…): the student would be trained with other tokens than it is used with. Use the "
            "cache's tokenizer (--tokenizer), or --allow-other-tokenizer if both give the same ids."
        )


def _student(source: Any, settings: TrainSettings, data: Examples | None) -> tuple[Student, ModelFiles | None]:
    if isinstance(source, nn.Module):
        return _of_model(copy.deepcopy(source), type(source).__name__, data), None
    if isinstance(source, (str, Path)) and is_factory(str(source)):
        return _student(made_by(str(source), TrainError), settings, data)
    if data is not None and not callable(source):
        raise TrainError(
            f"student: got {source!r} for a cache of examples; expected a torch module, a callable that returns "
            "one, or module:factory."
        )
    if isinstance(source, (str, Path)):
        return _from_files(source, settings)
    if hasattr(source, "get_text_config"):
        model = _new_model(source, settings)
        return of_transformers(model, type(model).__name__), None
    if callable(source):
        made = source()
        if not isinstance(made, nn.Module):
            raise TrainError(f"student: got {type(made).__name__} from {source!r}; expected a torch module.")
        # copied, since the callable may return the same module again
        return _of_model(copy.deepcopy(made), type(made).__name__, data), None
    raise TrainError(
        f"student: got {type(source).__name__}; expected a folder, a name, a config of transformers, a torch "
        "module, or a callable that returns one."
    )


def _of_model(model: nn.Module, name: str, data: Examples | None) -> Student:
    if data is not None:
        return of_module(model, name, data.first())
    return of_transformers(model, name) if hasattr(model, "get_output_embeddings") else of_module(model, name)


def _from_files(source: str | Path, settings: TrainSettings) -> tuple[Student, ModelFiles]:
    transformers = load_transformers()
    files = resolve(source, settings.revision)
    remote = settings.trust_remote_code
    if not files.gguf and not any(next(files.folder.glob(kind), None) for kind in _WEIGHTS):
        if not (files.folder / _CONFIG).exists():
            raise TrainError(f"{source}: got neither a {_CONFIG} nor weights; expected the folder of a model.")
        try:
            config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=remote)
        except Exception as error:
            raise TrainError(f"{source}: {_CONFIG} cannot be read ({brief(error)}).") from error
        return of_transformers(_new_model(config, settings), files.name), files
    notes: list[str] = []
    # float32: in half precision the change of a step would be lost in rounding
    model = load_causal_lm(
        source, files, attention=settings.attention, notes=notes, trust_remote_code=remote, dtype=torch.float32
    )
    student = of_transformers(model, files.name)
    student.notes[:0] = notes
    return student, files


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
    """The tokenizer of the settings; otherwise the one in the student's folder, if there is one."""
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    if files is None or not (files.gguf or any(files.folder.glob("tokenizer*"))):
        return None
    return load_tokenizer(files.path, trust_remote_code=settings.trust_remote_code)
