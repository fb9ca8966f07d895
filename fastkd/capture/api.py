"""`fastkd.capture`: from a teacher and a dataset to a cache."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from ..cache import create_cache
from ..cache.stores import open_store
from ..data.describe import describe_documents
from ..data.documents import Documents
from ..kernels import prepare_topk
from ..settings import CaptureSettings
from ..teachers.load import as_data, as_teacher
from ..teachers.workers import Group, rank_and_world_size
from ..utils.output_guard import check_cache_place
from ..utils.progress import MODES, Lenient
from ..utils.signals import Stop
from .claims import Claims
from .prepare import ask_for, keep_plan, prepare
from .runner import CaptureReport, Job
from .teacher_pass import Runner
from .text import beyond_text, plan_text

DEFAULTS = CaptureSettings()


def capture(
    teacher: Any,
    data: Any,
    out: Any,
    settings: CaptureSettings = DEFAULTS,
    *,
    fingerprint: str = "",
    vocab_size: int | None = None,
    column: str | None = None,
    text_documents: str = "line",
    tokenizer: Any = None,
    loss_on: str = "all",
    rank: int | None = None,
    world_size: int | None = None,
    group: Group | None = None,
    threads: int = 1,
    stop: Stop | None = None,
    progress: str = "none",
    notes: str = "",
    **changes: Any,
) -> CaptureReport:
    """Run a teacher once over a dataset, and keep what it says in a cache. Called again, it writes what is missing.

    teacher: a folder, a GGUF file or a name on the Hub (`load_hf` has more to say of those); a `Teacher`; or a
        `nn.Module` or callable that maps token ids `[B, L]` (or examples) to logits, with fingerprint (a callable's
        identity; a module's weights are hashed) and vocab_size (found out where None).
    data: files, a Hugging Face `Dataset`, or documents in memory, with column and text_documents: see `open_documents`.
        Ids are taken as they are; text and conversations are tokenised by tokenizer (a place, a `Tokenizer`, or one of
        transformers; None: the teacher's own). loss_on: "all", or of conversations "assistant". Or `Documents`, or
        `Examples`.
    out: a folder, a URL (s3://, gs://, az://), or a `Store`.
    settings, changes: a `CaptureSettings`, and fields of it that differ: `capture(..., k=64, draws=0)`.
    rank, world_size: which of how many workers this is; None: torchrun's or SLURM's variables, else 0 of 1.
    group: the processes that make up this worker (`teacher/parallel.py`); None: this one.
    threads: on which shards are encoded and written. stop: ask for a stop with `stop()`, from a signal's handler, say.
    progress: "none", "bar", "lines" or "events". notes: free text for the cache, no part of what must be equal.

    Returns what was done; `complete` says whether anything is left. Raises DataError for the data, TeacherError for the
    teacher (NaN in its logits, say), CacheError where the cache is another's, or what is there is no cache, and
    StoreError where a store failed (a full disk, say): what was committed stays, and the same call goes on from there.
    """
    if unknown := sorted(set(changes) - {f.name for f in fields(CaptureSettings)}):
        raise TypeError(f"capture() got unexpected settings: {', '.join(unknown)}")
    if progress not in MODES:
        raise ValueError(f"progress: got {progress!r}; expected one of {', '.join(MODES)}.")
    settings = replace(settings, **changes)
    rank, world_size = rank_and_world_size(rank, world_size)
    model = as_teacher(teacher, data, fingerprint=fingerprint, vocab_size=vocab_size)
    data = as_data(data, model, column=column, text_documents=text_documents, tokenizer=tokenizer, loss_on=loss_on)
    store = open_store(out, create=True)
    check_cache_place(store)
    claims = Claims(store, rank, world_size)

    tell = _teller(progress if group is None or group.leader else "none")

    for note in getattr(model, "notes", []):
        tell(f"teacher: {note}")
    for line in beyond_text(settings.k, settings.draws, model.vocab_size):
        tell(line)
    prepared = prepare(model, data, settings, store, claims, progress=progress == "bar", say=tell, notes=notes)
    if isinstance(data, Documents):
        for line in describe_documents(data, prepared.plan.lengths):
            tell(line)
    tell(plan_text(prepared.plan), "plan", **prepared.plan.totals)
    if line := prepare_topk(model.device):
        tell(line)
    job = Job(
        Runner(model, ask_for(settings)),
        data,
        prepared.plan,
        store,
        claims,
        rank=rank,
        world_size=world_size,
        group=group,
        stop=stop,
        progress_mode=progress,
    )
    if group is not None and not group.leader:
        return job.run(None)
    try:
        # before the spec: where two begin at once with other settings, the plan names them
        keep_plan(store, prepared.plan)
        writer = create_cache(store, prepared.spec, threads=threads, queue=1)
    except BaseException:
        if group is not None:
            group.share(None)  # the others wait to be told of a shard
        raise
    with writer:
        return job.run(writer)


def _teller(progress: str) -> Callable[..., None]:
    """What says a line to whoever reads: tell(text, event, **fields)."""
    stream: Any = Lenient(sys.stdout if progress == "events" else sys.stderr)

    def tell(text: str, event: str = "note", **fields: Any) -> None:
        if progress == "events":
            print(json.dumps({"event": event, "text": text, **fields}), file=stream, flush=True)
        elif progress != "none":
            print(text, file=stream, flush=True)

    return tell
