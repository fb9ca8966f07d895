"""From what people name or have at hand to a teacher, its data, and this process's place among the workers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.documents import Documents
from ..data.examples import Examples
from ..data.load import documents_of, kind_of
from ..data.sources import Opened, open_column
from ..errors import DataError, TeacherError
from ..models.tokenizers import Tokenizer, choose_tokenizer, load_tokenizer
from ..settings import DataSettings, ModelSettings
from ..utils.factories import is_factory, made_by
from .hf import HFTeacher, load_hf
from .module import ModuleTeacher
from .protocol import Teacher
from .tensor_parallel import join_group
from .workers import Alone, Place, place_of

_MEMBERS = ("vocab_size", "fingerprint", "device", "max_positions")  # of a Teacher


class Loaded(NamedTuple):
    """A teacher, its data (None where none were asked for), and this process's place."""

    teacher: Teacher
    data: Documents | Examples | None
    place: Place


def load(
    teacher: str,
    settings: ModelSettings,
    data: DataSettings | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    parallel: int = 1,
    progress: bool = False,
) -> Loaded:
    """A teacher by name (see `TeacherSettings`), and the data that the settings name.

    rank, world_size: as `place_of` takes them; of processes, `parallel` of which make up one worker.
    progress: a bar on stderr while weights are hashed.
    Raises TeacherError and DataError, naming what cannot be had.
    """
    rank, world_size = place_of(rank, world_size)
    device = settings.device or _device(os.environ)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TeacherError(f"device: got {device}, and torch finds no GPU here. Leave it out to use the CPU.")
    # a file that is not there is missed before the teacher is read, which takes a while
    source = None if data is None else _source(data)
    place, group = Place(rank, world_size, Alone()), None
    if parallel > 1:
        group = join_group(rank, world_size, parallel, device=device.partition(":")[0])
        place = Place(group.worker, group.workers, group)
    if is_factory(teacher):
        made = made_by(teacher, TeacherError)
        if not callable(made):
            raise TeacherError(f"{teacher}: returned {type(made).__name__}; a Teacher or a torch module is needed.")
        model = as_teacher(made, source)
    else:
        model = load_hf(
            teacher,
            dtype=settings.dtype,
            attention=settings.attention,
            device=None if group is not None else device,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            parallel=group,
            progress=progress,
        )
    if data is None:
        return Loaded(model, None, place)
    named = None
    if data.tokenizer is not None:
        named = load_tokenizer(data.tokenizer, template=data.template, trust_remote_code=settings.trust_remote_code)
    found = as_data(
        source,
        model,
        tokenizer=named,
        template=data.template,
        allow_other_tokenizer=data.allow_other_tokenizer,
        loss_on=data.loss_on,
    )
    return Loaded(model, found, place)


def as_teacher(teacher: Any, data: Any = None, *, fingerprint: str = "", vocab_size: int | None = None) -> Teacher:
    """A `Teacher` as it is; a folder, a GGUF file or a name on the Hub, loaded; a module or a callable as a teacher.

    data, fingerprint, vocab_size: for the last; see `ModuleTeacher`.
    """
    if isinstance(teacher, (str, Path)):
        return load_hf(teacher)
    if all(hasattr(teacher, name) for name in _MEMBERS):
        return teacher  # type: ignore[no-any-return]
    probe = torch.zeros((1, 1), dtype=torch.int64)
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
    allow_other_tokenizer: bool = False,
    loss_on: str = "all",
) -> Documents | Examples:
    """`Documents` and `Examples` as they are; of anything else, the documents in it.

    source, column, text_documents: as `open_documents` takes them.
    tokenizer: for text and messages: a `Tokenizer`, or what `load_tokenizer` takes; None: the teacher's own. template:
        a file with a chat template, in place of the tokenizer's.
    """
    if isinstance(source, (Documents, Examples)):
        return source
    opened = Opened(*open_column(source, column, text_documents))
    if kind_of(opened.columns) not in ("text", "messages"):
        return documents_of(opened, loss_on=loss_on, vocab_size=teacher.vocab_size)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer, template=template)
    own = None
    if isinstance(teacher, HFTeacher) and not (tokenizer is not None and allow_other_tokenizer):
        own = teacher.tokenizer(template=template)
    chosen = choose_tokenizer(tokenizer, own, allow_other_tokenizer=allow_other_tokenizer)
    return documents_of(opened, tokenizer=chosen, loss_on=loss_on, vocab_size=teacher.vocab_size)


def _source(data: DataSettings) -> Any:
    """The data, opened."""
    if not data.data:
        raise DataError("--data: found no file. Name at least one, or a folder, a pattern, or module:factory.")
    source: Any = [Path(name) for name in data.data] if len(data.data) > 1 else data.data[0]
    if len(data.data) == 1 and is_factory(data.data[0]):
        source = made_by(data.data[0], DataError)
    if isinstance(source, (Documents, Examples)):
        return source
    return Opened(*open_column(source, data.column, data.text_documents))


def _device(environment: Mapping[str, str]) -> str:
    """This process's GPU, by torchrun's or SLURM's numbers; or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    local = next((environment[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environment), "0")
    return f"cuda:{int(local) % torch.cuda.device_count()}"
