"""Top-k targets against a float64 oracle on the dense logits: the PyTorch path, the Triton path, and both together."""

import math

import pytest
import torch

from fastkd.kernels import LMHead, TopKConfig
from fastkd.kernels.errors import KDError
from fastkd.kernels.topk.api import linear_topk_targets, topk_targets
from fastkd.kernels.topk.sizes import topk_sizes

GRID = (1.0, 1.5, 2.0, 4.0)
INF = math.inf

# Where a path can run: Triton is interpreted on the CPU, and the same tests run on a GPU where there is one.
PLACES = [
    pytest.param(("cpu", "torch"), id="torch"),
    pytest.param(("cpu", "numba"), id="numba"),
    pytest.param(("cpu", "triton"), id="triton-interpreted"),
    pytest.param(("cuda", "torch"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", "triton"), id="triton-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES)
def place(request):
    """(device, impl)."""
    device, impl = request.param
    if impl == "numba":
        pytest.importorskip("numba")
    if (device, impl) == ("cpu", "triton"):
        triton_impl = pytest.importorskip("fastkd.kernels.topk.triton_impl")
        if not triton_impl.INTERPRETED:
            pytest.skip("triton compiles for the GPU in this process; interpreted where there is none")
    return device, impl


def on(place, logits, k, **settings):
    """Targets computed at a place, back on the CPU."""
    device, impl = place
    if "positions" in settings:
        settings["positions"] = settings["positions"].to(device)
    return topk_targets(logits.to(device), k, impl=impl, **settings).to("cpu")


def oracle(logits, k, *, temperatures=GRID, mass=None, softcap=None, logit_scale=None):
    """ids, logprobs, tail, outcomes from a stable sort in float64; unused places: id 0, −inf."""
    x = logits.double()
    z = x * (1.0 if logit_scale is None else logit_scale)
    if softcap is not None:
        z = torch.where(x == -INF, x, softcap * torch.tanh(z / softcap))
    logp = z - torch.logsumexp(z, 1, keepdim=True)
    order = x.sort(dim=1, descending=True, stable=True).indices
    k = min(k, x.shape[1])
    head = order[:, :k]
    logprobs = logp.gather(1, head)
    kept = logprobs > -INF
    if mass is not None and k:
        behind = logp.gather(1, order).exp().flip(1).cumsum(1).flip(1)[:, :k]  # the mass from this entry on
        kept &= (behind > 1 - mass) | (torch.arange(k) == 0)
    in_head = torch.zeros_like(x, dtype=torch.bool)
    in_head.scatter_(1, head, kept)  # a head has no id twice
    outside = logp.masked_fill(in_head, -INF)
    tail = torch.stack([torch.logsumexp(outside / t, 1) for t in temperatures], 1)
    outcomes = (outside > -INF).sum(1)
    return head.masked_fill(~kept, 0), logprobs.masked_fill(~kept, -INF), tail, outcomes


def check(targets, logits, k, *, atol=1e-5, **settings):
    ids, logprobs, tail, outcomes = oracle(logits, k, **settings)
    width = ids.shape[1]
    assert targets.ids.dtype == torch.int32
    assert targets.logprobs.dtype == targets.tail.dtype == torch.float32
    assert torch.equal(targets.ids[:, :width].long(), ids)
    torch.testing.assert_close(targets.logprobs[:, :width].double(), logprobs, atol=atol, rtol=1e-5)
    torch.testing.assert_close(targets.tail.double(), tail, atol=atol, rtol=1e-5)
    assert torch.equal(targets.outcomes.long(), outcomes)


def drawn(rows, vocab, dtype, scale=4.0, seed=0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("vocab", "k"),
    [
        (1, 1),
        (10, 3),  # fewer tokens than a group
        (10, 10),  # nothing left over
        (10, 20),  # k > V
        (128, 5),  # one whole group
        (1000, 16),  # a part of a group; more groups than k
        (1000, 64),  # more entries than groups
        (4097, 8),
        (8193, 8),  # a program for one last token
    ],
)
def test_against_the_oracle(place, vocab, k, dtype):
    logits = drawn(3, vocab, dtype)
    targets = on(place, logits, k)
    check(targets, logits, k)
    assert targets.ids.shape == (3, min(k, vocab))
    assert targets.draws is None
    assert targets.vocab_size == vocab
    assert targets.temperatures == GRID


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("vocab", [49_152, 50_257, 128_256, 151_936])
@pytest.mark.parametrize("k", [1, 64, 256])
def test_real_vocabularies(vocab, k, dtype):
    logits = drawn(37, vocab, dtype, seed=vocab + k)
    logits[5] = 0.25  # all equal
    logits[6, 100:] = -INF
    check(on(("cuda", "triton"), logits, k), logits, k)
    hybrid = on(("cuda", "triton"), logits, k, draws=16, mass=0.9)
    twin = on(("cpu", "torch"), logits, k, draws=16, mass=0.9)
    assert torch.equal(hybrid.ids, twin.ids)
    assert torch.equal(hybrid.draws, twin.draws)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits():
    rows, vocab = 16_800, 128_256
    logits = torch.zeros((rows, vocab), dtype=torch.bfloat16, device="cuda")
    last = drawn(2, vocab, torch.bfloat16)
    logits[-2:] = last.cuda()
    targets = topk_targets(logits, 8, draws=4)
    check(targets[rows - 2 :].to("cpu"), last, 8)
    assert targets.ids[0, :8].tolist() == list(range(8))


@pytest.mark.parametrize("temperatures", [(1.0,), (2.0, 1.0), (0.5, 1.0, 3.0), (1.0, 2.0, 4.0, 8.0, 3.0)])
def test_any_grid(place, temperatures):
    logits = drawn(2, 300, torch.float32)
    check(on(place, logits, 7, temperatures=temperatures), logits, 7, temperatures=temperatures)


@pytest.mark.parametrize("case", ["equal", "two values", "coarse", "zeros of both signs", "boundary", "late"])
@pytest.mark.parametrize("k", [1, 16, 20])
def test_ties_go_to_the_lower_id(place, case, k):
    torch.manual_seed(1)
    logits = {
        "equal": lambda: torch.full((2, 700), -3.5),
        "two values": lambda: torch.randint(0, 2, (2, 700)).float(),
        "coarse": lambda: torch.randn(2, 700).round(),
        "zeros of both signs": lambda: torch.where(torch.rand(2, 700) < 0.5, -0.0, 0.0),
        "boundary": lambda: torch.where(torch.arange(700) % 7 == 3, 5.0, 1.0).repeat(2, 1),
        "late": lambda: torch.where(torch.arange(700) > 650, 5.0, 1.0).repeat(2, 1),
    }[case]().bfloat16()
    check(on(place, logits, k), logits, k)


@pytest.mark.parametrize("k", [1, 40])
def test_ties_in_groups_whose_tokens_are_scattered(place, k):
    """A block's groups interleave: of two that tie, the one with the lower number may have the higher ids."""
    vocab = 17_001  # two blocks of 8192, and the beginning of a third
    logits = torch.zeros(5, vocab)
    logits[1] = drawn(1, vocab, torch.bfloat16, scale=1.0)[0].mul(4).round()  # some hundred at every value
    logits[2, 8192 + 1024 + 3 :: 1040] = 2.0  # one in each of some groups: the later, the lower the number
    logits[3, 5::16] = 1.0  # in every run
    logits[3, 8000:8100] = 1.0
    logits[4, [1024, 17, 2048, 18, 16_999]] = 3.0
    logits = logits.bfloat16()
    check(on(place, logits, k, draws=2), logits, k)


def test_masked_tokens_are_no_outcomes(place):
    logits = drawn(5, 600, torch.bfloat16)
    logits[0, 7:] = -INF  # 7 left: fewer than k
    logits[1, ::2] = -INF
    logits[2, 100:500] = -INF  # whole groups
    logits[3] = -INF
    logits[3, 599] = 2.0  # one outcome
    targets = on(place, logits, 12, draws=3)
    check(targets, logits, 12)
    assert targets.outcomes.tolist()[0] == 0
    assert targets.tail[0].tolist() == [-INF] * 4
    assert targets.draws[[0, 3]].sum() == 0  # an empty tail has no draws
    assert (targets.draws[[1, 2, 4]].sum(1) == 3).all()
    for row in (0, 3):
        unused = targets.logprobs[row] == -INF
        assert unused.sum() == 15 - (7 if row == 0 else 1)
        assert (targets.ids[row][unused] == 0).all()


@pytest.mark.parametrize("k", [0, 1, 4])
def test_small_tails_and_large_logits(place, k):
    draws = 1 if k == 0 else 0
    logits = torch.full((4, 300), -30.0)
    logits[:, 50] = 0.0  # a tail of 300 e^-30 = 3e-11
    logits[1] = drawn(1, 300, torch.float32, scale=3e3)[0]
    logits[2] += 1e4
    logits[3] -= 1e4
    targets = on(place, logits, k, draws=draws)
    check(targets, logits, k)
    if k == 1:
        assert float(targets.tail[0, 0]) == pytest.approx(math.log(299) - 30, abs=1e-5)


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("k", [1, 30])
def test_mass_cuts_the_head(place, mass, k):
    logits = drawn(6, 400, torch.float32)
    logits[0] = 0
    logits[1, 3] = 40  # all the mass in one token
    targets = on(place, logits, k, mass=mass)
    check(targets, logits, k, mass=mass if mass < 1 else None)
    if mass == 0.01:
        assert (targets.logprobs[1:] > -INF).sum() == 5  # one entry each: the head is never cut to nothing


@pytest.mark.parametrize(("softcap", "logit_scale"), [(5.0, None), (None, 0.25), (30.0, 2.0)])
def test_softcap_and_scale(place, softcap, logit_scale):
    logits = drawn(3, 500, torch.bfloat16, scale=6.0)
    logits[0, 10:20] = -INF
    settings = {"softcap": softcap, "logit_scale": logit_scale}
    check(on(place, logits, 9, **settings), logits, 9, **settings)
    check(on(place, logits, 9, draws=1, **settings), logits, 9, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"draws": 7},
        {"draws": 7, "mass": 0.6},
        {"draws": 8, "k": 0, "draw_temperature": 1.5},
        {"draws": 5, "softcap": 8.0, "logit_scale": 1.5, "draw_temperature": 0.7},
        {"draws": 4, "k": 290},
        {"draws": 1, "seed": -3},
    ],
    ids=str,
)
def test_every_path_draws_the_same(place, settings):
    logits = drawn(3, 300, torch.bfloat16)
    logits[0, 5:200] = -INF
    settings = {"k": 6, **settings}
    k = settings.pop("k")
    got, twin = on(place, logits, k, **settings), topk_targets(logits, k, impl="torch", **settings)
    assert torch.equal(got.ids, twin.ids)
    assert torch.equal(got.draws, twin.draws)
    assert torch.equal(got.outcomes, twin.outcomes)
    torch.testing.assert_close(got.logprobs, twin.logprobs, atol=2e-6, rtol=1e-6)

    # structure: the head, then the draws, each part best first, then unused places
    z = logits.float() * settings.get("logit_scale", 1.0)
    if "softcap" in settings:
        z = torch.where(z == -INF, z, settings["softcap"] * torch.tanh(z / settings["softcap"]))
    logp = torch.log_softmax(z, 1)
    assert got.ids.shape[1] == k + settings["draws"]
    for row in range(3):
        used = got.logprobs[row] > -INF
        ids, counts = got.ids[row][used], got.draws[row][used]
        assert (used[:-1] >= used[1:]).all()
        assert ids.unique().numel() == ids.numel()
        assert (got.draws[row][~used] == 0).all()
        assert (got.ids[row][~used] == 0).all()
        size = int((counts == 0).sum())
        assert (counts[size:] > 0).all()
        assert int(counts.sum()) == (settings["draws"] if got.outcomes[row] > 0 else 0)
        torch.testing.assert_close(got.logprobs[row][used], logp[row][ids.long()], atol=1e-5, rtol=1e-5)
        keys = list(zip((-logits[row].float()[ids.long()]).tolist(), ids.tolist(), strict=True))
        assert keys[:size] == sorted(keys[:size])
        assert keys[size:] == sorted(keys[size:])


@pytest.mark.parametrize("vocab", [20, 129, 161, 2049, 49_152])
def test_a_wide_tail_is_drawn_the_same(place, vocab):
    logits = drawn(2, vocab, torch.float32)
    logits[1, ::5] = -INF
    for settings in ({"draws": 40, "draw_temperature": 3.0}, {"draws": 40, "mass": 0.05, "draw_temperature": 0.5}):
        got, twin = on(place, logits, 8, **settings), topk_targets(logits, 8, impl="torch", **settings)
        assert torch.equal(got.ids, twin.ids)
        assert torch.equal(got.draws, twin.draws)


def test_draws_do_not_depend_on_the_batch(place):
    logits, positions = drawn(4, 200, torch.float32), torch.tensor([5, 2, 10**10, 0])
    settings = {"draws": 3, "seed": 11}
    whole = on(place, logits, 4, positions=positions, **settings)
    order = torch.tensor([2, 0, 3, 1])
    mixed = on(place, logits[order], 4, positions=positions[order], **settings)
    single = [on(place, logits[i : i + 1], 4, positions=positions[i : i + 1], **settings) for i in range(4)]
    for name in ("ids", "draws", "logprobs", "tail"):
        value = getattr(whole, name)
        assert torch.equal(value[order], getattr(mixed, name)), name
        assert torch.equal(value, torch.cat([getattr(one, name) for one in single])), name
    again = on(place, logits, 4, positions=positions + 1, **settings)
    assert not torch.equal(again.ids, whole.ids)
    assert torch.equal(
        on(place, logits, 4, **settings).ids, on(place, logits, 4, positions=torch.arange(4), **settings).ids
    )


def test_more_draws_keep_the_first_ones(place):
    logits = drawn(2, 100, torch.float32)
    few, many = (on(place, logits, 2, draws=n) for n in (3, 6))
    for row in range(2):
        counts = [dict(zip(t.ids[row].tolist(), t.draws[row].tolist(), strict=True)) for t in (few, many)]
        assert all(counts[1][token] >= count for token, count in counts[0].items())


def test_any_stride_and_leading_shape(place):
    device, impl = place
    base = drawn(4, 300, torch.bfloat16)
    want = topk_targets(base, 5, draws=1, impl="torch")
    wide = torch.zeros(4, 600, dtype=base.dtype)
    wide[:, ::2] = base
    shifted = torch.zeros(4, 307, dtype=base.dtype)
    shifted[:, 3:303] = base
    blocks = torch.zeros(2, 3, 300, dtype=base.dtype)
    blocks[:, :2] = base.view(2, 2, 300)
    for logits in (base.t().contiguous().t(), wide[:, ::2], shifted[:, 3:303], blocks[:, :2], base.view(2, 1, 2, 300)):
        moved = torch.empty(0, dtype=base.dtype, device=device).set_(
            logits.untyped_storage() if device == "cpu" else logits.untyped_storage().cuda(),
            logits.storage_offset(),
            logits.shape,
            logits.stride(),
        )
        got = topk_targets(moved, 5, draws=1, impl=impl).to("cpu")
        for name in ("ids", "draws"):
            assert torch.equal(getattr(got, name), getattr(want, name))
        torch.testing.assert_close(got.tail, want.tail, atol=1e-6, rtol=1e-6)
    assert on(place, base[3], 5).ids.shape == (1, 5)
    empty = on(place, base[:0], 5, draws=2)
    assert empty.ids.shape == (0, 7)


def test_targets_are_detached(place):
    device, impl = place
    logits = torch.randn(2, 50, device=device, requires_grad=True)
    targets = topk_targets(logits, 3, draws=2, impl=impl)
    assert not any(t.requires_grad for t in (targets.ids, targets.logprobs, targets.tail))
    hidden = torch.randn(2, 8, device=device, requires_grad=True)
    weight = torch.randn(50, 8, device=device, requires_grad=True)
    assert not linear_topk_targets(hidden, weight, 3, impl=impl).logprobs.requires_grad


def test_results_repeat(place):
    logits = drawn(2, 1000, torch.bfloat16)
    first, second = (on(place, logits, 16, draws=4, mass=0.8) for _ in range(2))
    for name in ("ids", "logprobs", "tail", "draws", "outcomes"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(("bias", "chunk_tokens"), [(False, None), (True, 1), (True, 4)])
def test_linear_is_the_same_as_logits(place, bias, chunk_tokens):
    device, impl = place
    torch.manual_seed(0)
    hidden = torch.randint(-4, 5, (2, 3, 16), device=device).float()
    weight = torch.randint(-4, 5, (300, 16), device=device).float() / 8
    bias_V = torch.randint(-4, 5, (300,), device=device).float() if bias else None
    logits = hidden @ weight.t() + (0 if bias_V is None else bias_V)  # small integers: exact in any order
    settings = {"draws": 2, "mass": 0.9, "softcap": 20.0, "logit_scale": 0.5, "seed": 3}
    positions = torch.arange(6, device=device) * 7
    got = linear_topk_targets(
        hidden, weight, 6, bias=bias_V, chunk_tokens=chunk_tokens, positions=positions, impl=impl, **settings
    )
    want = topk_targets(logits, 6, positions=positions, impl=impl, **settings)
    for name in ("ids", "logprobs", "tail", "draws", "outcomes"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_linear_under_autocast():
    hidden, weight = torch.randn(3, 8), torch.randn(40, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_topk_targets(hidden, weight, 4)
    assert torch.equal(got.ids, topk_targets(hidden @ weight.t(), 4).ids)


def test_float64_logits():
    logits = drawn(3, 500, torch.float32).double()
    logits[0, 7] = logits[0, 3] + 1e-12  # apart in float64 alone
    check(topk_targets(logits, 9, draws=3), logits, 9)


def test_blocks_of_rows_do_not_show(monkeypatch):
    from fastkd.kernels.topk import torch_impl as topk_torch

    logits = drawn(9, 200, torch.float32)
    want = topk_targets(logits, 5, draws=3, impl="torch")
    monkeypatch.setitem(topk_torch.BLOCK_BYTES, "cpu", 3000)
    got = topk_targets(logits, 5, draws=3, impl="torch")
    for name in ("ids", "logprobs", "tail", "draws", "outcomes"):
        assert torch.equal(getattr(got, name), getattr(want, name))


@pytest.fixture
def two_threads(monkeypatch):
    """Several blocks of rows, and two threads to share them."""
    from fastkd.kernels.topk import fill as topk_fill
    from fastkd.kernels.topk import torch_impl as topk_torch

    before = torch.get_num_threads()
    monkeypatch.setitem(topk_torch.BLOCK_BYTES, "cpu", 3000)
    monkeypatch.setattr(topk_fill, "ROWS_DRAWN", 8)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("inference", [False, True])
def test_threads_do_not_show(two_threads, inference):
    logits = drawn(21, 200, torch.float32)
    settings = {"draws": 3, "mass": 0.9, "softcap": 9.0}
    logits.requires_grad_()
    with torch.inference_mode(inference):
        got = topk_targets(logits, 5, impl="torch", **settings)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    want = topk_targets(logits, 5, impl="torch", **settings)
    for name in ("ids", "logprobs", "tail", "draws", "outcomes"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_the_first_bad_row_is_named_by_any_thread(two_threads):
    logits = drawn(21, 200, torch.float32)
    logits[[7, 12, 20]] = math.nan
    for _ in range(3):
        with pytest.raises(KDError, match="row 7 has NaN"):
            topk_targets(logits, 5, impl="torch")
    assert topk_targets(logits[:7], 5, impl="torch").ids.shape == (7, 5)  # and the threads live on


def test_from_logits_is_topk_targets():
    from fastkd.kernels.targets import SparseTargets

    logits = drawn(3, 60, torch.float32)
    assert torch.equal(SparseTargets.from_logits(logits, 4, draws=2).ids, topk_targets(logits, 4, draws=2).ids)


@pytest.mark.parametrize(
    ("value", "word"), [(math.nan, "NaN"), (INF, r"\+inf"), (None, "no finite logit")], ids=["nan", "inf", "nothing"]
)
def test_bad_rows(place, value, word):
    logits = drawn(4, 300, torch.float32)
    if value is None:
        logits[2] = -INF
    else:
        logits[2, 131] = value
    if place[0] == "cpu":
        with pytest.raises(KDError, match=rf"row 2 has {word}"):
            on(place, logits, 5)
        with pytest.raises(KDError, match=rf"row 2 has {word}"):
            on(place, logits.view(2, 2, 300), 5)
        return
    targets = on(place, logits, 5, draws=3, softcap=20.0)
    assert targets.logprobs[2].isnan().all()
    assert targets.tail[2].isnan().all()
    assert ((targets.ids >= 0) & (targets.ids < 300)).all()
    good = torch.tensor([0, 1, 3])
    check(targets[good], logits[good], 5, softcap=20.0)


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ([3e38, 1.0, -2.0], {"logit_scale": 10.0}),
        ([3e38, 1.0, -2.0], {"logit_scale": 10.0, "softcap": 30.0}),
        ([-3e38, -3e38, -3e38], {"logit_scale": 10.0}),
        ([0.0, -3e38, -3e38], {"logit_scale": 10.0}),  # the tail
        ([3e38, -3e38, -INF], {}),  # the difference is what float32 cannot hold
    ],
    ids=["scaled up", "scaled up and capped", "scaled down", "tail", "difference"],
)
@pytest.mark.parametrize("k", [1, 3])
def test_rows_that_leave_the_range_of_float32(place, row, settings, k):
    logits = drawn(4, 300, torch.float32)
    logits[2] = -INF
    logits[2, 50:53] = torch.tensor(row)
    if place[0] == "cpu":
        with pytest.raises(KDError, match="row 2 has logits out of float32's range"):
            on(place, logits, k, draws=2, **settings)
        return
    targets = on(place, logits, k, draws=2, **settings)
    assert targets.logprobs[2].isnan().all()
    assert targets.tail[2].isnan().all()
    assert ((targets.ids >= 0) & (targets.ids < 300)).all()
    good = torch.tensor([0, 1, 3])
    check(targets[good], logits[good], k, **settings)


def test_float64_logits_too_large_to_draw_from():
    logits = drawn(3, 30, torch.float64)
    logits[1] += 1e300
    with pytest.raises(KDError, match="row 1 has logits out of float32's range"):
        topk_targets(logits, 3, draws=2)


def test_numpy_integers_are_integers():
    np = pytest.importorskip("numpy")
    logits = drawn(2, 30, torch.float32)
    got = topk_targets(logits, np.int64(3), draws=np.uint8(2), seed=np.int32(7))
    want = topk_targets(logits, 3, draws=2, seed=7)
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.draws, want.draws)
    hidden, weight = torch.randn(3, 8), torch.randn(30, 8)
    assert linear_topk_targets(hidden, weight, np.int32(4), chunk_tokens=np.int16(2)).ids.shape == (3, 4)
    for name in ("k", "draws", "seed"):
        with pytest.raises(KDError, match=f"{name}: got .*bool"):
            topk_targets(logits, **{"k": 3, name: np.bool_(True)})


def test_bad_arguments():
    logits = torch.randn(4, 30)
    for word, settings in {
        "k:": {"k": -1},
        "k: got 0": {"k": 0},
        "k: got True": {"k": True},
        "draws:": {"draws": -1},
        "draws: got 1.5": {"draws": 1.5},
        "mass: got 0": {"mass": 0},
        "mass: got 1.1": {"mass": 1.1},
        "mass: got nan": {"mass": math.nan},
        r"temperatures: got \(2.0": {"temperatures": (2.0, 4.0)},
        "temperatures:": {"temperatures": ()},
        r"temperatures: got \(1.0, 1.0": {"temperatures": (1.0, 1.0)},
        r"temperatures: got \(1.0, -2": {"temperatures": (1.0, -2.0)},
        "draw_temperature: got 0.0": {"draw_temperature": 0.0},
        "draw_temperature: got 1e-40": {"draw_temperature": 1e-40, "draws": 2},
        "draw_temperature: got 0.0009": {"draw_temperature": 0.0009},
        "draw_temperature: got 1e\\+40": {"draw_temperature": 1e40, "draws": 2},
        "draw_temperature: got nan": {"draw_temperature": math.nan},
        "draw_temperature: got 'warm'": {"draw_temperature": "warm"},
        r"temperatures: got \(1.0, 1e-40": {"temperatures": (1.0, 1e-40)},
        "temperatures: got None": {"temperatures": None},
        "draws: got True": {"draws": True},
        "mass: got 'half'": {"mass": "half"},
        "softcap:": {"softcap": -5.0},
        "softcap: got 1e-40": {"softcap": 1e-40},
        "softcap: got 1000000.0": {"softcap": 1e6},
        "logit_scale:": {"logit_scale": 0.0},
        "logit_scale: got 1e-40": {"logit_scale": 1e-40},
        "logit_scale: got 1e\\+40": {"logit_scale": 1e40},
        "seed:": {"seed": 0.5},
        "impl:": {"impl": "cuda"},
        r"positions: got \(4,\) torch.int32": {"positions": torch.arange(4, dtype=torch.int32)},
        r"positions: got shape \(3,\)": {"positions": torch.arange(3)},
        r"positions: got .*list": {"positions": [0, 1, 2, 3]},
    }.items():
        with pytest.raises(KDError, match=word):
            topk_targets(logits, **{"k": 3, **settings})
    for wrong in (torch.zeros(3, 0), torch.zeros(3, 4, dtype=torch.int64), torch.tensor(1.0), [[1.0]]):
        with pytest.raises(KDError, match="logits:"):
            topk_targets(wrong, 1)
    with pytest.raises(KDError, match=r"impl: got 'triton' for torch\.float64"):
        topk_targets(logits.double(), 3, impl="triton")


def test_bad_arguments_of_the_lm_head():
    hidden, weight = torch.randn(4, 8), torch.randn(30, 8)
    for word, args, settings in (
        ("weight: got shape", (hidden, torch.randn(30, 7)), {}),
        ("weight: got torch.float32 on", (hidden.double(), weight), {}),
        (r"weight: got shape \(30,\)", (hidden, weight[:, 0]), {}),
        ("weight: got a vocabulary of 0", (hidden, weight[:0]), {}),
        ("hidden:", (torch.ones(4, 8, dtype=torch.int64), weight), {}),
        ("bias: got shape", (hidden, weight), {"bias": torch.zeros(29)}),
        ("bias: got torch.float64 on", (hidden, weight), {"bias": torch.zeros(30).double()}),
        ("chunk_tokens:", (hidden, weight), {"chunk_tokens": 0}),
        ("positions:", (hidden, weight), {"positions": torch.arange(5)}),
        ("k: got 0", (hidden, weight), {"k": 0}),
        ("chunk_tokens: got True", (hidden, weight), {"chunk_tokens": True}),
    ):
        with pytest.raises(KDError, match=word):
            linear_topk_targets(*args, **{"k": 3, **settings})


def test_a_config_is_its_keyword_arguments():
    logits = drawn(5, 60, torch.float32)
    settings = {"mass": 0.8, "draws": 3, "draw_temperature": 1.5, "temperatures": [1.0, 2.0], "seed": 4}
    config = TopKConfig(6, **settings)
    assert config.temperatures == (1.0, 2.0)
    assert config.width(60) == 9
    assert config.width(4) == 7
    want = topk_targets(logits, 6, **settings)
    assert same_targets(topk_targets(logits, config=config), want)
    changed = topk_targets(logits, 2, config=config, draws=0)
    assert same_targets(changed, topk_targets(logits, 2, **settings | {"draws": 0}))
    assert not same_targets(changed, want)
    assert TopKConfig(3, mass=1).mass is None
    assert TopKConfig(3, seed=2**70).seed == 2**70
    with pytest.raises(KDError, match="k: got none; expected"):
        topk_targets(logits, draws=3)
    with pytest.raises(TypeError, match="temperature"):
        topk_targets(logits, 3, temperature=2.0)
    with pytest.raises(KDError, match="k: got 0 with draws=0"):
        TopKConfig(0)


def test_an_lm_head_brings_its_bias_softcap_and_scale():
    hidden, weight, bias = torch.randn(5, 8), torch.randn(40, 8), torch.randn(40)
    lm_head = LMHead(weight, bias, softcap=5.0, logit_scale=0.5)
    want = linear_topk_targets(hidden, weight, 6, bias=bias, softcap=5.0, logit_scale=0.5)
    assert same_targets(linear_topk_targets(hidden, lm_head, 6), want)
    assert not same_targets(linear_topk_targets(hidden, LMHead(weight, bias), 6), want)
    for name, value in (("bias", bias), ("softcap", 5.0), ("logit_scale", 0.5)):
        with pytest.raises(KDError, match=f"{name}: got .* beside an LMHead"):
            linear_topk_targets(hidden, lm_head, 6, **{name: value})


def same_targets(one, other):
    """All arrays are equal."""
    ours, theirs = one.arrays(), other.arrays()
    shapes = [[array.shape for array in arrays.values()] for arrays in (ours, theirs)]
    return shapes[0] == shapes[1] and all((ours[name] == theirs[name]).all() for name in ours)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastkd.bench.sass import resources
from fastkd.kernels.topk import draws_triton, triton_impl
from fastkd.kernels.topk.config import TopKCall
from fastkd.kernels.topk.fill import unfilled

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}
POINTERS |= {torch.int32: "*i32", torch.int64: "*i64"}

class Compiler:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps, enable_fp_fusion=True, **constants):
        signature, values, sixteens = {}, {}, {}
        names = self.kernel.arg_names
        for name, value in [*zip(names, args), *constants.items()]:
            place = (names.index(name),)
            if isinstance(value, torch.Tensor):
                kind = POINTERS[value.dtype]
            else:
                kind = "fp32" if isinstance(value, float) else "i32"
            if name in constants or value is None or (kind == "i32" and value == 1):
                kind, values[place] = "constexpr", value
            elif kind != "fp32" and (kind != "i32" or value % 16 == 0):
                sixteens[place] = [["tt.divisibility", 16]]
            signature[name] = kind
        source = ASTSource(self.kernel, {n: signature[n] for n in names}, values, sixteens)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        built = triton.compile(source, target=target, options=options)
        assert num_warps * target.warp_size <= 1024
        if target.backend == "cuda":
            assert resources(built.asm["cubin"])["STACK"] == 0, "a kernel spills registers"
            if not enable_fp_fusion:
                assert "fma" not in built.asm["ptx"], "the draws' arithmetic must round every operation"
        print(self.kernel.__name__)

of_topk = ("_scan", "_pick", "_select", "_sift", "_sift_ties", "_finish")
for module, names in ((triton_impl, of_topk), (draws_triton, ("_weigh", "_draw"))):
    for name in names:
        setattr(module, name, Compiler(getattr(module, name)))
triton_impl.refuse = triton_impl.merge_drawn = lambda *args: None
calls = [(*on, 64, 0.9, 4, 30.0, 0.5, torch.bfloat16) for on in ((80, "cuda"), (100, "cuda"), ("gfx942", "hip"))]
calls = [(90, "cuda", 1024, None, 0, None, None, torch.float32), *calls] if EVERYWHERE else calls[:1]
for arch, backend, k, mass, draws, softcap, scale, dtype in calls:
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    call = TopKCall(k=k, mass=mass, draws=draws, vocab_size=128256, softcap=softcap, logit_scale=scale)
    logits = torch.zeros(2, 128256, dtype=dtype)
    triton_impl._launch(logits, unfilled(call, 2, logits.device), call, torch.arange(2), 0)
"""


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_kernels_compile_for_gpus_without_spills_and_never_fuse_what_must_be_exact(compiled_kernels, everywhere):
    """What the interpreter lets pass, a compiler may not. Needs no GPU; runs where triton is not interpreting. An A100
    in `make test`, an H100 by `make check`, the others in the soak."""
    triton = pytest.importorskip("triton")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 5):
        pytest.skip("the compiler's interface was another one before triton 3.5")
    names = compiled_kernels(f"EVERYWHERE = {everywhere}\n{COMPILE}").split()
    of_topk = ["_scan", "_pick", "_select", "_sift", "_sift_ties", "_finish"]
    all_of_them = [*of_topk, "_weigh", "_draw"]
    assert names == (of_topk + all_of_them * 3 if everywhere else all_of_them)


@pytest.mark.parametrize("vocab", [1, 50, 8192, 50_257, 128_256, 2**20])
@pytest.mark.parametrize("k", [0, 1, 64, 100, 1024])
def test_sizes_of_kernels(vocab, k):
    entries = min(k, vocab)
    size = topk_sizes(vocab, entries)
    assert size.parts * size.block >= vocab > (size.parts - 1) * size.block
    assert size.groups == size.parts * size.block // size.group
    assert size.block % size.group == size.group % size.run == size.run % 8 == 0
    assert size.candidates >= 2 * entries
    assert size.picked >= size.take + size.block // size.group - 1
    assert max(size.scan_warps, size.pick_warps, size.select_warps, size.finish_warps) <= 16  # of 64 threads each


def test_nothing_of_the_input_is_changed(place):
    logits = drawn(3, 200, torch.float32)
    device, impl = place
    there = logits.to(device)
    before = there.clone()
    topk_targets(there, 5, draws=2, mass=0.5, softcap=10.0, impl=impl)
    assert torch.equal(there, before)
