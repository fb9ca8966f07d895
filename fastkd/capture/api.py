"""`fastkd.capture`: run a teacher over a dataset and store its targets in a cache."""

from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

from ..cache.stores import open_store
from ..data.documents import Documents, describe_documents
from ..kernels import prepare_topk
from ..settings import CaptureSettings
from ..teachers.load import as_data, as_teacher
from ..teachers.tensor_parallel import ParallelGroup, rank_and_world_size
from ..utils.output_guard import check_store
from ..utils.progress import MODES, Progress
from ..utils.signals import Stop
from .answers import check_limits, large_k_text
from .begin import begin_cache
from .claims import Claims
from .feature_places import find_places
from .feature_settings import check_feature_settings
from .features.prepare import check_existing, check_sizes
from .prepare import prepare
from .runner import CaptureReport, CaptureRunner
from .teacher_pass import TeacherPass
from .window_plan import plan_text

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
    group: ParallelGroup | None = None,
    threads: int = 1,
    stop: Stop | None = None,
    progress: str = "none",
    notes: str = "",
    **changes: Any,
) -> CaptureReport:
    """Run a teacher once over a dataset, and store its targets in a cache. Calling it again continues it.

    teacher: a `Teacher`; a `nn.Module` or callable that maps token ids `[B, L]` (or examples) to logits, with
        fingerprint (identifies a callable; a module's weights are hashed) and vocab_size (None: determined by running
        it); or a name: a folder, a GGUF file, a name on the Hub, module:factory, or KIND:NAME of a registered kind.
    data: files, a Hugging Face `Dataset`, or documents in memory, with column and text_documents: see `open_documents`.
        Token ids are used as they are; text and conversations are tokenized by tokenizer (a name, a `Tokenizer`, or one
        of transformers; None: the teacher's own). loss_on: "all", or for conversations "assistant". Or `Documents`, or
        `Examples`.
    out: a folder, a URL (s3://, gs://, az://), or a `Store`.
    settings, changes: a `CaptureSettings`, and fields of it to replace: `capture(..., k=64, draws=0)`.
    rank, world_size: of this worker among all workers; None: from torchrun's or SLURM's variables, else 0 of 1.
    group: the processes that make up this worker (see `join_group`); None: this process.
    threads: for encoding and writing shards. stop: call `stop()` to stop early, from a signal handler for example.
    progress: "none", "bar", "lines" or "events". notes: free text for the cache; two workers' may differ.

    Returns a report; its `complete` says whether work remains. Raises DataError about the data, TeacherError about the
    teacher (NaN in its logits, for example), CacheError if `out` holds another cache or none that can be continued, and
    StoreError if a store failed (a full disk, for example): committed shards stay, and the same call continues.
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
    check_store(store)
    claims = Claims(store, rank, world_size)
    mode = progress if group is None or group.leader else "none"
    reporter = Progress(0, unit="position", mode="lines" if mode == "bar" else mode)

    def tell(text: str) -> None:
        reporter.event("note", text=text)

    for note in getattr(model, "notes", []):
        tell(f"teacher: {note}")
    for line in large_k_text(settings.k, settings.draws, model.vocab_size):
        tell(line)
    check_limits(model, settings)
    check_feature_settings(settings)
    places = find_places(model, data, settings.features)
    plan, spec = prepare(model, data, settings, store, claims, progress=progress == "bar", say=tell, notes=notes)
    check_sizes(places, plan)
    check_existing(store, spec, places, settings)
    if isinstance(data, Documents):
        for line in describe_documents(data, plan.lengths):
            tell(line)
    reporter.event("plan", text=plan_text(plan.totals, plan.settings.context, plan.settings.on_long), **plan.totals)
    if line := prepare_topk(model.device):
        tell(line)
    group = group or ParallelGroup()
    teacher_pass = TeacherPass(model, settings)
    with ExitStack() as stack:
        begun = begin_cache(
            teacher_pass, data, plan, spec, places, store, claims, stack, group=group, threads=threads, say=tell
        )
        runner = CaptureRunner(
            teacher_pass,
            data,
            plan,
            store,
            claims,
            features=begun.features,
            rank=rank,
            world_size=world_size,
            group=group,
            stop=stop,
            progress_mode=progress,
        )
        return runner.run(begun.targets, begun.writers)
