"""The window plan: which tokens of which document go into which window, shard and batch.

It is a pure function of the documents' lengths and the settings, the same on every worker. Empty documents are left
out. The others are divided into the training and the held-out split; a document longer than the context is divided into
segments, any other is one segment. Consecutive segments of a split make up a shard. With packing="pack" the segments of
a shard share windows (best fit; no document that fits into a window is divided), with "keep" each is its own window. A
window is one sequence of the cache, and window numbers are its sequence numbers.

The teacher runs on segments, not on windows: no segment attends to another, whatever the model, and no mask is needed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.capture_plan import CapturePlan
from ..cache.errors import CacheError
from ..cache.spec import CacheSpec, integer
from ..data.packing import DIVIDED_BY, HELD_OUT, batches, default_held_out, divide, pack
from ..errors import DataError, TeacherError
from ..kernels.errors import KDError
from ..kernels.topk.config import TopKConfig
from ..settings import CaptureSettings
from ..utils.progress import counting
from ..utils.similar import did_you_mean
from ..utils.words import TEXT, Words, counted
from .feature_settings import check_feature_settings

VERSION = 1  # of the rules below; increase it whenever they would produce another plan
Ints = NDArray[np.int64]
DEFAULT_CONTEXT = 2048
LEAST_CONTEXT = 256  # of small data, by default
SMALL_TEXT = 2**24  # tokens: of more, the held-out 1% is 80 windows of 2,048 and more
_SAME_NAME = ("k", "draws", "draw_temperature", "mass", "temperatures", "codec")  # in CaptureSettings and CacheSpec


@dataclass(frozen=True)
class WindowPlanSettings:
    """How documents are divided into windows, shards and batches.

    context: positions per window, at most. packing: "pack" or "keep".
    on_long: for documents longer than the context: "split" them into segments; "truncate" them to their first `context`
        tokens; or raise an "error".
    overlap: with "split", tokens before a segment that are repeated at its start as context, without a target.
    shard_positions: positions per shard, at most. batch_tokens: positions per teacher batch, padding included, at most;
        a longer segment is a batch by itself.
    held_out: the fraction of the documents that is held out (rounded; at least one document unless it is 0).
    seed: decides which documents are held out.
    """

    context: int
    packing: str = "pack"
    on_long: str = "split"
    overlap: int = 0
    shard_positions: int = 2**20
    batch_tokens: int = 8192
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("context", 1, 2**31 - 1),
            ("overlap", 0, 2**31 - 1),
            ("shard_positions", 1, 2**31 - 1),
            ("batch_tokens", 1, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= int(value) <= high:
                raise DataError(f"{name}: got {value!r}; expected an integer from {low} to {high}.")
            object.__setattr__(self, name, int(value))
        for name, choices in (("packing", ("pack", "keep")), ("on_long", ("split", "truncate", "error"))):
            if getattr(self, name) not in choices:
                hint = did_you_mean(str(getattr(self, name)), choices)
                raise DataError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(choices)}.{hint}")
        if self.overlap and (self.on_long != "split" or self.overlap >= self.context):
            raise DataError(
                f'overlap: got {self.overlap}; expected less than the context ({self.context}), with on_long="split".'
            )
        if self.shard_positions < self.context:
            raise DataError(
                f"shard_positions: got {self.shard_positions}; expected at least the context ({self.context})."
            )
        held_out = self.held_out
        if isinstance(held_out, (bool, str)) or not hasattr(held_out, "__float__") or not 0 <= float(held_out) < 1:
            raise DataError(f"held_out: got {held_out!r}; expected a fraction from 0 to below 1.")
        object.__setattr__(self, "held_out", float(held_out) + 0.0)


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """The segments of a shard in the order of its rows, and its windows.

    document, start, stop: int64 `[segments]`; the segment is tokens start to stop of the document, of which the first
        `context` have no target.
    window_starts: int64 `[windows + 1]`; window i holds segments window_starts[i] to window_starts[i + 1].
    first_window: the number of the first window.
    """

    index: int
    held_out: bool
    first_window: int
    window_starts: Ints
    document: Ints
    start: Ints
    stop: Ints
    context: Ints

    @property
    def window_lengths(self) -> Ints:
        """Positions of each window, `[windows]`."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.stop - self.start)])
        return np.diff(ends[self.window_starts])


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """The window plan for documents of these lengths; made by `make_window_plan`. Shards are computed on demand.

    dataset: the fingerprint of the documents. lengths: int32 `[documents]`.
    order: the kept documents, those of the training split first. first_segment: `[kept + 1]`, in that order.
    shard_segments, shard_windows, shard_rows: `[shards + 1]`, the first segment, window and row of each shard.
    train_shards: the number of shards of the training split, which come first.
    """

    settings: WindowPlanSettings
    dataset: str
    lengths: NDArray[np.int32]
    order: NDArray[np.int32]
    first_segment: Ints
    shard_segments: Ints
    shard_windows: Ints
    shard_rows: Ints
    train_shards: int

    @property
    def shards(self) -> int:
        """The number of shards."""
        return len(self.shard_segments) - 1

    @property
    def windows(self) -> int:
        """The number of windows."""
        return int(self.shard_windows[-1])

    @cached_property
    def totals(self) -> dict[str, int]:
        """Totals for a person: documents, and how many of them are skipped, held_out and long; windows and shards.

        positions: all of them, context included. tokens: those that are kept, each at one position with a target
        (unless a loss mask excludes it). dropped_tokens: removed by truncation.
        """
        settings = self.settings
        all_tokens = int(self.lengths.sum(dtype=np.int64))
        tokens = all_tokens
        if settings.on_long == "truncate":
            tokens = int(np.minimum(self.lengths, settings.context).sum(dtype=np.int64))
        kept, segments = len(self.order), int(self.first_segment[-1])
        train = int(np.searchsorted(self.first_segment, self.shard_segments[self.train_shards]))
        return {
            "documents": len(self.lengths),
            "skipped": len(self.lengths) - len(self.order),
            "held_out": kept - train,
            "long": int(np.count_nonzero(self.lengths > settings.context)),
            "windows": self.windows,
            "shards": self.shards,
            "positions": tokens + settings.overlap * (segments - kept),
            "tokens": tokens,
            "dropped_tokens": all_tokens - tokens,
        }

    @property
    def held_out(self) -> dict[str, int]:
        """Documents, windows and positions that are held out."""
        first = self.train_shards
        windows, positions = (int(ends[-1] - ends[first]) for ends in (self.shard_windows, self.shard_rows))
        return {"documents": self.totals["held_out"], "windows": windows, "positions": positions}

    def counts(self, *, text: bool) -> dict[str, int]:
        """The totals, with held_out_positions, and of text nothing_to_predict, the documents of one token. They are not
        in plan.json, which is the same as before they were known."""
        single = int(np.count_nonzero(self.lengths == 1)) if text else 0
        return {**self.totals, "held_out_positions": self.held_out["positions"], "nothing_to_predict": single}

    @cached_property
    def hash(self) -> str:
        """sha256 of the version of the rules, settings, dataset, lengths, order, and shards."""
        whole = hashlib.sha256(json.dumps([VERSION, asdict(self.settings), self.dataset], sort_keys=True).encode())
        for array in (self.lengths, self.order, self.shard_segments, self.shard_windows):
            whole.update(len(array).to_bytes(8, "little"))
            whole.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return whole.hexdigest()

    def shard(self, index: int) -> ShardPlan:
        """One shard."""
        if not 0 <= index < self.shards:
            raise DataError(f"shard: got {index}; expected 0 to {self.shards - 1}.")
        settings = self.settings
        numbers = np.arange(self.shard_segments[index], self.shard_segments[index + 1])
        which = np.searchsorted(self.first_segment, numbers, side="right") - 1
        part = numbers - self.first_segment[which]
        document = self.order[which].astype(np.int64)
        start = part * (settings.context - settings.overlap)
        stop = np.minimum(self.lengths[document], start + settings.context)
        if settings.packing == "pack":
            window, count = pack((stop - start).astype(np.int32), settings.context)
            by = np.argsort(window, kind="stable")
            window_starts = np.searchsorted(window[by], np.arange(count + 1))
        else:
            by, window_starts = np.arange(len(numbers)), np.arange(len(numbers) + 1)
        return ShardPlan(
            index=index,
            held_out=index >= self.train_shards,
            first_window=int(self.shard_windows[index]),
            window_starts=window_starts,
            document=document[by],
            start=start[by],
            stop=stop[by],
            context=np.where(part > 0, settings.overlap, 0)[by],
        )

    def batches(self, index: int) -> list[Ints]:
        """The teacher batches of a shard: for each, the indices of its segments in the shard, longest first."""
        shard = self.shard(index)
        return batches(shard.stop - shard.start, self.settings.batch_tokens)

    def capture_plan(self) -> CapturePlan:
        """What plan.json holds: with the lengths, enough to compute the plan again and check that it is the same."""
        return CapturePlan(
            asdict(self.settings), self.dataset, self.totals, self.train_shards, sha256=self.hash, version=VERSION
        )

    def to_json(self) -> bytes:
        """plan.json."""
        return self.capture_plan().to_json()

    @classmethod
    def from_json(cls, data: bytes, lengths: NDArray[np.int32]) -> "WindowPlan":
        """The plan that `to_json` wrote, computed again from the lengths. DataError if the result differs."""
        try:
            written = CapturePlan.from_json(data)
            if written.version != VERSION:
                raise ValueError(f"version {written.version}, not {VERSION}")
            plan = make_window_plan(lengths, WindowPlanSettings(**written.settings), written.dataset)
        except (CacheError, ValueError, TypeError) as error:
            raise DataError(f"window plan: cannot be read by this version of fastkd ({error}).") from error
        if plan.hash != written.sha256:
            raise DataError(
                "window plan: these lengths give another plan: the dataset has changed. Restore it, or capture into a "
                "new cache."
            )
        return plan


def make_window_plan(lengths: Any, settings: WindowPlanSettings, dataset: str, *, progress: bool = False) -> WindowPlan:
    """The window plan for documents of these lengths, integers `[documents]`; 0 is an empty document.

    dataset: the fingerprint of the documents (`Documents.fingerprint`). progress: a progress bar on stderr.
    Raises DataError if all documents are empty, or with on_long="error" if one is longer than the context.
    """
    given = np.asarray(lengths)
    if given.ndim != 1 or (
        given.size and (given.dtype.kind not in "iu" or not 0 <= given.min() <= given.max() < 2**31)
    ):
        raise DataError(
            f"lengths: got {given.dtype} of shape {given.shape}; expected a non-negative integer per document."
        )
    if len(given) >= 2**31:
        raise DataError(f"lengths: got {len(given)} documents; expected at most 2^31.")
    # a copy, and read-only: the hash is cached
    lengths = given.astype(np.int32)
    lengths.flags.writeable = False
    kept = np.flatnonzero(lengths).astype(np.int32)
    if not len(kept):
        raise DataError(f"data: got {len(lengths)} documents without tokens; expected at least one token.")
    if settings.on_long == "error" and len(long := np.flatnonzero(lengths > settings.context)):
        raise DataError(
            f"document {long[0]}: got {lengths[long[0]]} tokens ({len(long)} documents are too long); expected at most "
            f'the context of {settings.context}. Use on_long="split" or "truncate", or a longer context.'
        )
    if settings.held_out and len(kept) < 2:
        raise DataError(f"held_out: got {settings.held_out} and one document with tokens; expected at least two.")
    del kept
    chosen = {name: getattr(settings, name) for name in DIVIDED_BY}
    order, first_segment, segments, begins, train_shards = divide(lengths, **chosen)
    shard_rows = np.zeros(len(begins), np.int64)
    np.cumsum(np.add.reduceat(segments, begins[:-1], dtype=np.int64), out=shard_rows[1:])
    if settings.packing == "pack":
        windows = np.zeros(len(begins), np.int64)
        with counting(len(begins) - 1, "shard", "plan", shown=progress) as bar:
            for index in range(len(begins) - 1):
                windows[index + 1] = pack(segments[begins[index] : begins[index + 1]], settings.context)[1]
                bar.add(1)
        np.cumsum(windows, out=windows)
    else:
        windows = begins.copy()
    return WindowPlan(settings, dataset, lengths, order, first_segment, begins, windows, shard_rows, train_shards)


def plan_text(totals: Mapping[str, int], context: int, on_long: str, words: Words = TEXT) -> str:
    """One line: the data, and how they are divided. totals: `WindowPlan.counts`. context: of examples, their copies."""
    parts = [counted(totals["documents"], words.document)]
    held_out = "held out"
    if words.kind == "text":
        held_out += f", with {totals['held_out_positions']:,} positions"
    notes = [
        (totals["skipped"], "empty, left out"),
        (totals["nothing_to_predict"], "of one token, with nothing to predict"),
        (totals["held_out"], held_out),
        (totals["long"], f"longer than the context of {context}: {on_long}"),
    ]
    if noted := [f"{count:,} {what}" for count, what in notes if count]:
        parts[0] += f" ({'; '.join(noted)})"
    if words.kind != "text":
        each = f" in {context} augmented copies each" if context > 1 else ""
        return f"plan: {parts[0]}{each}, {counted(totals['shards'], 'shard')}"
    if totals["dropped_tokens"]:
        parts.append(f"{totals['dropped_tokens']:,} tokens dropped")
    whole = {name: counted(totals[f"{name}s"], name) for name in ("position", "window", "shard")}
    parts.append("{position} in {window} and {shard}".format(**whole))
    if 2 * totals["held_out_positions"] > totals["positions"]:
        parts.append("warning: more positions are held out than are left to train on")
    return "plan: " + ", ".join(parts)


def window_plan_settings(
    settings: CaptureSettings, lengths: NDArray[np.int32], *, longest: int | None = None, copies: int | None = None
) -> WindowPlanSettings:
    """The settings of the window plan for documents of these lengths, `[documents]`, with defaults filled in.

    longest: tokens that the teacher takes; None: no limit. copies: of each example, for a dataset of examples; None for
    text. Raises CacheError, DataError and TeacherError.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    shard_positions = settings.shard_positions
    if shard_positions is None:
        shard_positions = min(max(-(-tokens // 64), 2**14), 2**20)
    held_out = settings.held_out
    seed = integer("seed", settings.seed, 0, 2**63 - 1)  # before documents are drawn by it
    common: dict[str, Any] = {"batch_tokens": settings.batch_tokens, "seed": seed}
    if copies is not None:
        held_out = default_held_out(lengths, seed, predicting=1) if held_out is None else held_out
        size = max(shard_positions, copies)
        return WindowPlanSettings(copies, "keep", shard_positions=size, held_out=held_out, **common)
    context = settings.context
    if context is None:
        context = min(_default_context(settings, lengths), longest or DEFAULT_CONTEXT)
    elif longest is not None and context > longest:
        raise TeacherError(f"context: got {context}; expected at most {longest}, the limit of this teacher.")
    if held_out is None:
        kept = np.minimum(lengths, context) if settings.on_long == "truncate" else lengths
        held_out = default_held_out(kept, seed)
    return WindowPlanSettings(
        context=context,
        packing=settings.packing,
        on_long=settings.on_long,
        overlap=settings.overlap,
        shard_positions=max(shard_positions, context) if settings.shard_positions is None else shard_positions,
        held_out=held_out,
        **common,
    )


def _default_context(settings: CaptureSettings, lengths: NDArray[np.int32]) -> int:
    """2,048; of small data that are packed, the power of two that holds the longest document, if it is smaller: no
    document is divided for it, and there are more windows, over which evaluations have their intervals."""
    if settings.packing != "pack" or settings.overlap or int(lengths.sum(dtype=np.int64)) > SMALL_TEXT:
        return DEFAULT_CONTEXT
    longest = int(lengths.max(initial=1))
    return max(LEAST_CONTEXT, min(DEFAULT_CONTEXT, 1 << (longest - 1).bit_length()))


def before_the_floor(settings: WindowPlanSettings, documents: int) -> WindowPlanSettings:
    """The settings of a plan that holds out the default fraction of documents, as it was before small data had more
    held out: caches from then are continued with it. documents: those that are not empty."""
    return replace(settings, held_out=HELD_OUT * (documents > 1))


def cache_spec(settings: CaptureSettings, *, vocab_size: int, **rest: Any) -> CacheSpec:
    """The spec of a cache with these settings. rest: other fields of `CacheSpec`. Raises CacheError."""
    return CacheSpec(vocab_size=vocab_size, **{name: getattr(settings, name) for name in _SAME_NAME}, **rest)


def check_settings(settings: CaptureSettings, *, threads: int = 1) -> None:
    """CacheError or DataError for settings that are invalid for every teacher and dataset, and for the threads that
    write."""
    integer("threads", threads, 1)
    cache_spec(settings, vocab_size=2**26)
    try:
        TopKConfig(**{f.name: getattr(settings, f.name) for f in fields(TopKConfig)})
    except KDError as error:
        raise DataError(str(error)) from error
    check_feature_settings(settings)
    # without a context, the teacher's limit decides it: it may be as small as a shard
    longest = settings.shard_positions if settings.context is None else None
    window_plan_settings(settings, np.full(2, 2**25, np.int32), longest=longest)
