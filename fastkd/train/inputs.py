"""What a student is trained on: `Inputs`, and its kinds that read caches, or a source from outside.

A kind says which source of batches a training reads, what the student is evaluated on, and what run.json says of it.
`live_inputs.py` has the kind that runs a teacher beside the student.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cache.capture_plan import CapturePlan
from ..cache.reader import Cache
from ..cache.spec import CacheSpec
from ..data.examples import Examples, as_examples
from ..errors import StreamError, TrainError
from ..live.rounds import rounds_in
from ..settings import TrainSettings
from ..stream.batch import BatchSource
from ..stream.buckets import BUCKETS, up_to
from ..stream.cached import CachedSource
from ..stream.split import ShardTable, check_data, has_held_out, open_sources, open_split, plan_of
from ..utils.distributed import ALONE, Processes
from ..utils.words import words_of
from .batch import DEFAULT, STEPS, Size
from .held_out import HeldOut
from .matched import matched_objective, signals_of
from .objective import Objective
from .outline import HeldOutSize
from .result import describe_cache
from .student import LoadedStudent

if TYPE_CHECKING:
    from ..evaluate.api import Evaluation
    from .student import Student


class Finished(NamedTuple):
    """What was done after the last step. text: for the user, or "". complete: whether no stop left some of it."""

    text: str = ""
    complete: bool = True


class Inputs:
    """What a student is trained on.

    caches: what is read, if that is caches; weights: their shares of the positions, or [1.0]. data: labelled examples;
    the student is then a module that maps them to logits. live: whether targets are made during the training.
    buckets: lengths that micro-batches are padded to, of a student that is compiled.
    """

    caches: Sequence[Cache] = ()
    weights: Sequence[float] = (1.0,)
    data: Examples | None = None
    live: bool = False
    buckets: tuple[int, ...] | None = None

    @property
    def spec(self) -> CacheSpec | None:
        """What the student has to fit: the spec of the (first) cache, or of that which a capture would write; None if
        it is not known."""
        return None

    @property
    def control(self) -> "Inputs":
        """What a control of the student is trained on."""
        return self

    def meet(self, made: LoadedStudent, settings: TrainSettings, objective: Objective | None) -> None:
        """The student of a training is made: check that it fits, and prepare what depends on it.

        objective: None for the `TokenKD` of the settings. Called for each arm. Raises TrainError.
        """
        self.buckets = up_to(BUCKETS, made.student.max_positions) if settings.compile else None

    def matched(self, settings: TrainSettings, student: "Student", objective: Objective | None) -> Objective | None:
        """The objective of a training with `settings.match`; without it, the one that is given. Raises TrainError."""
        if not settings.match:
            return objective
        return matched_objective(settings, self.caches, student, objective=objective, data=self.data)

    def open(
        self, settings: TrainSettings, processes: Processes = ALONE, objective: Objective | None = None
    ) -> BatchSource:
        """The source of a training, before the first step of the first epoch, with the signals that its objective
        reads. Raises StreamError and CacheError."""
        raise NotImplementedError

    def evaluator(self, settings: TrainSettings, processes: Processes = ALONE) -> HeldOut | None:
        """The default evaluation; None without a held-out split, and if the settings want none. Raises TrainError if
        they want one and there is no held-out split, and StreamError if it cannot be read."""
        if settings.evaluate_every == 0:
            return None
        if not (problem := self.nothing_held_out()):
            return self.held_out(settings, processes)
        if settings.evaluate_every is None:
            return None
        raise TrainError(f"evaluate_every: got {settings.evaluate_every}, and {problem}")

    def nothing_held_out(self) -> str:
        """Why there is no held-out split, as the end of a sentence; "" if there is one."""
        raise NotImplementedError

    def held_out(self, settings: TrainSettings, processes: Processes) -> HeldOut:
        """The evaluation on the held-out split, which there is."""
        raise NotImplementedError

    def held_out_size(self, settings: TrainSettings) -> HeldOutSize | None:
        """What `held_out` reads; None without a held-out split."""
        return None

    def size(self, settings: TrainSettings) -> Size | None:
        """What an epoch of a training reads; None for a source from outside, and for data that are not planned yet."""
        return None

    def describe(self) -> Mapping[str, Any] | None:
        """For run.json: {"caches": [...]} and what else there is; None: the source's fingerprint."""
        return None

    def finish(self, processes: Processes) -> Finished:
        """All steps of the training, and of its arms, are made. All processes call it."""
        return Finished()

    def close(self) -> None:
        """End what the inputs hold open."""


class CacheInputs(Inputs):
    """A cache, or a mixture [(cache, weight), ...]; see `open_sources`. A folder RUN/rollouts is the mixture of its
    rounds. data: for caches of examples."""

    def __init__(self, cache: Any, data: Any = None) -> None:
        caches, weights = open_sources(rounds_in(cache) or cache)
        check_data(caches, data)
        self.caches, self.weights, self.data = caches, [float(weight) for weight in weights], data

    @property
    def spec(self) -> CacheSpec:
        return self.caches[0].spec

    def open(
        self, settings: TrainSettings, processes: Processes = ALONE, objective: Objective | None = None
    ) -> BatchSource:
        mixture = list(zip(self.caches, self.weights, strict=True))
        signals = {} if objective is None else signals_of(objective)
        cache = self.caches[0] if len(mixture) == 1 else mixture
        features = signals.get("features", ())
        return make_source(cache, settings, processes, self.data, features=features, buckets=self.buckets)

    def nothing_held_out(self) -> str:
        without = [cache for cache in self.caches if not has_held_out(cache)]
        if not without:
            return ""
        return f"no {words_of(without[0].spec.inputs).documents} of {without[0]!r} were held out."

    def held_out(self, settings: TrainSettings, processes: Processes) -> HeldOut:
        tables = [
            open_split(
                cache,
                "held_out",
                max_positions=settings.evaluate_positions,
                allow_partial=settings.allow_partial,
                limit="evaluate_positions",
            )
            for cache in self.caches
        ]
        measures = [
            partial(self._evaluate, cache=cache, settings=settings, processes=processes) for cache in self.caches
        ]
        sequences = sum(int(table.sequences.sum()) for table in tables)
        positions = sum(int(table.positions.sum()) for table in tables)
        return HeldOut(measures, self.weights, sequences=sequences, positions=positions)

    def held_out_size(self, settings: TrainSettings) -> HeldOutSize | None:
        if self.nothing_held_out():
            return None
        sizes = []
        for cache in self.caches:
            table = open_split(
                cache, "held_out", max_positions=settings.evaluate_positions, allow_partial=settings.allow_partial
            )
            sizes.append(size_of(table, plan_of(cache), self.data))
        known = [one.documents for one in sizes]
        return HeldOutSize(
            sum(one.windows for one in sizes),
            sum(one.positions for one in sizes),
            None if None in known else sum(one or 0 for one in known),
            sizes[0].unit,
        )

    def _tables(self, settings: TrainSettings) -> list[ShardTable]:
        """What is read of each cache in an epoch."""
        skip, most, partial_ = settings.skip, settings.max_positions, settings.allow_partial
        if len(self.caches) > 1:
            skip, most = 0, None
        return [open_split(c, "train", skip=skip, max_positions=most, allow_partial=partial_) for c in self.caches]

    def identity(self, settings: TrainSettings) -> Mapping[str, Any]:
        """What is known of the fingerprint of the source before it is opened."""
        return {"caches": [table.describe() for table in self._tables(settings)]}

    def size(self, settings: TrainSettings) -> Size:
        tables = self._tables(settings)
        plans = [plan_of(cache) for cache in self.caches]
        sizes = [train_size(table, plan, self.data) for table, plan in zip(tables, plans, strict=True)]
        positions, sequences, longest, copies = zip(*sizes, strict=True)
        return Size(sum(positions), sum(sequences), max(longest), max(copies))

    def _evaluate(
        self, student: "Student", *, cache: Cache, settings: TrainSettings, processes: Processes
    ) -> "Evaluation":
        from ..evaluate.api import evaluate

        return evaluate(
            student,
            cache,
            data=self.data,
            batch_tokens=settings.micro_tokens,
            max_positions=settings.evaluate_positions,
            allow_partial=settings.allow_partial,
            processes=processes,
            buckets=self.buckets,
        )

    def describe(self) -> Mapping[str, Any]:
        found = [describe_cache(cache) for cache in self.caches]
        if len(found) > 1:  # of a mixture
            total = sum(self.weights)
            found = [one | {"share": weight / total} for one, weight in zip(found, self.weights, strict=True)]
        return {"caches": found}


class SourceInputs(Inputs):
    """A `BatchSource` from outside."""

    def __init__(self, source: BatchSource, data: Examples | None = None) -> None:
        self.data, self._source = data, source

    def identity(self, settings: TrainSettings) -> Mapping[str, Any]:
        return dict(self._source.fingerprint)

    def open(
        self, settings: TrainSettings, processes: Processes = ALONE, objective: Objective | None = None
    ) -> BatchSource:
        self._source.seek(0, 0)
        return self._source

    def nothing_held_out(self) -> str:
        return "a batch source has no held-out split. Pass evaluate."

    def describe(self) -> None:
        return None


def size_of(table: ShardTable, plan: CapturePlan | None, data: Examples | None) -> HeldOutSize:
    """What a table of the held-out split reads. plan: of all shards."""
    windows, positions = int(table.sequences.sum()), int(table.positions.sum())
    documents = None if plan is None else plan.totals.get("held_out")
    if data is not None:
        return HeldOutSize(windows, positions, windows, "example")
    whole = plan is not None and len(table.shard) == plan.shards - plan.train_shards and not table.first.any()
    if whole:
        last = int(table.shard[-1])
        whole = int(table.sequences[-1]) == len(table.origin.sequence_lengths(last))
    return HeldOutSize(windows, positions, documents if whole else None)


def train_size(table: ShardTable, plan: CapturePlan | None, data: Examples | None) -> Size:
    """What an epoch of a table reads. plan: of all shards, if there is one."""
    positions, sequences = int(table.positions.sum()), int(table.sequences.sum())
    if data is not None:
        return Size(positions, sequences, data.copies, data.copies)
    context = None if plan is None else plan.settings.get("context")
    if isinstance(context, int) and plan is not None and plan.settings.get("packing") == "pack":
        longest = min(context, positions)
    elif positions >= STEPS * DEFAULT:  # the default serves, and lengths are not read for nothing
        longest = 0
    else:
        longest = max(int(table.lengths(row).max()) for row in range(len(table.shard)))
    return Size(positions, sequences, longest)


def inputs_of(cache: Any, data: Any = None) -> CacheInputs | SourceInputs:
    """The inputs for an argument `cache` of `train`. data: see `as_examples`. Raises StreamError and CacheError."""
    data = as_examples(data)
    if isinstance(cache, BatchSource):
        return SourceInputs(cache, data)
    if hasattr(cache, "steps") or isinstance(cache, type):
        members = ("fingerprint", "__len__", "steps", "state_dict", "load_state_dict", "seek", "close")
        missing = ", ".join(name for name in members if not hasattr(cache, name))
        what = f"the class {cache.__name__}" if isinstance(cache, type) else type(cache).__name__
        raise StreamError(
            f"cache: got {what}{f' without {missing}' if missing else ''}; expected a cache, or an object with the "
            "members of fastkd.stream.BatchSource."
        )
    return CacheInputs(cache, data)


_NAMES = ("batch_size", "micro_tokens", "layout", "seed", "shards_open", "skip", "max_positions", "threads")


def source_options(settings: TrainSettings, processes: Processes) -> dict[str, Any]:
    """The arguments that a training with these settings gives any source of shards; see `SourceOptions`."""
    return {
        **{name: getattr(settings, name) for name in _NAMES},
        "batch_tokens": (settings.batch_tokens or DEFAULT) if settings.batch_size is None else None,
        "rank": processes.rank,
        "world_size": processes.world_size,
        "reduce": processes.reduce,
        "device": processes.device,
    }


def make_source(
    cache: Any,
    settings: TrainSettings,
    processes: Processes = ALONE,
    data: Examples | None = None,
    *,
    features: Sequence[str] = (),
    buckets: Any = None,
) -> CachedSource:
    """The source that a training with these settings reads. features: names. Raises StreamError and CacheError."""
    options = source_options(settings, processes) | {"buckets": buckets}
    return CachedSource(cache, **options, allow_partial=settings.allow_partial, data=data, features=features)
