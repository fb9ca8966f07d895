"""Which document goes into which window, shard and batch: a pure function of lengths and settings.

Documents without tokens are left out. The others fall into the training or the held-out split; a document longer than
the context is cut into pieces, any other is one piece. Consecutive pieces of one split make up a shard. With
packing="pack" the pieces of a shard share windows (best fit; no shorter document is ever cut), with "keep" each is a
window of its own. A window is one sequence of the cache, and window numbers are its sequence numbers.

The teacher is run on pieces, not on windows: none sees another, whatever kind of model it is, and no mask is needed.

Nothing depends on who computes it, or on how many share the work.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..cache.capture_plan import CapturePlan
from ..cache.errors import CacheError
from ..data.packing import (
    batches,
    held_out,
    pack,
    segment_counts,
    segment_lengths,
    shard_starts,
)
from ..errors import DataError

VERSION = 1  # of the rules below: other rules make another plan, which must not pass for the same
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PlanSettings:
    """How documents are cut up.

    context: positions a window, at most. packing: "pack" or "keep".
    on_long: what becomes of documents longer than the context: "split" into pieces; "truncate", only the first
        `context` tokens are kept; "error".
    overlap: with "split", tokens before a piece that are repeated at its start as context, and do not count.
    shard_positions: positions a shard, at most. batch_tokens: positions a batch of the teacher's, pads included, at
        most; a piece that is longer is a batch alone.
    held_out: the fraction of the documents that is held out (rounded; at least one unless it is 0). seed: which ones.
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
        for name, possible in (("packing", ("pack", "keep")), ("on_long", ("split", "truncate", "error"))):
            if getattr(self, name) not in possible:
                raise DataError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(possible)}.")
        if self.overlap and (self.on_long != "split" or self.overlap >= self.context):
            raise DataError(
                f"overlap: got {self.overlap}; less than the context ({self.context}) is possible, and only with "
                'on_long="split".'
            )
        if self.shard_positions < self.context:
            raise DataError(f"shard_positions: got {self.shard_positions}; a window of {self.context} has to fit in.")
        held_out = self.held_out
        if isinstance(held_out, (bool, str)) or not hasattr(held_out, "__float__") or not 0 <= float(held_out) < 1:
            raise DataError(f"held_out: got {held_out!r}; expected a fraction from 0 to below 1.")
        object.__setattr__(self, "held_out", float(held_out) + 0.0)


class Piece(NamedTuple):
    """Tokens start to stop of a document. is_context: they are there to be seen, and do not count."""

    document: int
    start: int
    stop: int
    is_context: bool


@dataclass(frozen=True, eq=False)
class Shard:
    """The pieces of a shard in the order of its rows, `[pieces]` each, and its windows.

    document, start, stop: tokens start to stop of that document, of which the first `context` do not count.
    window_begins: `[windows + 1]`, the places of each window's pieces. first_window: the number of the first window.
    """

    index: int
    held_out: bool
    first_window: int
    window_begins: Ints
    document: Ints
    start: Ints
    stop: Ints
    context: Ints

    @property
    def window_lengths(self) -> Ints:
        """Positions of each window, `[windows]`."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.stop - self.start)])
        return np.diff(ends[self.window_begins])


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan for documents of these lengths; made by `make_plan`. Shards are worked out when asked for.

    dataset: the fingerprint of the documents. lengths: int32 `[documents]`.
    order: the documents that are kept, those of the training split first. first_piece: `[kept + 1]`, in that order.
    shard_pieces, shard_windows, shard_rows: `[shards + 1]`, where each shard's pieces, windows and rows begin.
    train_shards: how many shards the training split has; those after them are held out.
    """

    settings: PlanSettings
    dataset: str
    lengths: NDArray[np.int32]
    order: NDArray[np.int32]
    first_piece: Ints
    shard_pieces: Ints
    shard_windows: Ints
    shard_rows: Ints
    train_shards: int

    @property
    def shards(self) -> int:
        """The number of shards."""
        return len(self.shard_pieces) - 1

    @property
    def windows(self) -> int:
        """The number of windows."""
        return int(self.shard_windows[-1])

    @property
    def skipped(self) -> int:
        """How many documents are left out because they have no tokens."""
        return len(self.lengths) - len(self.order)

    @cached_property
    def totals(self) -> dict[str, int]:
        """What a person wants to know.

        documents, and how many of them are skipped, held out, long; windows, shards. positions: all of them, context
        included. tokens: those that are kept, each in one position that is no context (a loss mask may take from
        them). dropped_tokens: what truncation takes away.
        """
        settings = self.settings
        all_tokens = int(self.lengths.sum(dtype=np.int64))
        tokens = all_tokens
        if settings.on_long == "truncate":
            tokens = int(np.minimum(self.lengths, settings.context).sum(dtype=np.int64))
        kept, pieces = len(self.order), int(self.first_piece[-1])
        train = int(np.searchsorted(self.first_piece, self.shard_pieces[self.train_shards]))
        return {
            "documents": len(self.lengths),
            "skipped": self.skipped,
            "held_out": kept - train,
            "long": int(np.count_nonzero(self.lengths > settings.context)),
            "windows": self.windows,
            "shards": self.shards,
            "positions": tokens + settings.overlap * (pieces - kept),
            "tokens": tokens,
            "dropped_tokens": all_tokens - tokens,
        }

    @cached_property
    def hash(self) -> str:
        """sha256 of the rules' version, the settings, the dataset, the lengths, and what came of them."""
        whole = hashlib.sha256(json.dumps([VERSION, asdict(self.settings), self.dataset], sort_keys=True).encode())
        for array in (self.lengths, self.order, self.shard_pieces, self.shard_windows):
            whole.update(len(array).to_bytes(8, "little"))
            whole.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return whole.hexdigest()

    def shard(self, index: int) -> Shard:
        """The shard of that number."""
        if not 0 <= index < self.shards:
            raise DataError(f"shard {index}: the plan has {self.shards}, numbered from 0.")
        settings = self.settings
        numbers = np.arange(self.shard_pieces[index], self.shard_pieces[index + 1])
        which = np.searchsorted(self.first_piece, numbers, side="right") - 1
        part = numbers - self.first_piece[which]
        document = self.order[which].astype(np.int64)
        start = part * (settings.context - settings.overlap)
        stop = np.minimum(self.lengths[document], start + settings.context)
        if settings.packing == "pack":
            window, count = pack((stop - start).astype(np.int32), settings.context)
            by = np.argsort(window, kind="stable")
            window_begins = np.searchsorted(window[by], np.arange(count + 1))
        else:
            by, window_begins = np.arange(len(numbers)), np.arange(len(numbers) + 1)
        return Shard(
            index=index,
            held_out=index >= self.train_shards,
            first_window=int(self.shard_windows[index]),
            window_begins=window_begins,
            document=document[by],
            start=start[by],
            stop=stop[by],
            context=np.where(part > 0, settings.overlap, 0)[by],
        )

    def window(self, number: int) -> list[Piece]:
        """The pieces of a window, in order; a piece's context is a piece of its own."""
        if not 0 <= number < self.windows:
            raise DataError(f"window {number}: the plan has {self.windows}, numbered from 0.")
        shard = self.shard(int(np.searchsorted(self.shard_windows, number, side="right")) - 1)
        place = number - shard.first_window
        pieces = []
        for p in range(*shard.window_begins[place : place + 2].tolist()):
            document, start, stop = int(shard.document[p]), int(shard.start[p]), int(shard.stop[p])
            middle = start + int(shard.context[p])
            if middle > start:
                pieces.append(Piece(document, start, middle, True))
            pieces.append(Piece(document, middle, stop, False))
        return pieces

    def batches(self, index: int) -> list[Ints]:
        """The teacher's batches of a shard: the places of each one's pieces in the shard, longest first."""
        shard = self.shard(index)
        return batches(shard.stop - shard.start, self.settings.batch_tokens)

    def to_json(self) -> bytes:
        """All that is needed, beside the lengths, to make the plan again and know that it is the same."""
        written = CapturePlan(
            asdict(self.settings), self.dataset, self.totals, self.train_shards, sha256=self.hash, version=VERSION
        )
        return written.to_json()

    @classmethod
    def from_json(cls, data: bytes, lengths: NDArray[np.int32]) -> "Plan":
        """The plan that `to_json` wrote, made again from the lengths. DataError where another one comes out."""
        try:
            written = CapturePlan.from_json(data)
            if written.version != VERSION:
                raise ValueError(f"version {written.version}, not {VERSION}")
            plan = make_plan(lengths, PlanSettings(**written.settings), written.dataset)
        except (CacheError, ValueError, TypeError) as error:
            raise DataError(f"plan: this is no plan that this fastkd can read ({error}).") from error
        if plan.hash != written.sha256:
            raise DataError(
                "plan: another plan follows from these lengths: the dataset is not the one that was planned. Bring "
                "that one back, or plan anew, for another cache."
            )
        return plan


def make_plan(lengths: Any, settings: PlanSettings, dataset: str, *, progress: bool = False) -> Plan:
    """The plan for documents of these lengths, `[documents]`; 0 is an empty document.

    dataset: the fingerprint of the documents (`Documents.fingerprint`). progress: a bar on stderr.
    Raises DataError where nothing is left, or with on_long="error" where a document is longer than the context.
    """
    given = np.asarray(lengths)
    if given.ndim != 1 or (
        given.size and (given.dtype.kind not in "iu" or not 0 <= given.min() <= given.max() < 2**31)
    ):
        raise DataError(
            f"lengths: got {given.dtype} of shape {given.shape}; expected one integer from 0 on a document."
        )
    if len(given) >= 2**31:
        raise DataError(f"lengths: got {len(given)} documents; up to 2^31 are possible.")
    # its own, and constant: the hash is kept
    lengths = given.astype(np.int32)
    lengths.flags.writeable = False
    kept = np.flatnonzero(lengths).astype(np.int32)
    if not len(kept):
        raise DataError(f"found no tokens in any of the {len(lengths)} documents; there is nothing to plan.")
    _check_long(lengths, settings)
    if settings.held_out and len(kept) < 2:
        raise DataError(f"held_out: got {settings.held_out} of {len(kept)} document; expected two to split.")
    out = held_out(kept, settings.held_out, settings.seed)
    order = np.concatenate([kept[~out], kept[out]])
    train_documents = len(kept) - int(np.count_nonzero(out))
    del kept, out
    ordered = lengths[order]
    counts = np.ones(len(order), np.int32)
    if settings.on_long == "split":
        counts = segment_counts(ordered, settings.context, settings.overlap)
    pieces = segment_lengths(ordered, counts, settings.context, settings.overlap)
    first_piece = np.zeros(len(order) + 1, np.int64)
    np.cumsum(counts, out=first_piece[1:])
    del ordered, counts
    train = shard_starts(pieces[: first_piece[train_documents]], settings.shard_positions)
    rest = shard_starts(pieces[first_piece[train_documents] :], settings.shard_positions)
    begins = np.concatenate([train, rest[1:] + train[-1]])
    shard_rows = np.zeros(len(begins), np.int64)
    np.cumsum(np.add.reduceat(pieces, begins[:-1], dtype=np.int64), out=shard_rows[1:])
    if settings.packing == "pack":
        windows = np.zeros(len(begins), np.int64)
        for index in tqdm(range(len(begins) - 1), desc="plan", unit="shard", disable=not progress):
            windows[index + 1] = pack(pieces[begins[index] : begins[index + 1]], settings.context)[1]
        np.cumsum(windows, out=windows)
    else:
        windows = begins.copy()
    return Plan(settings, dataset, lengths, order, first_piece, begins, windows, shard_rows, len(train) - 1)


def _check_long(lengths: NDArray[np.int32], settings: PlanSettings) -> None:
    if settings.on_long == "error" and len(long := np.flatnonzero(lengths > settings.context)):
        raise DataError(
            f"document {long[0]}: got {lengths[long[0]]} tokens, and {len(long)} documents longer than the context "
            f'of {settings.context}. Use on_long="split" or "truncate", or a longer context.'
        )
