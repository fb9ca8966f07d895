"""The draws: uniform, weighted rightly, and a function of nothing but seed, position and logits."""

import math
from dataclasses import replace

import pytest
import torch

from fastkd.kernels import SparseTargets
from fastkd.kernels.topk import draws
from fastkd.kernels.topk.api import topk_targets
from fastkd.kernels.topk.config import TopKCall


def uniforms(seed, positions, count, attempt=0):
    """`[N, count]`: the numbers of an attempt at every draw."""
    keys = draws.row_keys(seed, positions)
    return draws.uniforms(keys[:, None], torch.arange(count), torch.tensor(attempt))


def test_uniforms_are_keyed_by_seed_position_draw_and_attempt():
    positions = torch.tensor([0, 1, 2, 10**12, -5])
    u = uniforms(7, positions, 6)
    assert u.dtype == torch.float64
    assert u.shape == (5, 6)
    assert ((u >= 0) & (u < 1)).all()
    assert torch.cat([u, *(uniforms(7, positions, 6, attempt) for attempt in (1, 2, 255))]).unique().numel() == 120
    assert torch.equal(u[2:3], uniforms(7, positions[2:3], 6))
    assert not (u == uniforms(8, positions, 6)).any()
    # any Python integer is a seed
    assert torch.equal(uniforms(2**64 + 7, positions, 6), u)
    assert uniforms(-1, positions, 1).isfinite().all()


def test_uniforms_are_frozen():
    # A cache drawn with one version must be drawn the same by the next: these bits are part of the format.
    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    step = 0x9E3779B97F4A7C15
    rows = [mix((mix(42 * step % 2**64) + (p + 1) * step) % 2**64) for p in (0, 9)]
    for attempt in (0, 1, 255):
        u = uniforms(41, torch.tensor([0, 9]), 3, attempt)
        want = [[mix((row + (d + (attempt << 32)) * step) % 2**64) >> 11 for d in (1, 2, 3)] for row in rows]
        assert (u * 2**53).long().tolist() == want
    assert (uniforms(0, torch.tensor([0]), 2) * 2**53).long().tolist() == [[1249383295688599, 8746909956485189]]


@pytest.mark.parametrize("step", ["draws", "attempts"])
def test_uniforms_are_uniform_and_uncorrelated(step):
    positions = torch.arange(50_000)
    u = uniforms(3, positions, 4) if step == "draws" else torch.cat([uniforms(3, positions, 1, a) for a in range(4)], 1)
    counts = torch.histc(u.flatten(), bins=64, min=0, max=1)
    chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)
    n = u.shape[0]
    for a, b in ((u[:, 0], u[:, 1]), (u[:-1, 0], u[1:, 0]), (u[:-1, 3], u[1:, 0])):
        r = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        assert abs(r) < 5 / math.sqrt(n)


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7])
def test_weights_are_probabilities(scale):
    z = torch.linspace(-30, 0, 4001)[None]
    bits = draws.weight_bits(4001)
    w = draws.integer_weights(z, draws.exponent_scale(1 / scale), bits)
    want = 2.0**bits * (z.double() * scale).exp()
    assert int(w[0, -1]) == 2**bits  # the top token's weight is whole
    # 1e-6 relative, and the cut to an integer
    assert ((w - want).abs() <= 2e-6 * want + 1).all()
    assert int(draws.integer_weights(torch.tensor([[-torch.inf, -1e30]]), 1.0, bits).sum()) == 0


@pytest.mark.parametrize("draw_temperature", [1e-3, 0.7, 1.0, 1.5, 40.0, 1e6])
def test_units_are_never_less_than_weights(draw_temperature):
    d = -torch.cat([torch.linspace(0, 30, 100_001), torch.logspace(-9, 4, 100_001)]) * draw_temperature
    d = torch.cat([d, -torch.arange(40) * (math.log(2) * draw_temperature), torch.tensor([-1e30, -torch.inf])])
    bits = draws.weight_bits(50_000)
    weights = draws.integer_weights(d, draws.exponent_scale(draw_temperature), bits)
    units = draws.units_(d.clone(), draws.exponent_scale(draw_temperature))
    assert torch.equal(units, units.round())
    bound = units.double() * 2 ** (bits - draws.UNIT_BITS)
    assert (bound >= weights).all()
    assert (bound <= 1.07 * weights + 1.01 * 2 ** (bits - draws.UNIT_BITS)).all()
    assert 32 * units.max() < 2**24  # a group's sum is exact in float32
    assert units[-1] == 1


def test_weights_of_any_vocabulary_stay_exact_in_float64():
    for vocab in (1, 2, 50_257, 2**18, 2**18 + 1, 10**6):
        bits = draws.weight_bits(vocab)
        assert bits >= 32
        assert vocab * 2**bits <= 2**53


def test_exact_transform_is_a_softcap():
    x = torch.cat([torch.linspace(-200, 200, 999), torch.tensor([-torch.inf, 0.0, 1e30])])
    z = draws.exact_transform(x, 0.5, 30.0)
    want = 30 * torch.tanh(x.double() * 0.5 / 30)
    assert float(z[-3]) == -torch.inf
    torch.testing.assert_close(z[:-3], want[:-3].float(), atol=1e-5, rtol=1e-6)
    assert z[-1] == 30
    assert torch.equal(draws.exact_transform(x, None, None), x)


def rows_of(logits, count=1, wanted=None):
    """What `draws.draw` takes: the state of rows without top-k entries, the logits, and the call."""
    n, vocab = logits.shape
    width = draws.GROUP
    groups = -(-vocab // width)
    d = torch.full((n, groups * width), -torch.inf)
    top = logits.amax(1)
    d[:, :vocab] = logits - top[:, None]
    sums = draws.units_(d, draws.exponent_scale(1.0)).view(n, groups, width).sum(2)
    sums[:, -1] -= groups * width - vocab
    state = draws.State(
        sums=sums,
        edge_x=torch.full((n,), torch.inf),
        edge_id=torch.full((n,), -1),
        tail_top_x=top,
        top=top,
        log_total=torch.zeros(n),
        size=torch.zeros(n, dtype=torch.int64),
        wanted=torch.ones(n, dtype=torch.bool) if wanted is None else wanted,
    )
    return state, logits, TopKCall(k=0, draws=count, vocab_size=vocab)


def attempt(rows, which, u):
    state, logits, call = rows
    before = torch.cat([torch.zeros(1, dtype=torch.int64), state.sums.flatten().long().cumsum(0)])
    return draws.attempt(state, logits, call, state.tail_top(call), before, which, u)


def drawn(logits, keys, wanted):
    state, logits, call = rows_of(logits, 50, wanted)
    return draws.draw(state, logits, keys, call)


@pytest.mark.parametrize("case", ["normal", "one of a kind", "flat", "masked"])
def test_an_attempt_draws_in_proportion_to_the_weights(case):
    torch.manual_seed(2)
    logits = {
        "normal": lambda: torch.randn(2, 70) * 3,
        "one of a kind": lambda: torch.where(torch.arange(70) == 40, 0.0, -25.0).repeat(2, 1),
        "flat": lambda: torch.zeros(2, 70),
        "masked": lambda: torch.where(torch.arange(70) % 3 == 0, torch.randn(2, 70), -torch.inf),
    }[case]()
    count = 2**18
    u = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).expand(2, -1)  # evenly spread
    tokens, good = attempt(rows_of(logits), torch.arange(2), u)
    assert (tokens[:, 1:] >= tokens[:, :-1]).all()  # named in the order of the ids
    p = torch.softmax(logits.double(), 1)
    for row in range(2):
        counts = torch.bincount(tokens[row][good[row]], minlength=70)
        total = int(good[row].sum())
        assert total >= 0.93 * count
        assert ((counts - p[row] * total).abs() <= 2.5).all()


def test_which_attempts_are_made_together_does_not_show(monkeypatch):
    torch.manual_seed(3)
    logits = torch.randn(9, 333) * 2
    keys, wanted = draws.row_keys(1, torch.arange(9)), torch.arange(9) != 4
    want = drawn(logits, keys, wanted)
    for windows in ((256,), (3, 5, 248)):
        monkeypatch.setattr(draws, "_WINDOWS", windows)
        assert torch.equal(drawn(logits, keys, wanted)[wanted], want[wanted])
    # and the definition, one draw at a time, with other groups
    monkeypatch.setattr(draws, "GROUP", 16)
    rows = rows_of(logits)
    for row in (0, 8):
        for number in range(50):
            u = draws.uniforms(keys[row], torch.tensor(number), torch.arange(draws.MAX_ATTEMPTS))
            tokens, good = attempt(rows, torch.tensor([row]), u[None])
            assert int(tokens[0][good[0]][0]) == want[row, number]


def test_windows_make_all_attempts():
    assert sum(draws._WINDOWS) == draws.MAX_ATTEMPTS


@pytest.mark.parametrize(("k", "draw_temperature"), [(0, 1.0), (3, 1.0), (3, 2.0)])
def test_draws_follow_the_tail(k, draw_temperature):
    torch.manual_seed(0)
    logits = torch.randn(24).mul(1.5)
    rows, n = 4000, 10
    targets = topk_targets(logits.expand(rows, -1), k, draws=n, draw_temperature=draw_temperature, seed=5)
    tail = torch.ones(24, dtype=torch.bool)
    tail[logits.topk(k).indices] = False
    p = torch.softmax((logits.double() / draw_temperature).masked_fill(~tail, -torch.inf), 0)
    assert (targets.draws.sum(1) == n).all()
    counts = torch.zeros(24, dtype=torch.int64)
    counts.scatter_add_(0, targets.ids.flatten().long(), targets.draws.flatten().long())
    assert counts[~tail].sum() == 0
    want = rows * n * p[tail]
    degrees = int(tail.sum()) - 1
    chi2 = float(((counts[tail] - want) ** 2 / want).sum())
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)  # with this seed; five standard deviations
    # and the draws of one row are independent of one another: the variance of a count is the binomial one
    best = int(p.argmax())
    per_row = (targets.draws * (targets.ids == best)).sum(1).double()
    expected = n * p[best] * (1 - p[best])
    assert abs(float(per_row.var() / expected) - 1) < 0.12


def test_merge_puts_the_best_first_and_counts():
    # row 0 drew 7 twice, 2 and 9 once, 2 and 9 tie; row 1 has nothing to draw from
    ids = torch.tensor([[7, 2, 9, 7], [1, 1, 1, 1]])
    logits = torch.zeros(2, 10)
    logits[0, [2, 7, 9]] = torch.tensor([0.5, 3.0, 0.5])
    out_ids = torch.tensor([[4, 0, 0, 0, 0, 0], [4, 5, 0, 0, 0, 0]], dtype=torch.int32)
    out_logprobs = torch.tensor([[-0.1] + [-torch.inf] * 5, [-0.1, -2.0] + [-torch.inf] * 4])
    out_draws = torch.zeros(2, 6, dtype=torch.int32)
    before = out_ids[1].clone(), out_logprobs[1].clone()
    out = SparseTargets(out_ids, out_logprobs, torch.zeros(2, 1), torch.tensor([9, 8]), vocab_size=10, draws=out_draws)
    state, logits, call = rows_of(logits, 4, torch.tensor([True, False]))
    state = replace(state, top=torch.tensor([3.0, 0.0]), log_total=torch.tensor([2.0, 0.0]), size=torch.tensor([1, 2]))
    draws.merge_drawn(logits, ids, state, out, call)
    assert out_ids[0].tolist() == [4, 7, 2, 9, 0, 0]
    assert out_draws.tolist() == [[0, 2, 1, 1, 0, 0], [0] * 6]
    assert out_logprobs[0].tolist() == pytest.approx([-0.1, -2.0, -4.5, -4.5, -math.inf, -math.inf])
    assert torch.equal(out_ids[1], before[0])
    assert torch.equal(out_logprobs[1], before[1])
