"""`fastkd.capture`: from a teacher and a dataset to a cache."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache import CacheError, create_cache
from ..cache.stores import open_store
from ..data.documents import Documents, open_documents
from ..data.examples import Examples
from ..errors import TeacherError
from ..progress import MODES, Lenient
from ..settings import CaptureSettings
from .claims import Claims
from .job import CaptureReport, Group, Job, Stop
from .modules import ModuleTeacher
from .pipeline import Ask, Runner
from .prepare import keep_plan, prepare
from .protocol import Teacher

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

    teacher: a `Teacher`; or a `nn.Module` or callable that maps token ids `[B, L]` (or examples) to logits, with
        fingerprint (a callable's identity; a module's weights are hashed) and vocab_size (found out where None).
    data: `Documents` (`open_documents`), `Examples`, or what `open_documents` takes, of token ids, with column.
    out: a folder, a URL (s3://, gs://, az://), or a `Store`.
    settings, changes: a `CaptureSettings`, and fields of it that differ: `capture(..., k=64, draws=0)`.
    rank, world_size: which of how many workers this is; None: torchrun's or SLURM's variables, else 0 of 1.
    group: the processes that make up this worker (`teacher/parallel.py`); None: this one.
    threads: on which shards are encoded and written. stop: ask for a stop with `stop()`, from a signal's handler, say.
    progress: "none", "bar", "lines" or "events". notes: free text for the cache, no part of what must be equal.

    Returns what was done; `complete` says whether anything is left. Raises DataError for the data, TeacherError for the
    teacher (NaN in its logits, say), CacheError where the cache is another's, and StoreError where a store failed
    (a full disk, say): what was committed stays, and the same call goes on from there.
    """
    if unknown := sorted(set(changes) - {f.name for f in fields(CaptureSettings)}):
        raise TypeError(f"capture() got unexpected settings: {', '.join(unknown)}")
    if progress not in MODES:
        raise ValueError(f"progress: found {progress!r}; one of {', '.join(MODES)} is needed.")
    settings = replace(settings, **changes)
    rank, world_size = place(rank, world_size)
    model = as_teacher(teacher, data, fingerprint=fingerprint, vocab_size=vocab_size)
    if not isinstance(data, (Documents, Examples)):
        data = open_documents(data, column=column, vocab_size=model.vocab_size)
    store = open_store(out, create=True)
    claims = Claims(store, rank, world_size)
    prepared = prepare(
        model, data, settings, store, claims, progress=progress == "bar", say=_teller(progress), notes=notes
    )
    ask = Ask(
        k=settings.k,
        draws=settings.draws,
        draw_temperature=settings.draw_temperature,
        mass=settings.mass,
        temperatures=settings.temperatures,
        seed=settings.seed,
    )
    job = Job(
        Runner(model, ask),
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


def as_teacher(teacher: Any, data: Any, *, fingerprint: str = "", vocab_size: int | None = None) -> Teacher:
    """A `Teacher` as it is; a module or a callable as a `ModuleTeacher`."""
    if all(hasattr(teacher, name) for name in ("vocab_size", "fingerprint", "device", "max_positions")):
        return teacher  # type: ignore[no-any-return]
    if isinstance(teacher, (str, Path)):
        raise TeacherError(f"teacher: found {str(teacher)!r}; load it first.")
    probe = torch.zeros((1, 1), dtype=torch.int64)
    if isinstance(data, Examples):
        first = np.zeros(1, np.int64)
        probe = data.read(first, data.seeds(first, first))
    return ModuleTeacher(teacher, vocab_size=vocab_size, probe=probe, fingerprint=fingerprint)


def place(
    rank: int | None = None, world_size: int | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """Which of how many workers this is: as said, else by torchrun's variables, else SLURM's, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise CacheError(f"rank, world_size: found {rank} and {world_size}; both are needed, or neither.")
    if rank is None or world_size is None:
        rank, world_size = 0, 1
        for mine, all_of in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if mine in environment and all_of in environment:
                rank, world_size = int(environment[mine]), int(environment[all_of])
                break
    if not 0 <= rank < world_size:
        raise CacheError(f"rank: found {rank} of a world_size of {world_size}; 0 to {world_size - 1} is needed.")
    return rank, world_size


def _teller(progress: str) -> Callable[[str], None]:
    """What says a line to a person, where one reads."""
    stream: Any = Lenient(sys.stderr)
    if progress in ("bar", "lines"):
        return lambda text: print(text, file=stream, flush=True)
    return lambda text: None
