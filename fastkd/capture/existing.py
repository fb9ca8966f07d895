"""Whether a capture may continue the cache in its place, by what is known before the teacher is loaded, and after."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..cache import CacheError, CacheSpec, NotFound, StoreError
from ..cache.capture_plan import CapturePlan, read_capture_plan
from ..cache.manifest import read_spec
from ..cache.provenance import Identity, Provenance
from ..cache.spec import differences
from ..cache.stores import Store, open_store
from ..data.documents import LARGEST_ID, Documents
from ..data.examples import Examples
from ..data.sources import Source
from ..models.hub import ModelFiles
from ..models.tokenizers import Tokenizer, load_tokenizer
from ..settings import CaptureSettings, DataSettings, ModelSettings
from ..teachers.hf import weights_sha256
from ..teachers.load import as_data, check_teacher_name, named_tokenizer
from ..utils.atomic import check_place
from ..utils.output_guard import check_store
from .window_plan import cache_spec

DELETE = "Delete it; it is written again from the same data."
_OF_TEXT = ("packing", "on_long", "overlap")
_IF_GIVEN = ("context", "shard_positions")  # their defaults depend on teacher and data


def store_there(out: Any) -> Store | None:
    """The store that a capture would write to, if it can; None for a local folder that is not there, but can be made.
    Raises CacheError."""
    try:
        store = open_store(out)
    except NotFound:
        if "://" not in str(out):
            check_place(Path(out), "out", CacheError)
        return None
    check_store(store)
    return store


def check_continues(
    store: Store,
    settings: CaptureSettings,
    source: Any,
    *,
    teacher: str | Path,
    model: ModelSettings,
    data: DataSettings,
) -> None:
    """Raise CacheError for a store with a cache of other settings, documents, or of another teacher, as far as files
    tell before the teacher is loaded. What they do not tell is compared by `prepare`.

    source: the opened data. teacher: its name, and model: how it is loaded. data: how the data are read.
    What is cheap comes first: settings, then the number of documents, then hashes of weights and data, which are
    remembered.
    """
    if (theirs := existing_spec(store)) is None:
        return
    there = existing_plan(store)
    ours = cache_spec(
        settings, vocab_size=theirs.vocab_size, shard_positions=theirs.shard_positions, inputs=theirs.inputs,
        notes=theirs.notes, **theirs.provenance.texts(),
    )  # fmt: skip
    found = differences(theirs, ours)
    if there is not None:
        names = ("batch_tokens", "seed", *(() if isinstance(source, Examples) else _OF_TEXT))
        given = {name: getattr(settings, name) for name in names}
        if not isinstance(source, Examples):
            given |= {name: value for name in _IF_GIVEN if (value := getattr(settings, name)) is not None}
        found += differing((name, there.settings.get(name), value) for name, value in given.items())
        unit = "examples" if isinstance(source, Examples) else "documents"
        if (count := _count(source)) != there.totals.get("documents"):
            found.append(f"data: {there.totals.get('documents')} {unit} and {count}")
    if isinstance(source, Source):
        names = (theirs.provenance.text_documents or "line", source.text_documents or "line")
        found += differing([("text_documents", *names)])
    if found:
        raise refusal(store, found)
    files = check_teacher_name(teacher, model)
    known = theirs.provenance.teacher and theirs.provenance.teacher.sha256
    if files is not None and known:
        sha256 = weights_sha256(files, model.trust_remote_code)
        found += differing([("teacher: weights of sha256", f"{known[:12]}…", f"{sha256[:12]}…")])
    if there is not None and (documents := _documents(source, files, model, data)) is not None:
        dataset = documents.fingerprint()
        if there.dataset != dataset:  # which also depends on the tokenizer
            text = Provenance(**text_provenance(documents)).texts()["tokenizer"]
            found += differing([("tokenizer", theirs.tokenizer, text)]) or plan_differences(there, dataset, {})
    if found:
        raise refusal(store, found)


def _count(source: Any) -> int:
    """The number of documents or examples."""
    return sum(map(len, source.columns)) if isinstance(source, Source) else len(source)


def text_provenance(data: Documents | Examples) -> dict[str, Any]:
    """What made the tokens of documents: these fields of `Provenance`."""
    text = {} if isinstance(data, Examples) else data.text_settings
    found: dict[str, Any] = {n: Identity.of(text[n]) if n in text else None for n in ("tokenizer", "template")}
    return found | {name: text.get(name) for name in ("loss_on", "text_documents")}


def _documents(
    source: Any, files: ModelFiles | None, model: ModelSettings, data: DataSettings
) -> Documents | Examples | None:
    """The data; None if they are text, and the teacher's tokenizer is not known yet."""
    if isinstance(source, (Documents, Examples)):
        return source
    tokenizer = named_tokenizer(data.tokenizer, data.template, model.trust_remote_code)
    if tokenizer is None and files is None:
        return None
    made: Any = _FilesOfTeacher(files, model.trust_remote_code)
    how: dict[str, Any] = {"loss_on": data.loss_on, "template": data.template}
    how["allow_other_tokenizer"] = data.allow_other_tokenizer
    return as_data(source, made, tokenizer=tokenizer, trust_remote_code=model.trust_remote_code, **how)


class _FilesOfTeacher:
    """A teacher of which only the files are there: its tokenizer."""

    vocab_size = LARGEST_ID

    def __init__(self, files: ModelFiles | None, trust_remote_code: bool) -> None:
        self._files, self._trust_remote_code = files, trust_remote_code

    def tokenizer(self, *, template: str | Path | None = None) -> Tokenizer | None:
        if self._files is None:
            return None
        return load_tokenizer(self._files.path, template=template, trust_remote_code=self._trust_remote_code)


def existing_plan(store: Store) -> CapturePlan | None:
    """The plan in the store; None if there is none."""
    try:
        return read_capture_plan(store)
    except StoreError:
        raise
    except CacheError as error:
        raise CacheError(f"{error} {DELETE}") from error


def differing(values: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """The (name, theirs, ours) that differ, as texts."""
    return [f"{name}: {theirs!r} and {ours!r}" for name, theirs, ours in values if theirs != ours]


def plan_differences(there: CapturePlan, dataset: str, settings: Mapping[str, Any]) -> list[str]:
    """The differences of the plan in the store from these settings and data."""
    found = differing((name, there.settings.get(name), value) for name, value in settings.items())
    data = f"data: sha256 {there.dataset[:12]}… and {dataset[:12]}…"
    return found if there.dataset == dataset else [*found, data]


def existing_spec(store: Store) -> CacheSpec | None:
    try:
        return read_spec(store)
    except CacheError as error:
        if isinstance(error.__cause__, NotFound):
            return None
        raise


def refusal(store: Store, different: list[str]) -> CacheError:
    return CacheError(
        f"{store.describe()}: the existing cache was written with other settings (there, and now: "
        f"{'; '.join(different)}). Write to another folder, or capture with the settings of the existing cache."
    )
