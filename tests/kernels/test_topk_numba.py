"""Compiled sweeps against their twin in PyTorch, and what happens where Numba is not there."""

import importlib.util
import math
import resource

import pytest
import torch

from fastkd.kernels import KDError, prepare_topk, topk_targets
from fastkd.kernels.topk import api as topk_impl
from fastkd.kernels.topk import fill as topk_fill

pytest.importorskip("hypothesis")
pytest.importorskip("numba")
import numba
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

INF = math.inf


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 31, 33, 511, 512, 513, 1024, 1500, 4096]),
    k=st.sampled_from([0, 1, 5, 48, 600]),
    draws=st.sampled_from([0, 1, 9]),
    mass=st.sampled_from([None, 0.3, 0.99]),
    softcap=st.sampled_from([None, 3.0]),
    step=st.sampled_from([0.0, 0.5, 2.0]),  # logits are rounded to multiples of it: ties
    masked=st.sampled_from([0.0, 0.5, 0.99]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_it_finds_what_its_twin_finds(vocab, k, draws, mass, softcap, step, masked, dtype, seed):
    if k == draws == 0:
        draws = 1
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((5, vocab), generator=generator) * 4
    if step:
        logits = (logits / step).round() * step
    logits[torch.rand((5, vocab), generator=generator) < masked] = -INF
    logits[:, seed % vocab] = 1.0  # an outcome at the least
    logits[0, seed % vocab] = -0.0
    named = {"draws": draws, "mass": mass, "softcap": softcap, "seed": seed}
    got, twin = (topk_targets(logits.to(dtype), k, impl=impl, **named) for impl in ("numba", "torch"))
    assert torch.equal(got.ids, twin.ids)
    assert torch.equal(got.outcomes, twin.outcomes)
    assert draws == 0 or torch.equal(got.draws, twin.draws)
    torch.testing.assert_close(got.logprobs, twin.logprobs, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(got.tail, twin.tail, atol=2e-6, rtol=1e-6)


def test_everything_equal_and_nothing_but_pads():
    """All keys tie: as many rooms of the heap as there are tokens, and more groups than that."""
    for vocab, k in ((600, 600), (600, 40), (100, 99), (5000, 4)):
        logits = torch.zeros(2, vocab)
        got = topk_targets(logits, k, impl="numba")
        assert got.ids.tolist() == [list(range(k))] * 2


def test_tails_are_right_to_a_millionth():
    logits = torch.randn(64, 20_000, generator=torch.Generator().manual_seed(0)) * 5
    grid = (1.0, 1.5, 2.0, 4.0, 0.3)
    got = topk_targets(logits, 8, temperatures=grid, impl="numba")
    exact = topk_targets(logits.double(), 8, temperatures=grid)
    torch.testing.assert_close(got.tail, exact.tail, atol=3e-6, rtol=0)


@pytest.mark.parametrize("impl", ["numba", "torch"])
@pytest.mark.parametrize("grid", [tuple(2.0**i for i in range(11)), tuple(4.0**i for i in range(10))])
def test_a_long_row_of_doubled_temperatures_adds_up_no_errors(impl, grid):
    """e^z as a power of e^(z/T) has T times its error."""
    logits = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0)) * 5
    got = topk_targets(logits, 8, temperatures=grid, impl=impl)
    exact = topk_targets(logits.double(), 8, temperatures=grid)
    torch.testing.assert_close(got.tail, exact.tail, atol=2e-6, rtol=0)
    torch.testing.assert_close(got.logprobs, exact.logprobs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("impl", ["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_defaults_of_the_caller_do_not_matter(impl, dtype):
    """A type and a device that tensors are made with, where nothing else is said, as while a model is loaded."""
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    named = {"draws": 3, "mass": 0.9, "impl": impl}
    plain, threads = topk_targets(logits, 4, **named), torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # a default device is the thread's own
        for default in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(default)
            with torch.device("meta"):
                topk_impl.prepare_topk(torch.device("cpu"))
                topk_fill.over_temperatures.cache_clear()
                topk_fill._kept.__dict__.clear()
                got = topk_targets(logits, 4, **named)
            for field in ("ids", "logprobs", "tail", "outcomes", "draws"):
                assert torch.equal(getattr(got, field), getattr(plain, field)), field
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def test_a_view_that_stands_for_its_negative():
    logits = torch.randn(3, 700)
    got, twin = (topk_targets(x, 4, draws=3, impl="numba") for x in (torch._neg_view(-logits), logits))
    assert torch.equal(got.ids, twin.ids)
    assert torch.equal(got.tail, twin.tail)


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("place", [0, 511, 512, 998])
def test_no_bad_value_is_missed(value, place):
    logits = torch.randn(3, 999)
    logits[1, place] = value
    with pytest.raises(KDError, match=r"row 1 has (NaN|\+inf)"):
        topk_targets(logits, 4, draws=2, impl="numba")
    logits[1, 7] = -INF  # with tokens that are no outcomes beside it
    with pytest.raises(KDError, match=r"row 1 has (NaN|\+inf)"):
        topk_targets(logits, 4, draws=2, impl="numba")


def test_it_is_what_auto_takes_on_a_cpu(monkeypatch):
    logits = torch.randn(40, 3000)
    found = {impl: topk_targets(logits, 4, impl=impl).tail for impl in ("auto", "numba", "torch")}
    assert torch.equal(found["auto"], found["numba"])
    assert not torch.equal(found["auto"], found["torch"])  # another order of summing
    with pytest.raises(KDError, match=r"impl: got 'numba' for torch\.float64 on cpu"):
        topk_targets(logits.double(), 4, impl="numba")

    monkeypatch.setattr(topk_impl, "_numba_installed", lambda: False)
    assert torch.equal(topk_targets(logits, 4).tail, found["torch"])
    with pytest.raises(KDError, match=r"pip install 'fastkd\[cpu\]'"):
        topk_targets(logits, 4, impl="numba")
    assert "pip install 'fastkd[cpu]'" in prepare_topk(torch.device("cpu"))
    assert prepare_topk(torch.device("cuda")) == ""


KEPT = """
from fastkd.kernels.topk.numba_kernels import compiled

@compiled()
def twice(x):
    return 2 * x
"""


@pytest.fixture
def twice(tmp_path, monkeypatch):
    """Import a compiled function anew and call it: its result, and how many compiled versions came from the disk."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "kept.py").write_text(KEPT)

    def imported_and_called():
        spec = importlib.util.spec_from_file_location("kept", tmp_path / "kept.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.twice(21), sum(module.twice.stats.cache_hits.values())

    return imported_and_called


def test_without_a_place_to_keep_it_everything_is_compiled_anew(tmp_path, twice, monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])  # as where nothing can be written to
    for _ in range(2):
        assert twice() == (42, 0)
    assert not list(tmp_path.rglob("*.nb?"))


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_what_was_kept_and_is_cut_short_is_compiled_anew(tmp_path, twice, suffix):
    """As where a machine went down before it was on the disk."""
    assert twice() == (42, 0)
    assert twice() == (42, 1)
    (file,) = tmp_path.rglob(f"*twice*.{suffix}")
    file.write_bytes(file.read_bytes()[:40])
    assert twice() == (42, 0)
    assert twice() == (42, 1)


def test_a_full_disk_keeps_nothing(tmp_path, twice):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        found = twice(), twice()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found == ((42, 0), (42, 0))
    assert twice() == (42, 0)
    assert twice() == (42, 1)
