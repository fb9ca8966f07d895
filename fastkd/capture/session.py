"""A cache that is open for capture: its teacher, data, window plan and writers, for one or several runs."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from ..cache.stores import open_store
from ..data.documents import Documents, describe_documents
from ..data.examples import EXAMPLE_COLUMNS, Examples, as_examples
from ..data.sources import open_source
from ..kernels import prepare_topk
from ..settings import CaptureSettings, DataSettings, ModelSettings
from ..settings_changes import CaptureChanges, changed
from ..teachers.load import as_data, as_teacher, named_tokenizer
from ..teachers.tensor_parallel import ParallelGroup, rank_and_world_size
from ..utils.output_guard import check_store
from ..utils.progress import MODES, Mode, is_shown, notes_only
from ..utils.signals import Stop
from ..utils.words import words_of
from .answers import check_limits, large_k_text
from .begin import begin_cache
from .claims import Claims
from .existing import check_continues, store_there
from .feature_places import find_places
from .features.prepare import check_existing, check_sizes
from .prepare import prepare
from .probe import agree_on_probe
from .runner import CaptureRunner
from .shard_runner import CaptureReport, missing_shards
from .teacher_pass import TeacherPass
from .window_plan import check_settings, plan_text

DEFAULTS = CaptureSettings()


class CaptureSession(AbstractContextManager["CaptureSession"]):
    """A cache that is begun, or continued, and can be written to. Use as a context manager.

    The arguments are those of `capture`, which is one `run` of a session; a worker that gets its shards in several
    parts loads its teacher, and measures its data, once. Raises what `capture` raises before its first shard.
    """

    def __init__(
        self,
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
        progress: Mode = "none",
        notes: str = "",
        **changes: Unpack[CaptureChanges],
    ) -> None:
        settings = changed("capture", settings, changes)
        if not callable(progress) and progress not in MODES:
            raise ValueError(f"progress: got {progress!r}; expected one of {', '.join(MODES)}.")
        self._rank, self._world_size = rank_and_world_size(rank, world_size)
        # before the teacher, which may have to be loaded
        check_settings(settings, threads=threads)
        there = store_there(out)
        data = as_examples(data)
        if not isinstance(data, (Documents, Examples)):
            data = open_source(data, column, text_documents)
        tokenizer = named_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer
        if there is not None and isinstance(teacher, (str, Path)):
            how: dict[str, Any] = {"loss_on": loss_on, "tokenizer": tokenizer}
            reading = DataSettings(data=(), **how)
            check_continues(there, settings, data, teacher=teacher, model=ModelSettings(), data=reading)
        check = partial(check_limits, settings=settings, out=out)
        model = as_teacher(teacher, data, fingerprint=fingerprint, vocab_size=vocab_size, check=check)
        check(model)
        data = as_data(data, model, column=column, text_documents=text_documents, tokenizer=tokenizer, loss_on=loss_on)
        places = find_places(model, data, settings.features)
        store = open_store(out, create=True)
        if there is None:  # otherwise it was checked above, and a listing is a request
            check_store(store)
        claims = Claims(store, self._rank, self._world_size)
        words = words_of(EXAMPLE_COLUMNS if isinstance(data, Examples) else ())
        mode = progress if group is None or group.leader else "none"
        reporter = notes_only(mode, words.position)

        def tell(text: str) -> None:
            reporter.event("note", text=text)

        self._tell = tell
        for note in getattr(model, "notes", []):
            tell(f"teacher: {note}")
        for line in large_k_text(settings.k, settings.draws, model.vocab_size):
            tell(line)
        agree_on_probe(model, store)
        plan, spec = prepare(model, data, settings, store, claims, progress=is_shown(progress), say=tell, notes=notes)
        check_sizes(places, plan)
        check_existing(store, spec, places, settings)
        if isinstance(data, Documents):
            for line in describe_documents(data, plan.lengths):
                tell(line)
        counts = plan.counts(text=isinstance(data, Documents))
        text = plan_text(counts, plan.settings.context, plan.settings.on_long, words)
        reporter.event("plan", text=text, **counts)
        if line := prepare_topk(model.device):
            tell(line)
        self._group, self._progress = group or ParallelGroup(), progress
        self._data, self._store, self._claims, self.plan = data, store, claims, plan
        self._pass = TeacherPass(model, settings)
        with ExitStack() as stack:
            self._begun = begin_cache(
                self._pass, data, plan, spec, places, store, claims, stack, group=self._group, threads=threads, say=tell
            )
            self._stack = stack.pop_all()

    def missing(self) -> list[int]:
        """The shards that the cache lacks, of its targets or of the features of these settings."""
        return sorted(missing_shards(self._store, self.plan, self._begun.features))

    def run(self, shards: Iterable[int] | None = None, *, stop: Stop | None = None) -> CaptureReport:
        """Capture these shards, or all, and seal the cache if it then has every shard. See `capture`."""
        runner = CaptureRunner(
            self._pass,
            self._data,
            self.plan,
            self._store,
            self._claims,
            features=self._begun.features,
            shards=shards,
            rank=self._rank,
            world_size=self._world_size,
            group=self._group,
            stop=stop,
            progress_mode=self._progress,
        )
        report = runner.run(self._begun.targets, self._begun.writers)
        if (summary := getattr(self._pass.teacher, "summary", None)) is not None:
            self._tell(summary())
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
