"""Decoding a shard on a device against the cache's own decoder, bit for bit."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd import KDError, SparseTargets, kd_loss, targets_from_arrays, targets_from_raw
from fastkd.cache import CODECS, Cache, CacheSpec, create_cache, open_cache
from fastkd.kernels import decode, decode_torch

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """What a shard looks like: rows, vocabulary, and what each row has of head and draws."""

    rows: int
    vocab: int
    k: int
    draws: int = 0
    adaptive: bool = False  # heads of varying length, some empty where there are draws
    uncounted: float = 0.0  # the share of rows without entries
    outcomes: bool = False  # some logits masked
    no_tail: bool = False  # in some rows
    flat: bool = False  # log-probabilities that mostly tie, and ids from all of the vocabulary


def made(shape: Shape, seed: int = 0) -> Arrays:
    """Random targets of this shape, as a teacher could have said them; ids are skewed, as a language's are."""
    rng = np.random.default_rng(seed)
    n, v = shape.rows, shape.vocab
    width = min(shape.k, v) + shape.draws
    skew = 1.0 if shape.flat else 3.0
    some = min(v, 4 * width + 8)
    ids = np.empty((n, width), np.int32)
    for i in range(n):
        drawn = np.unique((v * rng.random(some) ** skew).astype(np.int32))
        if len(drawn) < width:
            drawn = np.arange(v, dtype=np.int32)
        ids[i] = rng.permutation(drawn)[:width]
    steps = rng.exponential(0.02 if shape.flat else 0.3, (n, width)).astype(np.float32)
    logprobs = -0.1 - np.cumsum(steps, axis=1)
    head = np.full(n, min(shape.k, v))
    if shape.adaptive:
        head = rng.integers(0 if shape.draws else 1, min(shape.k, v) + 1, n)
    drawn_n = rng.integers(0, shape.draws + 1, n)
    drawn_n[head == 0] = np.maximum(drawn_n[head == 0], min(1, shape.draws))
    off = rng.random(n) < shape.uncounted
    head[off] = drawn_n[off] = 0
    place = np.arange(width)
    used = place < (head + drawn_n)[:, None]
    is_drawn = used & (place >= head[:, None])
    draws = np.where(is_drawn, 1, 0)
    spare = shape.draws - drawn_n
    for i in np.flatnonzero(drawn_n):
        draws[i, head[i]] += rng.integers(0, spare[i] + 1)
    tail = -rng.exponential(2.0, (n, 4)).astype(np.float32)
    outcomes = v - head
    if shape.outcomes:
        outcomes = np.maximum(outcomes - rng.integers(0, 5, n), 1).clip(max=outcomes)
    if shape.no_tail:
        tail[rng.random(n) < 0.3] = -np.inf
    tail[outcomes == 0] = -np.inf
    arrays = {
        "ids": np.where(used, ids, 0).astype(np.int32),
        "logprobs": np.where(used, logprobs, -np.inf).astype(np.float32),
        "tail": tail,
        "outcomes": outcomes.astype(np.int32),
        "tokens": rng.integers(0, 7, n).astype(np.int32),  # few, so that they have lists of their own
    }
    return arrays | ({"draws": draws.astype(np.int32)} if shape.draws else {})


def cache_of(folder: Path, shape: Shape, codec: Any = "default", seed: int = 0) -> Cache:
    """A cache of one shard of this shape."""
    arrays = made(shape, seed)
    spec = CacheSpec(
        shape.vocab, shape.k, shape.draws, draw_temperature=1.5, mass=0.9 if shape.adaptive else None, codec=codec
    )
    with create_cache(folder / "cache", spec) as writer:
        writer.write_shard(0, {"tokens": arrays.pop("tokens")}, **arrays)
    return open_cache(folder / "cache")


def check(cache: Cache, *, device: str = "cpu", impl: str = "auto") -> SparseTargets:
    """Both forms of the targets have the bits, the types and the device they must have."""
    decoded, raw = cache.read_shard(0), cache.raw_shard(0)
    targets = targets_from_raw(raw, device=device, impl=impl)
    names = [n for n in ("ids", "logprobs", "tail", "outcomes", "draws") if n in decoded]
    assert (targets.draws is None) == ("draws" not in decoded)
    assert targets.temperatures == cache.spec.temperatures
    assert (targets.draw_temperature, targets.vocab_size) == (1.5, cache.spec.vocab_size)
    counted = (decoded["logprobs"] > -np.inf).any(1)
    compact = targets_from_raw(raw, device=device, impl=impl, compact=True)
    assert compact.index is not None
    assert compact.index.dtype == torch.int64
    assert np.array_equal(compact.index.cpu().numpy(), np.flatnonzero(counted))
    for name in names:
        expected = decoded[name]
        for found, wanted in ((targets, expected), (compact, expected[counted])):
            tensor = getattr(found, name)
            assert tensor.device.type == device
            assert tensor.is_contiguous()
            array = tensor.cpu().numpy()
            assert array.dtype == wanted.dtype
            assert array.shape == wanted.shape
            assert array.tobytes() == wanted.tobytes(), name
    return targets


SHAPES = {
    "fixed": Shape(300, 49152, 16),
    "one row": Shape(1, 49152, 8),
    "one place": Shape(70, 100, 1),
    "tiny vocabulary": Shape(130, 100, 12, flat=True),
    "all of the vocabulary": Shape(40, 20, 64),
    "wide ranks": Shape(450, 151936, 256, flat=True),
    "adaptive, uncounted": Shape(333, 49152, 24, adaptive=True, uncounted=0.4),
    "draws alone": Shape(257, 49152, 0, 10),
    "head and draws": Shape(300, 49152, 12, 6, uncounted=0.2),
    "draws behind adaptive heads": Shape(300, 49152, 12, 6, adaptive=True, uncounted=0.3, outcomes=True, no_tail=True),
    "a wide vocabulary, narrow ranks": Shape(200, 151936, 24, 12, adaptive=True, flat=True),
    "nothing counts": Shape(20, 100, 4, 2, uncounted=1.0),
    "no tail": Shape(100, 100, 8, outcomes=True, no_tail=True),
}


STREAMS = ("values", "firsts", "ties", "repeats")
TRITON = [name for name in SHAPES if name != "wide ranks"]  # its ranks are wide by the number of its entries


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that no shard here is a multiple of."""
    monkeypatch.setitem(decode_torch.ROWS_AT_ONCE, "cpu", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", SHAPES)
def test_bit_for_bit(tmp_path: Path, name: str, codec: str) -> None:
    check(cache_of(tmp_path, SHAPES[name], codec), impl="torch")


@pytest.fixture
def interpreted(monkeypatch):
    """Triton under its interpreter, a few rows a program."""
    pytest.importorskip("triton")
    from fastkd.kernels import decode_triton

    if not decode_triton.INTERPRETED:
        pytest.skip("the gpu tests show the same")
    monkeypatch.setattr(decode_triton.Tuning, "rows", 16)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", TRITON)
def test_triton_bit_for_bit(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    shape = replace(shape, rows=min(shape.rows, 37), k=min(shape.k, 8), draws=min(shape.draws, 4))
    codecs = ("default", "fast", "smallest") if shape.adaptive else ("default",)
    for codec in codecs:
        check(cache_of(tmp_path / codec, shape, codec), impl="triton")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_wide_streams(tmp_path: Path, impl: str) -> None:
    """Streams of 32 bits, which take a vocabulary or a shard of another size, hold the same numbers."""
    cache = cache_of(tmp_path, replace(SHAPES["draws behind adaptive heads"], rows=37))
    raw, expected = cache.raw_shard(0), cache.read_shard(0)
    wide = {name: a.astype(np.uint32) if name.split("/")[-1] in STREAMS else a for name, a in raw.items()}
    targets = targets_from_raw(wide, impl=impl)
    for name in ("ids", "logprobs", "draws"):
        assert getattr(targets, name).numpy().tobytes() == expected[name].tobytes()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_unchecked_streams_that_contradict_each_other(tmp_path: Path, monkeypatch, impl: str) -> None:
    """Where nobody looks, as on a GPU: NaN, or an id that is none, for the entries concerned; nothing out of bounds."""
    monkeypatch.setattr(decode, "values_are_checked", lambda _: False)
    cache = cache_of(tmp_path, replace(SHAPES["draws behind adaptive heads"], rows=37))
    raw, good = cache.raw_shard(0), targets_from_raw(cache.raw_shard(0), impl="torch")
    head = (good.logprobs > -torch.inf) & (good.draws == 0)
    firsts, ties = raw["head/firsts"], raw["head/ties"]
    swapped = raw | {"head/firsts": firsts[:-1], "head/ties": np.append(ties, ties[:1])}
    assert bool(targets_from_raw(swapped, impl=impl).logprobs[head].isnan().all())
    swapped = raw | {"head/firsts": np.append(firsts, firsts[:1]), "head/ties": ties[:-1]}
    assert bool(targets_from_raw(swapped, impl=impl).logprobs[head].isnan().all())
    found = targets_from_raw(raw | {"head/grid": raw["head/grid"][: len(raw["head/grid"]) // 2]}, impl=impl)
    assert torch.equal(found.ids, good.ids)
    assert 0 < int(found.logprobs.isnan().sum()) < int(head.sum())
    found = targets_from_raw(raw | {"head/firsts": np.full_like(firsts, 65535)}, impl=impl)
    assert bool((found.ids[:, 0][head[:, 0]] == -1).all())
    assert int(found.ids.min()) == -1
    assert int(found.ids.max()) < 49152


def test_the_cases_are_what_they_say(tmp_path: Path) -> None:
    """Lists, ties, both widths of streams, tails and counts that differ: else the test above shows little."""
    raw = {
        (name, codec): cache_of(tmp_path / f"{name} {codec}", SHAPES[name], codec).raw_shard(0)
        for name, codec in (
            ("wide ranks", "fast"),
            ("wide ranks", "default"),
            ("fixed", "smallest"),
            ("draws behind adaptive heads", "default"),
            ("adaptive, uncounted", "default"),
            ("a wide vocabulary, narrow ranks", "default"),
        )
    }
    assert raw["wide ranks", "fast"]["head/firsts"].dtype == np.uint32
    assert raw["wide ranks", "default"]["head/ties"].dtype == np.uint32
    assert raw["fixed", "smallest"]["head/list_width"] > 0
    assert raw["fixed", "smallest"]["head/firsts"].dtype == np.uint16
    assert raw["a wide vocabulary, narrow ranks", "default"]["draws/firsts"].dtype == np.uint16
    hybrid = raw["draws behind adaptive heads", "default"]
    assert len(hybrid["head/ties"]) > 30
    assert len(hybrid["draws/ties"]) > 10
    assert hybrid["draws/repeats"].max() > 0
    assert "outcomes" in hybrid
    assert (hybrid["tail"][0] == np.iinfo(np.int32).min).any()
    assert len(np.unique(hybrid["head/counts"])) > 10
    assert "outcomes" not in raw["adaptive, uncounted", "default"]


@pytest.mark.parametrize("compact", [False, True])
def test_from_arrays_and_into_a_loss(tmp_path: Path, compact: bool) -> None:
    """What the cache decodes and what the device decodes are the same targets, and a loss takes both."""
    shape = SHAPES["draws behind adaptive heads"]
    cache = cache_of(tmp_path, replace(shape, vocab=500, rows=90))
    raw, arrays = cache.raw_shard(0), cache.sequences([0])
    found = [
        targets_from_raw(raw, compact=compact),
        targets_from_arrays(arrays, cache.spec, compact=compact),
    ]
    logits = torch.randn(90, 500, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(arrays["tokens"]).long()
    losses = [kd_loss(logits, targets, labels).loss for targets in found]
    assert torch.equal(losses[0], losses[1])
    assert bool(losses[0].isfinite())
    for name in ("ids", "logprobs", "tail", "outcomes", "draws", "index"):
        one, other = (getattr(targets, name) for targets in found)
        assert (one is None and other is None) or torch.equal(one, other)
    if not compact:
        assert found[1].ids.data_ptr() == arrays["ids"].ctypes.data


def test_all_rows_uncounted_compact(tmp_path: Path) -> None:
    targets = targets_from_raw(cache_of(tmp_path, SHAPES["nothing counts"]).raw_shard(0), compact=True)
    assert targets.ids.shape == (0, 6)


def test_what_is_refused(tmp_path: Path) -> None:
    """Streams that contradict each other, by their sizes or by their contents."""
    good = cache_of(tmp_path, SHAPES["draws behind adaptive heads"]).raw_shard(0)
    targets_from_raw(good)

    def refused(match: str, **changes: Any) -> None:
        raw = {**good, **{name.replace("_", "/", 1): array for name, array in changes.items()}}
        with pytest.raises(KDError, match=match):
            targets_from_raw({name: array for name, array in raw.items() if array is not None}, impl="torch")

    refused("no 'tail'", tail=None)
    refused("numbers in its streams", head_values=good["head/values"][:-1])
    refused("numbers in its streams", draws_repeats=good["draws/repeats"][:-1])
    refused("shape", head_counts=good["head/counts"][:-1])
    refused("18 places", head_counts=good["head/counts"] + np.uint16(19))
    refused("tables", head_table=good["head/table"][:-1])
    # a tie more than the values have, in place of a first
    firsts, ties = good["head/firsts"], good["head/ties"]
    refused("ties where", head_firsts=firsts[:-1], head_ties=np.append(ties, ties[:1]))
    refused("outside its table", head_grid=good["head/grid"][:3])
    refused("outside its table", head_firsts=np.full_like(firsts, 65535))
    with pytest.raises(KDError, match="impl: found 'numpy'"):
        targets_from_raw(good, impl="numpy")
    with pytest.raises(KDError, match="neither 'head/counts' nor"):
        targets_from_raw({n: a for n, a in good.items() if not n.endswith("counts")})


def test_triton_is_refused_where_it_cannot_run(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    from fastkd.kernels import decode_triton

    monkeypatch.setattr(decode_triton, "INTERPRETED", False)
    with pytest.raises(KDError, match="impl: found 'triton' for tensors on cpu"):
        targets_from_raw(cache_of(tmp_path, SHAPES["one row"]).raw_shard(0), impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", SHAPES)
def test_bit_for_bit_on_a_gpu(tmp_path: Path, name: str, impl: str) -> None:
    for codec in CODECS:
        check(cache_of(tmp_path / codec, SHAPES[name], codec), device="cuda", impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_waits_for_the_gpu(tmp_path: Path, impl: str, compact: bool) -> None:
    raws = [
        cache_of(tmp_path / name / codec, SHAPES[name], codec).raw_shard(0)
        for name in ("fixed", "draws behind adaptive heads", "draws alone")
        for codec in ("default", "smallest")
    ]

    def everything() -> None:
        for raw in raws:
            targets_from_raw(raw, device="cuda", compact=compact, impl=impl)

    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
