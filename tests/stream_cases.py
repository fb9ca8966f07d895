"""Caches for the tests of the loader, as capture writes them, and a slow reference of its batches."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cache_cases import make_shard, make_spec
from numpy.typing import NDArray

from fastkd import DistillLoader
from fastkd.cache import Cache, create_cache, open_cache
from fastkd.capture.rows import TEXT, read_shard_rows
from fastkd.capture.window_plan import WindowPlanSettings, make_window_plan
from fastkd.data.documents import open_documents
from fastkd.stream.batch import MicroBatch, Step

IGNORED = -100
TRAIN_SHARDS, SHARDS = 13, 16  # of the default cache


class Row(NamedTuple):
    """A row of a cache. label: −100 for none. segment: the tokens of the segment it is in."""

    label: int
    position: int
    segment: tuple[int, ...]
    sequence: tuple[int, int]
    targets: dict[str, NDArray[Any]]


def make_cache(
    place: Path,
    *,
    documents: int = 40,
    held_out: float = 0.2,
    seed: int = 0,
    first_token: int = 0,
    planned: bool = True,
    leave_out: tuple[int, ...] = (),
    seal: bool = True,
    **spec: Any,
) -> Cache:
    """A cache of packed windows of up to 24 positions, with context, in shards of up to 60, with no token twice."""
    settings = make_spec(**{"inputs": TEXT, "shard_positions": 60, **spec})
    lengths = np.random.default_rng(seed).integers(1, 40, documents)
    data = open_documents([list(range(n)) for n in lengths.tolist()])
    cut = WindowPlanSettings(24, overlap=3, shard_positions=60, held_out=held_out, seed=seed)
    plan = make_window_plan(lengths, cut, "made up")
    token = first_token
    with create_cache(place, settings) as writer:
        for index in range(plan.shards):
            some = read_shard_rows(plan, data, index)
            inputs = some.inputs | {"tokens": np.arange(token, token + len(some), dtype=np.int32)}
            token += len(some)
            if index in leave_out:
                continue
            shard = make_shard(settings, len(some), seed=index, sequences=1, uncounted=0)
            for name, unused in (("ids", 0), ("logprobs", -np.inf), ("draws", 0)):
                if name in shard:
                    shard[name][~some.counts] = unused
            shard |= {"inputs": inputs, "sequence_lengths": some.sequence_lengths}
            writer.write_shard(
                index, **shard, document_lengths=some.document_lengths, first_sequence=some.first_sequence
            )
        if planned:
            writer.store.create("plan.json", plan.to_json())
        if seal:
            writer.seal()
    return open_cache(place)


def reference(cache: Cache) -> dict[int, Row]:
    """Every row of a cache, by its token."""
    found: dict[int, Row] = {}
    for index in cache.shards:
        arrays = cache.read_shard(index)
        ends = {int(e) for name in ("sequence_lengths", "document_lengths") for e in np.cumsum(arrays[name])}
        begin, sequence, sequence_ends = 0, 0, np.cumsum(arrays["sequence_lengths"]).tolist()
        for end in sorted(ends):
            segment = tuple(arrays["tokens"][begin:end].tolist())
            for i in range(begin, end):
                counts = arrays["logprobs"][i, 0] > -np.inf and bool(arrays["loss_mask"][i]) and i + 1 < end
                found[int(arrays["tokens"][i])] = Row(
                    label=int(arrays["tokens"][i + 1]) if counts else IGNORED,
                    position=i - begin,
                    segment=segment,
                    sequence=(index, sequence),
                    targets={n: arrays[n][i] for n in ("ids", "logprobs", "tail", "outcomes", "draws") if n in arrays},
                )
            begin = end
            sequence += end == sequence_ends[sequence]
    return found


def segments(batch: MicroBatch) -> list[tuple[int, ...]]:
    """The tokens of each segment of a micro-batch but pads, from its boundaries."""
    bounds = batch.cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if batch.layout == "padded":
        return [tuple(row[:n].tolist()) for row, n in zip(batch.input_ids, lengths, strict=True)]
    flat = batch.input_ids.flatten().tolist()
    each = zip(pairwise(bounds), batch.sequences.tolist(), strict=True)
    return [tuple(flat[a:b]) for (a, b), sequence in each if sequence >= 0]


def tokens(*steps: Step) -> list[int]:
    """All tokens of some shares of steps, sorted."""
    return sorted(
        token
        for step in steps
        for batch in step.micro_batches
        if batch.positions
        for segment in segments(batch)
        for token in segment
    )


def bits(step: Step) -> list[Any]:
    """The contents of a step, for comparison."""
    held = [step.count, step.positions, step.sequences, step.epoch, step.number]
    return [*held, *(tensor.tolist() for batch in step.micro_batches for tensor in batch.tensors())]


def check(batch: MicroBatch, expected: dict[int, Row]) -> None:
    """A micro-batch against the rows of its cache, position by position."""
    flat = {name: getattr(batch, name).flatten().tolist() for name in ("input_ids", "labels", "position_ids")}
    mask = batch.padding_mask().flatten().tolist()
    assert batch.positions == sum(mask)
    index = batch.targets.index
    assert index is not None
    rows_at = {position: row for row, position in enumerate(index.tolist())}
    assert sorted(rows_at) == index.tolist()
    for position, there in enumerate(mask):
        label = flat["labels"][position]
        if not there:
            assert (flat["input_ids"][position], label) == (0, IGNORED)
            continue
        row = expected[flat["input_ids"][position]]
        assert label == row.label
        assert flat["position_ids"][position] == row.position
        assert (position in rows_at) == (label != IGNORED)
        if position in rows_at:
            for name, array in row.targets.items():
                ours = getattr(batch.targets, name)[rows_at[position]].numpy()
                np.testing.assert_array_equal(ours.reshape(-1)[: array.size], array.reshape(-1), err_msg=name)
    assert batch.count == len(rows_at)
    for segment in segments(batch):
        assert expected[segment[0]].segment == segment
    assert batch.max_seqlen == max(map(len, segments(batch)))


class Sums:
    """`reduce` for ranks that are threads of one process."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.calls: dict[int, list[list[int]]] = {}
        self.changed = threading.Condition()

    def of_a_rank(self) -> Callable[[list[int]], Callable[[], list[int]]]:
        number = 0

        def begin(values: list[int]) -> Callable[[], list[int]]:
            nonlocal number
            call = self.calls.setdefault(number, [])
            number += 1
            with self.changed:
                call.append(values)
                self.changed.notify_all()

            def wait() -> list[int]:
                with self.changed:
                    assert self.changed.wait_for(lambda: len(call) == self.world_size, timeout=60)
                return [sum(column) for column in zip(*call, strict=True)]

            return wait

        return begin


def ranks(cache: Cache, world_size: int, state: Any = None, stop: int | None = None, **settings: Any) -> list[Any]:
    """The steps of all ranks, `[steps][ranks]`, and the state after the last."""
    sums = Sums(world_size)

    def one(rank: int) -> tuple[list[Step], dict[str, Any]]:
        reduce = sums.of_a_rank()
        loader = DistillLoader(cache, rank=rank, world_size=world_size, reduce=reduce, **settings)
        if state is not None:
            loader.load_state_dict(state)
        found = []
        for step in loader:
            found.append(step)
            if len(found) == stop:
                break
        return found, loader.state_dict()

    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(one, range(world_size)))
    assert all(after == results[0][1] for _, after in results)
    return [list(zip(*(steps for steps, _ in results), strict=True)), results[0][1]]
