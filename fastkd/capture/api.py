"""`fastkd.capture`: run a teacher over a dataset and store its targets in a cache."""

from collections.abc import Iterable
from typing import Any, Unpack

from ..settings import CaptureSettings
from ..settings_changes import CaptureChanges
from ..teachers.tensor_parallel import ParallelGroup
from ..utils.progress import Mode
from ..utils.signals import Stop
from .session import DEFAULTS, CaptureSession
from .shard_runner import CaptureReport


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
    shards: Iterable[int] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    group: ParallelGroup | None = None,
    threads: int = 1,
    stop: Stop | None = None,
    progress: Mode = "none",
    notes: str = "",
    **changes: Unpack[CaptureChanges],
) -> CaptureReport:
    """Run a teacher once over a dataset, and store its targets in a cache. Calling it again continues it.

    teacher: a `Teacher`; a `nn.Module` or callable that maps token ids `[B, L]` (or examples) to logits, with
        fingerprint (identifies a callable; a module's weights are hashed) and vocab_size (None: determined by running
        it); or a name: a folder, a GGUF file, a name on the Hub, module:factory, or KIND:NAME of a registered kind.
    data: files, a Hugging Face `Dataset`, or documents in memory, with column and text_documents: see `open_documents`.
        Token ids are used as they are; text and conversations are tokenized by tokenizer (a name, a `Tokenizer`, or one
        of transformers; None: the teacher's own). Or `Documents`, or `Examples`.
    loss_on: which positions of conversations get targets: "all", or "assistant".
    out: a folder, a URL (s3://, gs://, az://), or a `Store`.
    settings, changes: a `CaptureSettings`, and fields of it to replace: `capture(..., k=64, draws=0)`.
    shards: the numbers of the shards to capture, for a scheduler that keeps account of them: without claims, in this
        order, leaving out those that are there. It may be an iterator that waits for its next number; it is read on a
        thread, one ahead, and has to end soon after `stop()`. None: all shards, which workers share out by claims.
    rank, world_size: of this worker among all workers; None: from torchrun's or SLURM's variables, else 0 of 1.
    group: the processes that make up this worker (see `join_group`); None: this process.
    threads: for encoding and writing shards. stop: call `stop()` to stop early, from a signal handler for example.
    progress: "none", "bar", "lines", "events", or a function that is called with each event.
    notes: free text for the cache; two workers' may differ.

    Returns a report; its `complete` says whether the cache has every shard and is sealed. Raises DataError about the
    data, TeacherError about the teacher (NaN in its logits, for example), CacheError if `out` holds another cache or
    none that can be continued, and StoreError if a store failed (a full disk, for example): committed shards stay, and
    the same call continues.
    """
    session = CaptureSession(
        teacher,
        data,
        out,
        settings,
        fingerprint=fingerprint,
        vocab_size=vocab_size,
        column=column,
        text_documents=text_documents,
        tokenizer=tokenizer,
        loss_on=loss_on,
        rank=rank,
        world_size=world_size,
        group=group,
        threads=threads,
        progress=progress,
        notes=notes,
        **changes,
    )
    with session:
        return session.run(shards, stop=stop)
