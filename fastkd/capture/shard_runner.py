"""Capturing one shard: its targets and features, submitted to writers, and the account of what was written."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .. import __version__
from ..cache import CacheError, CacheWriter, Commit, FeatureWriter, open_cache
from ..cache.manifest import KEY as MANIFEST_KEY
from ..cache.manifest import listed, shard_key
from ..cache.stores import Store
from ..data.documents import Documents
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..teachers.tensor_parallel import ParallelGroup
from ..utils.numbers import duration
from ..utils.progress import Progress
from ..utils.signals import DONE, WORK_REMAINS
from ..utils.words import words_of
from .claims import Claims
from .feature_collect import Codes, stored_rows
from .features.prepare import Feature
from .rows import ShardRows
from .teacher_pass import TeacherPass, device_name
from .window_plan import WindowPlan


@dataclass(frozen=True)
class FeatureReport:
    """What a capture wrote of a feature: shards_written, positions_written (with a stored value) and bytes_written.
    step: of its codes."""

    step: float
    shards_written: int = 0
    positions_written: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class LostWork:
    """What a stop has cost: the shard that was open, whose positions are run again by the next call; how many of its
    positions the teacher had answered, and the seconds that took."""

    shard: int
    positions: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"stopped in shard {self.shard}: {self.positions:,} positions of it, {duration(self.seconds)} of work, are "
            "not kept, and will be run again"
        )


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did.

    complete: whether the cache has every shard, and is sealed. missing: the other shards, as ranges [first, last].
    plan: `WindowPlan.counts`. The rest is about this worker in this run: shards_written, positions_written and
    bytes_written of the targets, and features by name; positions_captured, including shards that another worker
    committed first; seconds; teacher_busy, the fraction of them in which the teacher ran; batches_halved, because they
    did not fit into memory; failed, shards that were left because the teacher did not answer, each with the reason;
    lost, what of an open shard was not kept when it was stopped, None if there was none.
    kind: of the data; see `fastkd.utils.words`.
    """

    cache: str
    complete: bool
    missing: list[list[int]]
    plan: dict[str, int]
    shards_written: int = 0
    positions_written: int = 0
    positions_captured: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    teacher_busy: float = 0.0
    batches_halved: int = 0
    features: dict[str, FeatureReport] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    kind: str = "text"
    lost: LostWork | None = None

    @property
    def status(self) -> int:
        """The exit status: 0 if the cache is complete, 75 if work remains."""
        return DONE if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; `lost` is there if something was."""
        found = {**asdict(self), "status": self.status}
        if self.lost is None:
            del found["lost"]
        return found


def missing_shards(store: Store, plan: WindowPlan, features: Iterable[Feature]) -> set[int]:
    """The shards of a plan that a cache lacks, of its targets or of one of these features."""
    there = set(range(plan.shards))
    for folder in ("", *(feature.spec.folder for feature in features)):
        there &= listed(store, folder).keys()
    return set(range(plan.shards)) - there


@dataclass(frozen=True)
class ShardTask:
    """A shard to capture: whether its targets are missing, and the names of the features that are."""

    index: int
    targets: bool
    features: tuple[str, ...]


class ShardRunner:
    """Captures shards of a cache whose spec and plan, and those of its features, are written.

    `_capture` runs the teacher and submits, `_collect` accounts for what the writers have finished. should_stop: called
    before each of the teacher's batches; see `TeacherPass`.
    """

    def __init__(
        self,
        teacher_pass: TeacherPass,
        data: Documents | Examples,
        plan: WindowPlan,
        store: Store,
        claims: Claims,
        features: Sequence[Feature],
        *,
        group: ParallelGroup | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._data, self._plan, self._store, self._claims = data, plan, store, claims
        self._features = {feature.name: feature for feature in features}
        self._group = group or ParallelGroup()
        self._words = words_of(EXAMPLE_COLUMNS if isinstance(data, Examples) else ())
        # replaced when the work begins
        self._progress = Progress(0, unit=self._words.position, shares=("teacher_busy",))
        self._pass = replace(teacher_pass, on_batch=self._on_batch, should_stop=should_stop)
        # by shard and by feature, "" for the targets
        self._submitted: dict[int, dict[str, Future[Commit]]] = {}
        self._writers: Mapping[str, CacheWriter | FeatureWriter] = {}
        self._there: dict[str, set[int]] = {}  # shards that were seen
        self._stored: dict[int, dict[str, int]] = {}  # positions of the submitted features
        self._busy = 0.0
        # of the shard that the teacher runs on: positions that it has answered, and when it began
        self._run_positions, self._run_begun = 0, 0.0
        reports = {name: FeatureReport(feature.spec.step) for name, feature in self._features.items()}
        counts = plan.counts(text=isinstance(data, Documents))
        self._report = CaptureReport(store.describe(), False, [], counts, features=reports, kind=self._words.kind)

    def _folder(self, name: str) -> str:
        """Where the objects of a feature are; of the targets, "" for both."""
        return self._features[name].spec.folder if name else ""

    def _committed_shards(self, name: str, *, listing: bool = True) -> set[int]:
        """The shards that the cache has, of a feature or of the targets. CacheError if none can be added.

        listing: without, only a sealed cache is listed, and of another one no shard is reported.
        """
        folder = self._folder(name)
        sealed = self._store.exists(f"{folder}{MANIFEST_KEY}")  # before the shards: another worker may be about to seal
        committed = set(listed(self._store, folder)) if sealed or listing else set()
        where = f"{self._store.describe()}{f', feature {name}' if name else ''}"
        if unknown := sorted(committed - set(range(self._plan.shards))):
            raise CacheError(
                f"{where}: got shard {unknown[0]}; expected only the {self._plan.shards} shards of "
                "the plan. It belongs to something else: write to another folder."
            )
        if sealed and len(committed) < self._plan.shards:
            raise CacheError(
                f"{where}: the {'feature' if name else 'cache'} is sealed, with {len(committed)} of "
                f"{self._plan.shards} shards. To write the others, delete {folder}{MANIFEST_KEY}: no "
                f"{'state' if name else 'target'} is lost, and it is written again at the end."
            )
        return committed

    def _seal(self) -> None:
        """Write the manifests that are not there, or are of fewer shards."""
        cache = open_cache(self._store)
        if not cache.sealed or len(cache.manifest) != self._plan.shards:
            self._writers[""].seal()
        for name in self._features:
            try:
                feature = cache.features[name]
            except KeyError as error:
                raise CacheError(f"{self._store.describe()}: feature {name} was dropped meanwhile.") from error
            if not feature.sealed or len(feature.shards) != self._plan.shards:
                self._writers[name].seal()

    def _run(self, shard: ShardTask, rows: ShardRows) -> tuple[dict[str, Any], dict[str, list[int]], dict[str, Codes]]:
        """Run the teacher on a shard: its targets, the parts of halved batches, and the codes of its features."""
        codes = {}
        self._run_positions, self._run_begun = 0, time.perf_counter()
        for name in shard.features:
            feature = self._features[name]
            mask = stored_rows(rows, feature.spec.positions, feature.spec.seed)
            codes[name] = Codes(feature.place, mask, feature.on_device, feature.spec.step)
        arrays, halved = self._pass.run(
            rows,
            self._plan.batches(shard.index),
            self._data,
            shard.index,
            targets=shard.targets,
            collectors=list(codes.values()),
        )
        return arrays, halved, codes

    def _lacking(self, index: int) -> list[str]:
        """The features whose part of a shard is not there; "" among them for the targets."""
        lacking = []
        for name, there in self._there.items():
            if index not in there:
                if self._store.exists(shard_key(index, self._folder(name))):
                    there.add(index)
                else:
                    lacking.append(name)
        return lacking

    def _submit(
        self,
        shard: ShardTask,
        rows: ShardRows,
        arrays: dict[str, Any],
        halved: dict[str, list[int]],
        codes: dict[str, Codes],
    ) -> None:
        """Give what was made of a shard to the writers."""
        record = {
            "fastkd": __version__,
            "torch": torch.__version__,
            "device": device_name(self._pass.teacher.device),
            "batch_tokens": self._plan.settings.batch_tokens,
            "halved": halved,
        }
        self._report = replace(
            self._report,
            positions_captured=self._report.positions_captured + len(rows),
            batches_halved=self._report.batches_halved + len(halved),
        )
        futures: dict[str, Future[Commit]] = {}
        self._submitted[shard.index] = futures
        self._stored[shard.index] = {name: int(code.mask.sum()) for name, code in codes.items()}
        if shard.targets:
            futures[""] = self._writers[""].submit_shard(
                shard.index,
                rows.inputs,
                **arrays,
                sequence_lengths=rows.sequence_lengths,
                document_lengths=rows.document_lengths,
                first_sequence=rows.first_sequence,
                record=record,
            )
        for name, code in codes.items():
            futures[name] = self._writers[name].submit_shard(
                shard.index, code.arrays(), code.vectors, record, after=futures.get("")
            )

    def _collect(self, *, wait: bool) -> None:
        """Account for the shards that the writers have finished, or wait for all; raises what a writer raised."""
        for index, futures in list(self._submitted.items()):
            if not (wait or all(future.done() for future in futures.values())):
                continue
            commits = {name: future.result() for name, future in futures.items()}
            del self._submitted[index]
            stored = self._stored.pop(index)
            self._claims.done(str(index))
            sizes = {name: self._writers[name].sizes[index] for name, c in commits.items() if c is Commit.COMMITTED}
            self._account_features(sizes, stored)
            if "" in sizes:
                self._account(index, sizes)
            elif sizes and "" not in commits:
                self._progress.event("shard", shard=index, positions=self._positions(index), features=sizes)
            else:
                text = f"shard {index}: another worker committed it first"
                self._progress.event("there", shard=index, positions=self._positions(index), captured=True, text=text)

    def _account(self, index: int, sizes: dict[str, int]) -> None:
        """Account for a shard whose targets this worker has committed. sizes: in bytes, by feature."""
        size = sizes.pop("")
        self._report = replace(
            self._report,
            shards_written=self._report.shards_written + 1,
            positions_written=self._report.positions_written + self._positions(index),
            bytes_written=self._report.bytes_written + size,
        )
        each = size / self._positions(index)
        self._progress.figure("bytes_per_position", each, f"{each:.1f} B each")
        features = {"features": sizes} if sizes else {}
        self._progress.event("shard", shard=index, positions=self._positions(index), bytes=size, **features)

    def _account_features(self, sizes: Mapping[str, int], stored: Mapping[str, int]) -> None:
        """Account for the features of a shard that this worker has committed. stored: positions, by feature."""
        reports = dict(self._report.features)
        for name, size in sizes.items():
            if name:
                before = reports[name]
                reports[name] = replace(
                    before,
                    shards_written=before.shards_written + 1,
                    positions_written=before.positions_written + stored[name],
                    bytes_written=before.bytes_written + size,
                )
        self._report = replace(self._report, features=reports)

    def _on_batch(self, positions: int, seconds: float) -> None:
        self._busy += seconds
        self._run_positions += positions
        for name, (value, text) in getattr(self._pass.teacher, "figures", dict[str, tuple[float, str]])().items():
            self._progress.figure(name, value, text)
        self._progress.add(positions, teacher_busy=seconds)
        if self._group.leader:
            self._claims.keep()

    def _positions(self, index: int) -> int:
        return int(self._plan.shard_rows[index + 1] - self._plan.shard_rows[index])
