"""`fastkd.mix_targets`: a cache whose targets are the mean of several teachers' targets on the same rows."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..cache import Cache, CacheError, CacheSpec, CacheWriter, Commit, NotFound, create_cache, open_cache
from ..cache.capture_plan import PLAN_KEY, read_capture_plan
from ..cache.manifest import gaps, listed, runs
from ..cache.stores import Store, open_store
from ..data.lengths import LENGTHS_KEY
from ..utils.numbers import duration, size_text
from ..utils.output_guard import check_store
from ..utils.progress import Progress
from ..utils.signals import DONE, WORK_REMAINS, Stop
from ..utils.splitmix import mixed
from ..utils.text import are_missing, printable
from .mix import mix_rows

Array = NDArray[Any]
_BLOCK = 4096  # rows that are mixed at a time
_MOST = 2**16 - 1  # entries of a row, in a spec
_DRAWS = np.uint64(0x6D69785F64726177)  # a stream of random numbers of its own, apart from the capture's
_TARGETS = ("ids", "logprobs", "tail", "outcomes", "draws")
_SAME = {
    "vocab_size": "vocabularies", "inputs": "input columns", "temperatures": "temperatures",
    "draw_temperature": "temperatures of the draws",
}  # fmt: skip


@dataclass(frozen=True)
class MixReport:
    """What `mix_targets` did.

    complete: whether the cache has every shard, and is sealed. parents: the spec hashes of the caches, and weights:
    their weights, which sum to 1. k, draws: of the new cache. In this call: shards_written, positions_written,
    bytes_written and seconds.
    """

    cache: str
    complete: bool
    missing: list[list[int]]
    parents: list[str]
    weights: list[float]
    k: int
    draws: int
    shards: int
    positions: int
    shards_written: int = 0
    positions_written: int = 0
    bytes_written: int = 0
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status: 0 if the cache is complete, 75 if work remains."""
        return DONE if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status}


def mix_targets(
    caches: Sequence[Any],
    out: Any,
    *,
    weights: Sequence[float] | None = None,
    k: int | None = None,
    draws: int | None = None,
    threads: int = 1,
    stop: Stop | None = None,
    progress: str = "none",
) -> MixReport:
    """Write a cache whose targets are the mean of several caches' targets, row by row. Calling it again continues it.

    caches: two or more, `Cache`s or what `open_cache` takes, complete, of the same rows: one capture plan, data set and
        vocabulary. Their k, mass and codec may differ. out: a folder, a URL or a `Store`.
    weights: one of each cache, positive; None: all equal.
    k: the most top-k entries of a row; None: the union of all, which is at most the sum of their k.
    draws: of a row; None: as many as the cache with the most, if every cache has draws or the whole vocabulary, and
        otherwise none. 0 leaves less noise in the top-k entries, for the treatment `bucket` or high temperatures.
    threads: that encode and write shards. stop: ends it after the current shard.

    What is exact, and what is estimated, is in `fastkd.capture.mix`. The codec of the new cache is that of the first,
    and its spec names the hashes of the others' specs, and the weights.

    Raises CacheError for caches that cannot be mixed, naming the difference, before anything is written, and for rows
    whose inputs differ; StoreError if a store failed: committed shards stay, and the same call continues.
    """
    begun, stop = time.perf_counter(), stop or Stop()
    opened = [cache if isinstance(cache, Cache) else open_cache(cache) for cache in caches]
    shares = _shares(opened, weights)
    spec = mixed_spec(opened, shares, k, draws)
    shards = _shards(opened)
    store = open_store(out, create=True)
    check_store(store)
    report = MixReport(
        store.describe(), False, [], [cache.spec.hash for cache in opened], shares, spec.k, spec.draws, len(shards),
        sum(shards.values()),
    )  # fmt: skip
    with create_cache(store, spec, threads=threads, queue=1) as writer:
        _copy_plan(opened[0], store)
        there = listed(store)
        done = sum(size for index, size in shards.items() if index in there)
        stop.gentle = True
        try:
            with Progress(report.positions, unit="position", already=done, mode=progress) as bar:
                pending = []
                for index, size in shards.items():
                    if index in there:
                        continue
                    if stop.asked:
                        break
                    pending.append((index, size, _mix_shard(opened, shares, spec, index, writer)))
                    bar.add(size)
                for index, size, future in pending:
                    if future.result() is Commit.COMMITTED:
                        report = replace(
                            report, shards_written=report.shards_written + 1,
                            positions_written=report.positions_written + size,
                            bytes_written=report.bytes_written + writer.sizes[index],
                        )  # fmt: skip
        finally:
            stop.gentle = False
        missing = sorted(shards.keys() - listed(store).keys())
        if not missing and not open_cache(store).sealed:
            writer.seal()
    seconds = time.perf_counter() - begun
    return replace(report, complete=not missing, missing=runs(missing), seconds=seconds)


def mixed_spec(
    caches: Sequence[Cache], shares: Sequence[float], k: int | None = None, draws: int | None = None
) -> CacheSpec:
    """The spec of the mean of caches. CacheError, naming the difference, if they are not of the same rows."""
    first = caches[0]
    for cache in caches[1:]:
        if different := _differences(first, cache):
            raise CacheError(
                f"caches: {first!r} and {cache!r} cannot be mixed: they have other {'; '.join(different)}."
            )
    specs = [cache.spec for cache in caches]
    union = min(sum(min(spec.k, spec.vocab_size) for spec in specs), first.spec.vocab_size, _MOST)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise CacheError(f"k: got {k!r}; expected an integer from 1 on, or None for the union of all entries.")
    drawn = all(spec.draws or spec.k >= spec.vocab_size for spec in specs)
    most = max(spec.draws for spec in specs) if drawn else 0
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or not 0 <= draws <= most):
        why = "" if most else ", as not every cache has draws or the whole vocabulary"
        raise CacheError(f"draws: got {draws!r}; expected an integer from 0 to {most}{why}.")
    teachers = ", ".join(f"spec {spec.hash} weight {share!r}" for spec, share in zip(specs, shares, strict=True))
    return replace(
        first.spec,
        k=union if k is None else min(k, union),
        draws=most if draws is None else draws,
        mass=None,
        notes="",
        teacher=f"mean of {len(caches)} caches, {teachers}",
    )


def _differences(one: Cache, other: Cache) -> list[str]:
    """Why the rows of two caches are not the same, or their targets cannot be added, as texts."""
    ours, theirs = one.spec, other.spec
    found = [
        f"{what} ({getattr(ours, name)!r} and {getattr(theirs, name)!r})"
        for name, what in _SAME.items()
        if getattr(ours, name) != getattr(theirs, name)
    ]
    a, b = ours.provenance, theirs.provenance
    # what decides the rows is in the hash of the data; what decides which of them count is not
    found += [f"tokenizers ({ours.tokenizer!r} and {theirs.tokenizer!r})"] * (a.tokens != b.tokens)
    found += [f"loss_on ({a.loss_on!r} and {b.loss_on!r})"] * (a.loss_on != b.loss_on)
    if (a.dataset_sha256, b.dataset_sha256) == (None, None):
        return found + [f"data ({ours.dataset!r} and {theirs.dataset!r})"] * (ours.dataset != theirs.dataset)
    if a.dataset_sha256 != b.dataset_sha256:
        return [*found, f"data (sha256 {_short(a.dataset_sha256)} and {_short(b.dataset_sha256)})"]
    if (a.plan_sha256, a.draw_seed) == (b.plan_sha256, b.draw_seed):
        return found
    plans = [read_capture_plan(cache.store, cache.spec) for cache in (one, other)]
    settings = [{} if plan is None else {**plan.settings, "version": plan.version} for plan in plans]
    names = sorted(settings[0].keys() | settings[1].keys())
    texts = [f"{n}: {settings[0].get(n)!r} and {settings[1].get(n)!r}" for n in names
             if settings[0].get(n) != settings[1].get(n)]  # fmt: skip
    return [*found, f"window plans ({'; '.join(texts) or 'of the same settings'}; capture both with the same)"]


def _short(digits: str | None) -> str:
    return "unknown" if digits is None else f"{digits[:12]}…"


def _shares(caches: Sequence[Cache], weights: Sequence[float] | None) -> list[float]:
    """The weights, so that they sum to 1."""
    if len(caches) < 2:
        raise CacheError(f"caches: got {len(caches)}; expected at least two, to take the mean of their targets.")
    given = [1.0] * len(caches) if weights is None or not len(weights) else [float(weight) for weight in weights]
    if len(given) != len(caches) or not all(0 < weight < math.inf for weight in given):
        raise CacheError(f"weights: got {given}; expected {len(caches)} positive numbers, one for each cache.")
    return [weight / sum(given) for weight in given]


def _shards(caches: Sequence[Cache]) -> dict[int, int]:
    """Positions of the shards, by number. CacheError unless all caches have all of them."""
    first = caches[0]
    for cache in caches:
        plan = read_capture_plan(cache.store, cache.spec)
        there = list(cache.shards)
        missing = gaps(np.asarray(there), end=0 if plan is None else plan.shards)
        if missing or not there or there != list(first.shards):
            why = are_missing(missing) if missing else f"it has {len(there)} shards"
            raise CacheError(
                f"caches: {cache!r}: {why}; expected all {max(len(first.shards), 0 if plan is None else plan.shards)} "
                "of the plan. Run its capture again, which writes only what is missing."
            )
    rows = first.manifest.select(["shard", "positions"]).to_pydict()
    return dict(zip(rows["shard"], rows["positions"], strict=True))


def _copy_plan(cache: Cache, store: Store) -> None:
    """Copy what defines the held-out split."""
    for key in (PLAN_KEY, LENGTHS_KEY):
        try:
            store.create(key, cache.store.get(key))
        except NotFound:
            continue


def _mix_shard(
    caches: Sequence[Cache], shares: Sequence[float], spec: CacheSpec, index: int, writer: CacheWriter
) -> Any:
    """Submit a shard. CacheError if its rows are not the same in all caches."""
    parts = [cache.read_shard(index) for cache in caches]
    first, n = parts[0], len(parts[0]["ids"])
    for cache, part in zip(caches[1:], parts[1:], strict=True):
        for name in (*spec.inputs, "sequence_lengths", "first_sequence"):
            if not np.array_equal(part[name], first[name]):
                raise CacheError(
                    f"caches: shard {index}: its {name} differ between {caches[0]!r} and {cache!r}; expected caches "
                    "of the same data and window plan."
                )
        counted = [(p["logprobs"] > -np.inf).any(1) for p in (first, part)]
        if (counted[0] != counted[1]).any():
            row = int((counted[0] != counted[1]).argmax())
            raise CacheError(
                f"caches: shard {index}, row {row}: it has a target in only one of {caches[0]!r} and {cache!r}; "
                "expected captures with the same loss_on."
            )
    uniform = _uniform(first, spec.provenance.draw_seed or 0)
    blocks = []
    for start in range(0, n, _BLOCK):
        rows = slice(start, start + _BLOCK)
        blocks.append(
            mix_rows(
                [{name: part[name][rows] for name in _TARGETS if name in part} for part in parts],
                shares, vocab_size=spec.vocab_size, temperatures=spec.temperatures,
                draw_temperature=spec.draw_temperature, k=spec.k, draws=spec.draws, uniform_N=uniform[rows],
            )
        )  # fmt: skip
    contents = [cache.content(index)[0] for cache in caches]
    return writer.submit_shard(
        index,
        {name: first[name] for name in spec.inputs},
        **_joined(blocks),
        sequence_lengths=first["sequence_lengths"],
        document_lengths=first.get("document_lengths"),
        first_sequence=int(first["first_sequence"]),
        record={"fastkd": __version__, "parents": contents},
    )


def _uniform(arrays: Mapping[str, Array], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each row, by the seed, the number of its sequence, and its offset in it."""
    lengths = arrays["sequence_lengths"].astype(np.int64)
    sequence = np.repeat(np.arange(len(lengths)) + int(arrays["first_sequence"]), lengths)
    offset = np.arange(len(sequence)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    with np.errstate(over="ignore"):
        key = mixed(np.array([seed % 2**64], np.uint64) ^ _DRAWS)
        bits = mixed(mixed(key + sequence.astype(np.uint64)) + offset.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _joined(blocks: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Rows of several blocks, the narrower filled up."""
    width = max(block["ids"].shape[1] for block in blocks)

    def filled(name: str, array: Array) -> Array:
        if name not in ("ids", "logprobs", "draws"):
            return array
        room = ((0, 0), (0, width - array.shape[1]))
        return np.pad(array, room, constant_values=-np.inf if name == "logprobs" else 0)

    return {name: np.concatenate([filled(name, block[name]) for block in blocks]) for name in blocks[0]}


def mix_text(report: MixReport) -> str:
    """What `mix_targets` did, and what remains to be done."""
    state = "complete and sealed" if report.complete else f"work remains: {are_missing(report.missing)}"
    weights = ", ".join(f"{weight:.3g}" for weight in report.weights)
    lines = [
        f"{report.cache}: {report.positions:,} positions in {report.shards:,} shards, {state}",
        f"the mean of {len(report.parents)} caches (weights {weights}), k {report.k}, draws {report.draws}",
    ]
    if report.positions_written:
        each = report.bytes_written / report.positions_written
        lines.append(
            f"this run: {report.shards_written:,} shards in {duration(report.seconds)}, "
            f"{report.positions_written / report.seconds:,.0f} positions/s, {size_text(report.bytes_written)}, "
            f"{each:.1f} B each"
        )
    if not report.complete:
        lines.append("Run the same command again to continue.")
    return "\n".join(printable(line) for line in lines)
