"""From names and objects that people give to a teacher, its data, and this process's part among the workers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import getattr_static
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch

from ..data.documents import Documents
from ..data.examples import Examples, as_examples
from ..data.load import load_documents
from ..data.sources import open_source
from ..errors import DataError, TeacherError
from ..models.hub import ModelFiles, resolve
from ..models.tokenizers import Tokenizer, choose_tokenizer, load_tokenizer
from ..settings import DataSettings, ModelSettings
from ..utils.distributed import local_device
from ..utils.factories import check_factory, is_factory, made_by
from .hf import load_hf
from .module import ModuleTeacher
from .protocol import Teacher
from .registry import find_loader
from .tensor_parallel import ParallelGroup, join_group, rank_and_world_size

DEFAULTS = ModelSettings()
_MEMBERS = ("vocab_size", "fingerprint", "device", "max_positions")  # of a Teacher
Check = Callable[[Any], None]
"""Refuses a teacher, or the `Declared` limits of one that is not loaded yet."""


def accept(teacher: Any) -> None:
    """Refuses none."""


class Loaded(NamedTuple):
    """A teacher, its data (None if no data settings were given), and the worker that this process belongs to."""

    teacher: Teacher
    data: Documents | Examples | None
    worker: ParallelGroup


def load(
    teacher: str,
    settings: ModelSettings,
    data: DataSettings | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    parallel: int = 1,
    progress: bool = False,
    before: Callable[[Any], None] = lambda source: None,
    check: Check = accept,
) -> Loaded:
    """A teacher by name (see `TeacherSettings`), and the data that the settings name.

    rank, world_size: of this process, as `rank_and_world_size` takes them. parallel: processes per worker.
    progress: a progress bar on stderr while weights are hashed. before: called with the opened data (None without)
    before the teacher is loaded. check: called with what is declared of the teacher before its weights are loaded, as
    far as that is known, and with the teacher, before anything is asked of it.
    Raises TeacherError and DataError.
    """
    rank, world_size = rank_and_world_size(rank, world_size)
    if parallel < 1:
        raise TeacherError(f"teacher_parallel: got {parallel}; expected an integer from 1 on.")
    device = local_device(settings.device, TeacherError)
    # before the teacher, which takes a while: what is missing is reported at once
    source = None if data is None else open_data(data.data, data.column, data.text_documents)
    tokenizer = None if data is None else named_tokenizer(data.tokenizer, data.template, settings.trust_remote_code)
    check_teacher_name(teacher, settings)
    before(source)
    worker = ParallelGroup(rank, world_size, device=device)
    if parallel > 1:
        worker = join_group(rank, world_size, parallel, device=device.type)
    group = worker if parallel > 1 else None
    model = load_teacher(teacher, settings, source, parallel=group, progress=progress, check=check)
    check(model)
    if data is None:
        return Loaded(model, None, worker)
    documents = as_data(
        source,
        model,
        tokenizer=tokenizer,
        template=data.template,
        trust_remote_code=settings.trust_remote_code,
        allow_other_tokenizer=data.allow_other_tokenizer,
        loss_on=data.loss_on,
    )
    return Loaded(model, documents, worker)


def check_teacher_name(source: str | Path, settings: ModelSettings = DEFAULTS) -> ModelFiles | None:
    """Raise TeacherError for a name of what cannot be a teacher, as far as can be said without loading it. Returns the
    files of a model of transformers, and None for other kinds."""
    if find_loader(str(source)):
        return None
    if is_factory(str(source)):
        check_factory(str(source), TeacherError)
        return None
    return resolve(source, settings.revision)


def named_tokenizer(name: Any, template: str | Path | None = None, trust_remote_code: bool = False) -> Tokenizer | None:
    """The tokenizer of this name; None for None. DataError if there is no such template, TeacherError if there is no
    such tokenizer."""
    if template is not None and not Path(template).is_file():
        raise DataError(f"template: got {template}; expected the file of a chat template, and there is none.")
    if name is None or isinstance(name, Tokenizer):
        return name
    return load_tokenizer(name, template=template, trust_remote_code=trust_remote_code)


def load_teacher(
    source: str | Path,
    settings: ModelSettings = DEFAULTS,
    data: Any = None,
    *,
    parallel: ParallelGroup | None = None,
    progress: bool = False,
    check: Check = accept,
) -> Teacher:
    """A teacher by name: KIND:NAME of a registered kind, module:factory, or what `load_hf` takes.

    data: see `as_teacher`. parallel, progress, check: see `load_hf`.
    """
    settings = replace(settings, device=str(local_device(settings.device, TeacherError)))
    if found := find_loader(str(source)):
        loader, name = found
        if parallel is not None:
            raise TeacherError(
                f"teacher_parallel: got {parallel.size} processes for the teacher {source}; expected one, as it is not "
                "divided by torchrun. In vLLM, use --teacher-options tensor_parallel_size."
            )
        return as_teacher(loader(name, settings), data)
    if settings.teacher_options:
        raise TeacherError(
            f"teacher_options: got {len(settings.teacher_options)} for the teacher {source}; expected none, as only "
            "vllm:NAME and http://HOST:PORT have options."
        )
    if is_factory(str(source)):
        made = made_by(str(source), TeacherError)
        if not callable(made):
            raise TeacherError(f"{source}: returned {type(made).__name__}; expected a Teacher or a torch module.")
        return as_teacher(made, data)
    return load_hf(
        source,
        dtype=settings.dtype,
        attention=settings.attention,
        device=None if parallel is not None else settings.device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        parallel=parallel,
        progress=progress,
        check=check,
    )


def as_teacher(
    teacher: Any, data: Any = None, *, fingerprint: str = "", vocab_size: int | None = None, check: Check = accept
) -> Teacher:
    """A `Teacher` as it is; a name, loaded by `load_teacher`; a module or a callable as a `ModuleTeacher`.

    data, fingerprint, vocab_size: for a module or a callable. The first of the data, if they are `Examples`, is the
    probe input. check: of a name, see `load_hf`.
    """
    if isinstance(teacher, (str, Path)):
        return load_teacher(teacher, check=check)
    # found without asking for them: a server would be asked, and weights be hashed
    if all(getattr_static(teacher, name, None) is not None or hasattr(teacher, name) for name in _MEMBERS):
        return teacher  # type: ignore[no-any-return]
    probe = torch.zeros((1, 1), dtype=torch.int64)
    data = as_examples(data)
    if isinstance(data, Examples) and len(data):
        probe = data.first()
    return ModuleTeacher(teacher, vocab_size=vocab_size, probe=probe, fingerprint=fingerprint)


def as_data(
    source: Any,
    teacher: Teacher,
    *,
    column: str | None = None,
    text_documents: str = "line",
    tokenizer: Any = None,
    template: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_other_tokenizer: bool = False,
    loss_on: str = "all",
) -> Documents | Examples:
    """`Documents` and `Examples` as they are; `Examples` of a data set of examples (see `as_examples`); for any other
    source, its documents.

    source, column, text_documents: as `open_documents` takes them.
    tokenizer: for text and messages: a `Tokenizer`, or what `load_tokenizer` takes; None: the teacher's own.
    template: a file with a chat template, instead of the tokenizer's.
    """
    source = as_examples(source)
    if isinstance(source, (Documents, Examples)):
        return source

    def chosen() -> Tokenizer | None:
        named, own = tokenizer, None
        if named is not None and not isinstance(named, Tokenizer):
            named = load_tokenizer(named, template=template, trust_remote_code=trust_remote_code)
        if not (named is not None and allow_other_tokenizer):
            own = own_tokenizer(teacher, template=template)
            check = getattr(teacher, "check_tokenizer", None)
            if check is not None and named is not None:
                check(named)
        return choose_tokenizer(named, own, allow_other_tokenizer=allow_other_tokenizer)

    return load_documents(
        source,
        column=column,
        text_documents=text_documents,
        tokenizer=chosen,
        loss_on=loss_on,
        vocab_size=teacher.vocab_size,
    )


def own_tokenizer(teacher: Teacher, template: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer of a teacher's model, if it has a method `tokenizer`. TeacherError if there are no files of one."""
    method = getattr(teacher, "tokenizer", None)
    # not a tokenizer of transformers, which some keep as an attribute, and which can be called, too
    return method(template=template) if isinstance(method, MethodType) else None


def open_data(names: Sequence[str], column: str | None = None, text_documents: str = "line") -> Any:
    """The data that the names of `DataSettings.data` stand for, opened: `Documents`, `Examples`, or what `as_data`
    takes. Raises DataError."""
    if not names:
        raise DataError("data: got no file; expected at least one, a folder, a pattern, or module:factory.")
    source: Any = [Path(name) for name in names] if len(names) > 1 else names[0]
    if len(names) == 1 and is_factory(names[0]):
        source = as_examples(made_by(names[0], DataError))
    if isinstance(source, (Documents, Examples)):
        return source
    return open_source(source, column, text_documents)
