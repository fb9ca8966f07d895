"""What goes in comes out: grid, rows, vocabulary, targets and shard files, for drawn inputs of every shape."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cache_cases import unpacked
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastkd.cache import CODECS, CacheError, CacheSpec, Codec
from fastkd.cache.checks import check_sorted, check_targets
from fastkd.cache.encoding import parts, ragged, vocabulary
from fastkd.cache.encoding import targets as codec
from fastkd.cache.encoding.grid import codes_of, steps_at, values_of
from fastkd.cache.shard import container as shardfile

CALLS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=150)
SEEDS = st.integers(0, 2**32 - 1)


@contextmanager
def blocks(size: int) -> Iterator[None]:
    """Rows handled a few at a time, so that a handful of them crosses the borders between blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "BLOCK", size)
        patch.setattr(parts, "BLOCK", size)
        yield


# The grid


@st.composite
def grids(draw) -> tuple[float, float, float]:
    step = draw(st.one_of(st.sampled_from((1 / 56, 1 / 16, 0.25, 1e-4, 8.0)), st.floats(1e-4, 8)))
    cap = draw(st.one_of(st.just(step), st.floats(step, 8)))
    growth = draw(st.one_of(st.sampled_from((0.0, 0.3, 1.0, 1e-4)), st.floats(1e-4, 1)))
    return step, growth, cap


def local_step(x: np.ndarray, step: float, growth: float, cap: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.minimum(step * np.exp(growth * x), cap) if growth else np.full(x.shape, step)


def within(stored: np.ndarray, true: np.ndarray, grid: tuple[float, float, float]) -> None:
    """Half the step at the lower of the two, and what float32 cannot tell apart."""
    stored, true = stored.astype(np.float64), np.minimum(true.astype(np.float64), 0)
    half = local_step(np.maximum(-stored, -true), *grid) / 2
    assert (np.abs(stored - true) <= half * 1.002 - 5e-7 * np.minimum(stored, true)).all()


@given(grids(), hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(-60, 2**-14, width=32)))
@example((1 / 56, 1e-4, 0.4), -np.linspace(0, 60, 500, dtype=np.float32))
@settings(CALLS, max_examples=300)
def test_grid(grid: tuple[float, float, float], x: np.ndarray) -> None:
    x = np.sort(x)[::-1]
    before = x.copy()
    codes = codes_of(x, *grid).astype(np.int64)
    np.testing.assert_array_equal(x, before)
    values = values_of(int(codes.max(initial=0)) + 1, *grid)
    within(values[codes], x, grid)
    np.testing.assert_allclose(
        steps_at(x.astype(np.float64), *grid), local_step(np.maximum(-x, 0).astype(np.float64), *grid)
    )
    assert values[0] == 0
    assert not np.signbit(values[0])
    assert (np.diff(values) < 0).all()
    # exp may be out of order in its last bit: by one code at most, and not between numbers that are apart
    assert (np.diff(codes) >= -1).all()
    apart = np.diff(-x.astype(np.float64)) > 0.01 * local_step(-x[:-1], *grid) + 1e-6 * -x[1:]
    assert (np.diff(codes)[apart] >= 0).all()
    np.testing.assert_array_equal(codes_of(values, *grid), np.arange(len(values)))


def test_the_grid_reaches_down_to_the_lowest() -> None:
    for setting in CODECS.values():
        grid = (setting.step, setting.growth, setting.cap)
        x = -np.geomspace(1e-3, 32768, 3000, dtype=np.float32)
        codes = codes_of(x, *grid)
        within(values_of(int(codes.max()) + 1, *grid)[codes], x, grid)


# Rows


@st.composite
def rows(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    n, width = draw(st.integers(0, 12)), draw(st.integers(0, 7))
    rng = np.random.default_rng(draw(SEEDS))
    highest = draw(st.sampled_from((0, 1, 3, 2**15, 2**16 - 2, 2**16 - 1, 2**16, 2**20)))
    ranks_below = draw(st.sampled_from((8, 300, 2**16, 2**16 + 1, 2**26)))
    codes = np.sort(rng.integers(0, highest + 1, (n, width)), axis=1)
    ranks = np.array([rng.choice(ranks_below, width, replace=False) for _ in range(n)]).reshape(n, width)
    counts = rng.integers(0, width + 1, n) if draw(st.booleans()) else np.full(n, width)
    most = draw(st.sampled_from((None, 1, 300, 65535)))
    extras = None if most is None else rng.integers(0, most, (n, width)).astype(np.uint32)
    return codes.astype(np.uint32), ranks.astype(np.uint32), counts, extras


@given(rows(), st.booleans(), st.sampled_from((1, 3, 8192)))
@settings(CALLS, max_examples=300)
def test_rows(drawn: Any, sort_ties: bool, size: int) -> None:
    codes, ranks, counts, extras = drawn
    with blocks(size):
        streams = ragged.encode_rows(codes, ranks, counts, sort_ties=sort_ties, extras_NK=extras)
        total = int(counts.sum())
        assert len(streams.values) == total == len(streams.firsts) + len(streams.ties)
        assert len(streams.extras) == (0 if extras is None else total)
        assert all(s.dtype in (np.uint16, np.uint32) for s in streams)
        assert sort_ties or not len(streams.ties)
        found: dict[int, list[tuple[int, ...]]] = {i: [] for i in range(len(counts))}
        for block in ragged.decode_rows(streams, counts, sort_ties=sort_ties):
            numbers = np.arange(len(counts))[block.rows]
            for j, length in enumerate(block.lengths):
                for place, i in enumerate(numbers[:length].tolist()):
                    extra = () if extras is None else (int(streams.extras[block.values_at[j] + place]),)
                    found[i].append((int(block.codes_KB[j, place]), int(block.ranks_KB[j, place]), *extra))
        for i, count in enumerate(counts.tolist()):
            parts = [codes[i, :count], ranks[i, :count], *([] if extras is None else [extras[i, :count]])]
            expected = list(zip(*(p.tolist() for p in parts), strict=True))
            assert found[i] == (sorted(expected) if sort_ties else expected)
        for name in ("values", "firsts", "ties"):
            if len(getattr(streams, name)):
                short = streams._replace(**{name: getattr(streams, name)[:-1]})
                with pytest.raises(ValueError, match="values"):
                    list(ragged.decode_rows(short, counts, sort_ties=sort_ties))


def test_rows_whose_numbers_do_not_fit_a_key_are_refused() -> None:
    wide = np.array([[2**29]], np.uint32)
    with pytest.raises(CacheError, match="64"):
        ragged.encode_rows(wide, wide, np.array([1]), sort_ties=True, extras_NK=wide)


# Vocabulary


@given(hnp.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 2**40)))
@settings(CALLS)
def test_order(counts: np.ndarray) -> None:
    classes = vocabulary.classes_of(counts)
    assert classes.dtype == np.uint16
    assert classes.tolist() == [math.floor(2 * math.log2(c + 1) + 0.5) for c in counts.tolist()]
    order = vocabulary.order_of(classes)
    assert order.tolist() == sorted(range(len(counts)), key=lambda i: (-int(classes[i]), i))
    np.testing.assert_array_equal(vocabulary.ranks_of(order)[order], np.arange(len(counts)))


@given(SEEDS, st.integers(1, 60), st.integers(1, 80), st.integers(0, 6), st.booleans())
@settings(CALLS)
def test_lists(seed: int, vocab_size: int, n: int, width: int, ragged_rows: bool) -> None:
    rng = np.random.default_rng(seed)
    width = min(width, vocab_size)
    tokens = rng.integers(0, 3, n) * 2**30
    ids = np.array([rng.permutation(vocab_size)[:width] for _ in range(n)], np.int64).reshape(n, width)
    ids = np.where(rng.random(n)[:, None] < 0.7, np.sort(ids, axis=1) % vocab_size, ids)
    used = rng.random(ids.shape) < 0.8 if ragged_rows else None
    counted = ids if used is None else ids[used]
    counts = np.bincount(counted.ravel(), minlength=vocab_size)
    order = vocabulary.order_of(vocabulary.classes_of(counts))
    ranks = vocabulary.ranks_of(order)
    lists = vocabulary.learn_lists(tokens, ids, used, counts)
    assert (np.diff(lists.tokens) > 0).all()
    assert (lists.lengths > 0).all()
    listed = vocabulary.decode_lists(vocabulary.encode_lists(lists, ranks), lists.lengths, order)
    np.testing.assert_array_equal(listed, lists.ids)
    ends = lists.lengths.cumsum()
    of = {
        token: listed[end - length : end].tolist()
        for token, end, length in zip(lists.tokens.tolist(), ends, lists.lengths, strict=True)
    }
    assert all(len(set(some)) == len(some) for some in of.values())
    found = vocabulary.rank_in_context(tokens, ids, lists, ranks)
    for i in range(n):
        for token_id, rank in zip(ids[i].tolist(), found[i].tolist(), strict=True):
            some = of.get(int(tokens[i]), [])
            assert token_id == (some[rank] if rank < lists.width else order[rank - lists.width])
            assert (rank < lists.width) == (token_id in some)


# Targets


@st.composite
def caches(draw) -> tuple[CacheSpec, dict[str, np.ndarray], np.ndarray]:
    """A spec, and targets that fit it."""
    vocab_size = draw(st.sampled_from((1, 2, 9, 40, 70_000)))
    k, draws = draw(st.sampled_from(((4, 0), (0, 5), (3, 4), (1, 0), (50, 0))))
    step, growth, cap = draw(grids())
    temperatures = draw(st.sampled_from(((1.0,), (0.5, 1.0, 2.0), (1.0, 1.5, 2.0, 4.0))))
    spec = CacheSpec(
        vocab_size=vocab_size,
        k=k,
        draws=draws,
        temperatures=temperatures,
        codec=Codec(
            step=step,
            growth=growth,
            cap=cap,
            tail_step=draw(st.floats(1e-3, 1)),
            draw_step=draw(st.floats(1e-3, 1)),
            sort_ties=draw(st.booleans()),
            contexts=draw(st.booleans()),
        ),
    )
    n, ragged_rows = draw(st.integers(1, 25)), draw(st.booleans())
    rng = np.random.default_rng(draw(SEEDS))
    width = spec.width
    arrays = {
        "ids": np.zeros((n, width), np.int64),
        "logprobs": np.full((n, width), -np.inf, np.float32),
        "tail": np.minimum(rng.normal(size=(n, len(temperatures))) * 9, 7).astype(np.float32),
        "draws": np.zeros((n, width), np.int32),
    }
    few = min(vocab_size, 3 * width)
    values = -rng.exponential(4, (n, width)).astype(np.float32)
    values = np.round(values * 2) / 2 if draw(st.booleans()) else values
    for i in range(n):
        head = int(rng.integers(0, min(k, vocab_size) + 1)) if ragged_rows else min(k, vocab_size)
        drawn = int(rng.integers(0, draws + 1)) if ragged_rows else draws
        drawn = min(drawn, vocab_size - head)
        total = head + drawn
        arrays["ids"][i, :total] = rng.choice(few, total, replace=False)
        arrays["logprobs"][i, :head] = -np.sort(-values[i, :head])
        arrays["logprobs"][i, head:total] = -np.sort(-values[i, head:total])
        arrays["draws"][i, head:total] = 1
        if drawn:
            arrays["draws"][i, head] += draws - drawn  # all that the row may have
    rest = vocab_size - ((arrays["logprobs"] > -np.inf) & (arrays["draws"] == 0)).sum(1)
    drawn_N = (arrays["draws"] > 0).sum(1)
    outcomes = rng.integers(drawn_N, rest + 1) if draw(st.booleans()) else rest
    if outcomes is not rest:
        arrays["outcomes"] = outcomes
    arrays["tail"][(rng.random(n) < 0.2) | (outcomes == 0)] = -np.inf
    if not draws:
        del arrays["draws"]
    return spec, arrays, rng.integers(0, 2, n).astype(np.int32)


def decoded(spec: CacheSpec, arrays: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    checked = check_targets(spec, **arrays)
    check_sorted(checked)
    return codec.decode_targets(spec, codec.encode_targets(spec, checked, tokens), tokens)


@given(caches(), st.sampled_from((1, 3, 8192)))
@settings(CALLS, max_examples=250)
def test_targets(drawn: Any, size: int) -> None:
    spec, arrays, tokens = drawn
    n, width = arrays["ids"].shape
    given_draws = arrays.get("draws", np.zeros((n, width), np.int32))
    with blocks(size):
        found = decoded(spec, arrays, tokens)
        draws = found.get("draws", np.zeros((n, width), np.int32))
        assert ("draws" in found) == bool(spec.draws)
        types = {"ids": np.int32, "logprobs": np.float32, "tail": np.float32, "outcomes": np.int32, "draws": np.int32}
        assert all(found[name].dtype == types[name] for name in found)
        settings_ = spec.settings
        for is_draw, grid in (
            (False, (settings_.step, settings_.growth, settings_.cap)),
            (True, (settings_.draw_step, 0.0, settings_.draw_step)),
        ):
            for i in range(n):
                before = (arrays["logprobs"][i] > -np.inf) & ((given_draws[i] > 0) == is_draw)
                after = (found["logprobs"][i] > -np.inf) & ((draws[i] > 0) == is_draw)
                np.testing.assert_array_equal(after, before)  # the same places
                one, other = np.argsort(arrays["ids"][i, before]), np.argsort(found["ids"][i, after])
                np.testing.assert_array_equal(found["ids"][i, after][other], arrays["ids"][i, before][one])
                np.testing.assert_array_equal(draws[i, after][other], given_draws[i, before][one])
                within(found["logprobs"][i, after][other], arrays["logprobs"][i, before][one], grid)
                assert (np.diff(found["logprobs"][i, after]) <= 0).all()
                if not settings_.sort_ties:
                    np.testing.assert_array_equal(found["ids"][i, after], arrays["ids"][i, before])
        unused = ~(found["logprobs"] > -np.inf)
        assert not found["ids"][unused].any()
        assert not draws[unused].any()
        counts = ~unused.all(1)
        absent = np.isneginf(arrays["tail"]) | ~counts[:, None]
        np.testing.assert_array_equal(np.isneginf(found["tail"]), absent)
        error = np.abs(found["tail"][~absent].astype(np.float64) - arrays["tail"][~absent])
        assert (error <= settings_.tail_step / 2 + 1e-6 * np.abs(arrays["tail"][~absent])).all()
        rest = spec.vocab_size - (~unused & (draws == 0)).sum(1)
        np.testing.assert_array_equal(found["outcomes"], np.where(counts, arrays.get("outcomes", rest), rest))
        # what lies on the grid stays where it is
        again = decoded(spec, {name: found[name] for name in arrays} | {"outcomes": found["outcomes"]}, tokens)
        for name, array in found.items():
            np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_many_rows() -> None:
    """Whole blocks of thousands, as they come in earnest."""
    rng = np.random.default_rng(5)
    n, vocab_size, k = 20_000, 3000, 8
    tokens = rng.integers(0, 50, n).astype(np.int32)
    ids = (tokens[:, None] * 17 + np.argsort(rng.random((n, 24)), axis=1)[:, :k] ** 2) % vocab_size
    logprobs = -np.sort(rng.exponential(3, (n, k)), axis=1).astype(np.float32)
    counts = rng.integers(0, k + 1, n)
    unused = np.arange(k) >= counts[:, None]
    ids[unused], logprobs[unused] = 0, -np.inf
    tail = rng.normal(size=(n, 4)).astype(np.float32)
    for setting in CODECS.values():
        spec = CacheSpec(vocab_size=vocab_size, k=k, codec=replace(setting, contexts=setting.sort_ties))
        found = decoded(spec, {"ids": ids, "logprobs": logprobs, "tail": tail}, tokens)
        np.testing.assert_array_equal(np.sort(found["ids"], axis=1), np.sort(ids, axis=1))
        np.testing.assert_array_equal((found["logprobs"] > -np.inf).sum(1), counts)


# Shard files

DTYPES = sorted(shardfile.TYPES)
SHAPES = st.one_of(st.tuples(st.integers(0, 40)), st.tuples(st.integers(0, 6), st.integers(0, 9)))
NAMES = st.sampled_from(["tail", "head/values", "head/ties", "draws/ties", "inputs/tokens", "inputs/x", "a/b/c"])


@st.composite
def arrays_of(draw) -> dict[str, np.ndarray]:
    arrays = {}
    for name in draw(st.sets(NAMES, max_size=5)):
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        shape = draw(SHAPES)
        rng = np.random.default_rng(draw(SEEDS))
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind == "b":
            array = rng.integers(0, 2, shape).astype(bool)
        elif draw(st.booleans()):
            array = np.frombuffer(rng.bytes(size), dtype).reshape(shape)  # NaN and all
        else:
            array = np.zeros(shape, dtype)
        if array.ndim == 2 and draw(st.booleans()):
            array = np.asfortranarray(array)
        arrays[name] = array.astype(dtype.newbyteorder(">")) if draw(st.booleans()) else array
    return arrays


@given(arrays_of(), st.sampled_from(("pcodec", "zstd")), st.integers(0, 12), st.integers(1, 2**20), SEEDS)
@settings(CALLS, max_examples=250)
def test_shard_file(arrays: dict[str, np.ndarray], compressor: str, level: int, positions: int, seed: int) -> None:
    attributes = {"a": 1, "text": "ä\n", "list": [None, 1.5]}
    data = shardfile.pack(arrays, attributes, Codec(compressor=compressor, level=level), positions)
    found_attributes, found = unpacked(data)
    assert found_attributes == shardfile.read_attributes(data[-shardfile.TAIL_LENGTH :])
    assert attributes.items() <= found_attributes.items()
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype.newbyteorder("=")
        assert found[name].shape == array.shape
        little = array.astype(array.dtype.newbyteorder("<"))
        assert found[name].tobytes() == little.tobytes(), name
    assert shardfile.content_hash(found) == shardfile.content_hash(arrays)
    assert data == shardfile.pack(arrays, attributes, Codec(compressor=compressor, level=level), positions)
    # and no byte of it may be another, or missing
    at = seed % len(data)
    for bad in (
        data[:at] + bytes([data[at] ^ 1 << seed % 8]) + data[at + 1 :],
        data[:at],
        data[at + 1 :],
        data + b"\0",
    ):
        with pytest.raises(shardfile.Damage):
            unpacked(bad)
