"""The mean of several teachers' sparse targets, row by row: arrays in, arrays out.

With teachers t of weights w_t (which sum to 1), H_t their top-k entries in a row and U the union of all H_t, the mixed
row has U as its top-k entries, with the probabilities

    p(j) = Σ_t w_t p_t(j)

In each row the mass adds up: the tail at T = 1 is 1 − Σ_U p.

*Known.* p_t(j) for j in H_t is stored. So an id in every H_t has exactly the mean, and where every H_t is the whole
vocabulary all is exact, at every temperature.

*Unknown.* For j in U that is not in H_t,

- where teacher t has draws, p_t(j) is what the treatment `sampled` makes of them: the part of its draws that fell on
  j, times the mass of its tail. It is zero for most j, and its expectation over the draws is p_t(j). The other draws,
  those outside U, are pooled: each has the mass that `sampled` gives it, times w_t, and as many counts as the mixed
  cache has draws are divided over them in proportion (systematic sampling: Madow and Madow 1944), which leaves every
  expectation as it is. So what `sampled` makes of the mixed row has the mean teacher as its expectation over the draws,
  at T = 1 with draws made at T = 1.
- without draws it is estimated, as half the smaller of two numbers: the smallest top-k probability of t, which bounds
  it, and the mean that the teachers who know j give it. Together the estimates are at most half the mass of the tail,
  unless U has all of the tail, which then is exactly their sum. (Of the whole, 0.7 times and the harmonic mean of the
  two, half had the least error or almost, for a real teacher and copies of it with noise.)

*Tails at other temperatures* need S(T) = Σ_{j ∉ U} p(j)^(1/T), and what is known is S_t(T) of each teacher (its stored
tail less the estimates for U). Where the teachers' tails have the same shape (p_t(j) = c_t r(j)),

    S(T) = (Σ_t w_t S_t(T)^T)^(1/T)

exactly; for T > 1 this is a lower bound of what other shapes give (the reverse Minkowski inequality), for T < 1 an
upper one, and at T = 1 exact for all. It is also exact for equal caches, and where nothing is outside U.

A cut to k entries moves the others to the tail, with their own powers at every temperature, and to the pool of draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_HALF = 0.5  # of what bounds a probability
_MOST_ESTIMATED = 0.5  # of the mass that is left of a tail, if more outcomes are
_LEAST_MASS = 1e-6  # of a tail's mass, where all draws fell on the union


@dataclass(frozen=True, eq=False)
class _Union:
    """Entries of all teachers in a block of N rows, each id of a row once, E in all, ordered by row and id.

    row, ids `[E]`. head `[E]`: in the top-k entries of some teacher. p `[T, E]`: known probabilities, of entries and
    of draws; 0 where unknown. in_head, drawn `[T, E]`. counts `[T, E]`: how often drawn.
    """

    rows: int
    row: Ints
    ids: Ints
    p: Floats
    in_head: NDArray[np.bool_]
    counts: Ints

    @property
    def drawn(self) -> NDArray[np.bool_]:
        return self.counts > 0

    def sum(self, values_E: Array) -> Floats:
        """Sums over the entries of each row, `[N]`."""
        sums: Floats = np.asarray(np.bincount(self.row, values_E, minlength=self.rows), np.float64)
        return sums

    def logsumexp(self, values_E: Floats) -> Floats:
        """log Σ exp over the entries of each row, `[N]`; −inf for a row without any."""
        top = np.full(self.rows, -np.inf)
        if len(self.row):
            starts = np.flatnonzero(np.diff(self.row, prepend=-1))
            top[self.row[starts]] = np.maximum.reduceat(values_E, starts)
        shift = np.where(top > -np.inf, top, 0.0)
        with np.errstate(divide="ignore"):
            return np.log(self.sum(np.exp(values_E - shift[self.row]))) + shift


@dataclass(frozen=True, eq=False)
class _Tail:
    """What is outside a teacher's top-k entries, `[N]` each.

    mass: at T = 1. log_powers `[N, M]`: log Σ p^(1/T). outcomes: how many. least: the smallest top-k probability, which
    bounds the others (the mass, without any).
    """

    mass: Floats
    log_powers: Floats
    outcomes: Ints
    least: Floats


def mix_rows(
    parts: Sequence[Mapping[str, Array]],
    weights: Sequence[float],
    *,
    vocab_size: int,
    temperatures: Sequence[float],
    draw_temperature: float,
    k: int,
    draws: int,
    uniform_N: Floats,
) -> dict[str, Array]:
    """The mean of several teachers' targets of the same N rows.

    parts: of each teacher ids, logprobs `[N, K]`, tail `[N, M]`, outcomes `[N]` and maybe draws `[N, K]`, as
        `Cache.read_shard` returns them. weights: of each, positive.
    temperatures, draw_temperature: of all. k, draws: maximum numbers of top-k entries and draws per row of the result.
    uniform_N: a number in [0, 1) for each row, for the draws.

    Returns ids, logprobs, tail, outcomes and, if draws > 0, draws, as `CacheWriter.write_shard` takes them. Rows that
    are the same in all parts stay as they are, to the bit.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    betas, one = 1 / np.asarray(temperatures, np.float64), list(temperatures).index(1.0)
    union, tails = _unite(parts, vocab_size, betas, one)
    in_union: NDArray[np.bool_] = np.logical_or.reduce(union.in_head)
    estimates = np.stack([_estimates(union, tails, in_union, share, t) for t in range(len(parts))])

    # T = 1: the mass of each entry by each teacher, as `sampled` sees it where there are draws
    mass_TE = np.where(union.in_head, union.p, 0.0)
    outside_N = np.zeros(union.rows)  # mass outside the union
    for t, tail in enumerate(tails):
        sampled_E = _sampled(union, tail, t, draw_temperature)
        has_draws = (draws > 0) & (union.sum(union.counts[t])[union.row] > 0)
        elsewhere = np.where(has_draws, sampled_E, estimates[t] * in_union) * ~union.in_head[t]
        mass_TE[t] += elsewhere
        outside_N += share[t] * np.maximum(tail.mass - union.sum(elsewhere * in_union), 0)
    p_E = share @ mass_TE

    rank_E = _ranks(union, np.where(in_union, p_E, -1.0))
    kept = in_union & (rank_E < k)
    cut = in_union & ~kept
    left_N = _outcomes_left(union, tails, kept, vocab_size)
    outside_N += union.sum(p_E * cut)
    tail_mass = share @ np.stack([tail.mass for tail in tails])
    outside_N = np.where(left_N > 0, np.maximum(outside_N, _LEAST_MASS * tail_mass), 0.0)
    # what is stored is rounded: draws, and what is known of them, can have more or less than the tail's mass
    total_N = union.sum(p_E * kept) + outside_N
    total_N = np.where(total_N > 0, total_N, 1.0)
    p_E, outside_N = p_E / total_N[union.row], outside_N / total_N

    tail_NM = _powers(union, tails, estimates, in_union, share, betas)
    with np.errstate(divide="ignore"):
        for m, beta in enumerate(betas.tolist()):
            moved = union.logsumexp(np.where(cut, beta * np.log(np.where(cut, p_E, 1.0)), -np.inf))
            tail_NM[:, m] = np.logaddexp(tail_NM[:, m], moved)
        tail_NM[:, one] = np.log(outside_N)
        # where teachers of other supports seem to have all of their tails in the union: all outcomes alike
        alike = np.log(outside_N)[:, None] * betas + np.log(np.maximum(left_N, 1))[:, None] * (1 - betas)
    tail_NM = np.where(tail_NM > -np.inf, tail_NM, alike)
    tail_NM[(left_N == 0) | (outside_N == 0)] = -np.inf

    # the probability that a drawn entry is stored with: outside the union, of the teachers that drew it, and estimates
    named_E = np.where(in_union, p_E, share @ np.where(union.drawn, union.p, estimates))
    counts_E = np.zeros(len(p_E), np.int64)
    if draws:
        pool = cut | ~in_union
        with np.errstate(divide="ignore"):
            tilt = np.where(pool, named_E, 1.0) ** (1 / draw_temperature - 1)
        counts_E = _divided(union, np.where(pool, p_E * tilt, 0.0), draws, uniform_N)
    return _as_rows(parts, union, np.where(kept, p_E, named_E), kept, counts_E, tail_NM, left_N, k, draws)


def _unite(
    parts: Sequence[Mapping[str, Array]], vocab_size: int, betas: Floats, one: int
) -> tuple[_Union, list[_Tail]]:
    """The entries of all parts, and their tails; both normalised, since stored values are rounded."""
    rows, keys, places, tails = len(parts[0]["ids"]), [], [], []
    for part in parts:
        logprobs = part["logprobs"].astype(np.float64)
        counts = part["draws"].astype(np.int64) if "draws" in part else np.zeros(logprobs.shape, np.int64)
        used = logprobs > -np.inf
        head = used & (counts == 0)
        p = np.exp(logprobs)
        tail = part["tail"].astype(np.float64)
        total = np.where(head, p, 0).sum(1) + np.exp(tail[:, one])
        total = np.where(total > 0, total, 1.0)
        p /= total[:, None]
        tail -= np.log(total)[:, None] * betas
        row, column = np.nonzero(used)
        keys.append(row * np.int64(vocab_size) + part["ids"][row, column])
        places.append((p[row, column], head[row, column], counts[row, column]))
        mass = np.exp(tail[:, one])
        least = np.where(head, p, np.inf).min(1, initial=np.inf)
        tails.append(_Tail(mass, tail, part["outcomes"].astype(np.int64), np.minimum(least, mass)))
    united, where = np.unique(np.concatenate(keys), return_inverse=True)
    sizes = np.cumsum([len(one_part) for one_part in keys])[:-1]
    shape = (len(parts), len(united))
    row_E, ids_E = np.divmod(united, vocab_size)
    union = _Union(rows, row_E, ids_E, np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, np.int64))
    for t, (place, (p, head, counts)) in enumerate(zip(np.split(where.reshape(-1), sizes), places, strict=True)):
        union.p[t, place], union.in_head[t, place], union.counts[t, place] = p, head, counts
    return union, tails


def _estimates(union: _Union, tails: Sequence[_Tail], in_union: NDArray[np.bool_], share: Floats, t: int) -> Floats:
    """Estimates of p_t(j) for the entries outside H_t, `[E]`; 0 in H_t, and the stored value where t drew j.

    Half the smaller of the smallest top-k probability of t and the mean of the teachers that know j.
    """
    tail, row = tails[t], union.row
    known = union.in_head | union.drawn
    weight = (share[:, None] * known).sum(0)
    others = (share[:, None] * union.p).sum(0) / np.where(weight > 0, weight, 1.0)
    unknown = ~known[t] & (tail.outcomes > 0)[row]
    found = np.where(unknown, _HALF * np.minimum(others, tail.least[row]), 0.0)
    drawn = np.where(union.drawn[t], np.minimum(union.p[t], tail.least[row]), 0.0)
    # entries outside the union were drawn by others: they name the draws, and take no mass from the rest
    inside = unknown & in_union
    available = np.maximum(tail.mass - union.sum(drawn), 0)
    total = union.sum(np.where(inside, found, 0.0))
    left = tail.outcomes - union.sum(union.drawn[t]) - union.sum(inside)
    scale = np.minimum(1.0, _MOST_ESTIMATED * available / np.where(total > 0, total, 1.0))
    scale = np.where((left <= 0) & (total > 0), available / np.where(total > 0, total, 1.0), scale)
    estimates: Floats = np.where(inside, found * scale[row], found) + drawn
    return estimates


def _sampled(union: _Union, tail: _Tail, t: int, draw_temperature: float) -> Floats:
    """The mass at T = 1 that the treatment `sampled` gives to each draw of a teacher, `[E]`: in proportion to
    c p^(1 − 1/T_d), together the mass of the tail."""
    drawn = union.drawn[t]
    part = np.where(drawn, union.counts[t] * np.where(drawn, union.p[t], 1.0) ** (1 - 1 / draw_temperature), 0.0)
    total = union.sum(part)
    return part * (tail.mass / np.where(total > 0, total, 1.0))[union.row]


def _powers(
    union: _Union,
    tails: Sequence[_Tail],
    estimates: Floats,
    in_union: NDArray[np.bool_],
    share: Floats,
    betas: Floats,
) -> Floats:
    """log Σ_{j ∉ U} p(j)^β of the mean for each β, `[N, M]`, as if the teachers' tails had the same shape."""
    parts = []
    for t, tail in enumerate(tails):
        moved = in_union & ~union.in_head[t] & (estimates[t] > 0)
        left = tail.outcomes - union.sum(moved)
        least_mass = tail.mass / np.maximum(tail.outcomes, 1)
        mass = np.maximum(tail.mass - union.sum(np.where(moved, estimates[t], 0.0)), least_mass)
        log_moved = np.log(np.where(moved, estimates[t], 1.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            log_mass, log_least, log_left = np.log(mass), np.log(tail.least), np.log(np.maximum(left, 1))
            found = np.full((union.rows, len(betas)), -np.inf)
            for m, beta in enumerate(betas.tolist()):
                inside = union.logsumexp(np.where(moved, beta * log_moved, -np.inf))
                whole = tail.log_powers[:, m]
                rest = whole + np.log1p(-np.exp(np.minimum(inside - whole, 0.0)))
                # of `left` probabilities that add up to `mass`, each at most `least`
                bounds = log_mass + (beta - 1) * log_least, (1 - beta) * log_left + beta * log_mass
                rest = np.clip(rest, np.minimum(*bounds), np.maximum(*bounds))
                found[:, m] = np.where((left > 0) & (tail.mass > 0), rest, -np.inf)
        parts.append(found)
    logs_TNM = np.stack(parts)
    top = logs_TNM.max(0)
    shift = np.where(top > -np.inf, top, 0.0)
    with np.errstate(divide="ignore"):
        inner = np.tensordot(share, np.exp((logs_TNM - shift) / betas), axes=1)
        mean: Floats = shift + betas * np.log(inner)
    return mean


def _outcomes_left(union: _Union, tails: Sequence[_Tail], kept: NDArray[np.bool_], vocab_size: int) -> Ints:
    """How many tokens outside the kept entries are possible, `[N]`: as if every teacher's were among those of the one
    with the most."""
    most = np.max([tail.outcomes + union.sum(head) for tail, head in zip(tails, union.in_head, strict=True)], 0)
    entries = union.sum(np.ones(len(union.row)))
    possible = np.minimum(np.maximum(most, entries), vocab_size)
    left: Ints = (possible - union.sum(kept)).astype(np.int64)
    return left


def _ranks(union: _Union, values_E: Floats) -> Ints:
    """Places within the row, from 0 for the greatest value; of equal values the lower id comes first."""
    order = np.lexsort((-values_E, union.row))
    first = np.zeros(union.rows, np.int64)
    first[1:] = np.cumsum(union.sum(np.ones(len(values_E))))[:-1]
    ranks = np.empty(len(values_E), np.int64)
    ranks[order] = np.arange(len(values_E)) - first[union.row]
    return ranks


def _divided(union: _Union, masses_E: Floats, draws: int, uniform_N: Floats) -> Ints:
    """Counts `[E]` that add up to `draws` in each row with any mass, in expectation over the uniform numbers in
    proportion to the masses; each is the proportional number, rounded up or down."""
    total = union.sum(masses_E)
    part = masses_E * (draws / np.where(total > 0, total, 1.0))[union.row]
    ends = _row_cumsum(union, part)
    nearest = np.rint(ends)
    ends = np.where(np.abs(ends - nearest) < 1e-9 * draws, nearest, ends)
    upto = np.floor(ends + uniform_N[union.row])
    starts = np.flatnonzero(np.diff(union.row, prepend=-1))
    previous = np.zeros(len(upto))
    previous[1:] = upto[:-1]
    previous[starts] = 0
    return (upto - previous).astype(np.int64)


def _row_cumsum(union: _Union, values_E: Floats) -> Floats:
    """Running sums within each row, `[E]`."""
    running = np.cumsum(values_E)
    starts = np.flatnonzero(np.diff(union.row, prepend=-1))
    offset = np.zeros(union.rows)
    offset[union.row[starts]] = running[starts] - values_E[starts]
    sums: Floats = running - offset[union.row]
    return sums


def _as_rows(
    parts: Sequence[Mapping[str, Array]],
    union: _Union,
    p_E: Floats,
    kept: NDArray[np.bool_],
    counts_E: Ints,
    tail_NM: Floats,
    left_N: Ints,
    k: int,
    draws: int,
) -> dict[str, Array]:
    """The result as rows: first the kept entries, then the drawn ones, each the most probable first."""
    used = kept | (counts_E > 0)
    row, ids, p, drawn = union.row[used], union.ids[used], p_E[used], np.where(kept, 0, counts_E)[used]
    order = np.lexsort((-p, drawn > 0, row))
    row, ids, p, drawn = row[order], ids[order], p[order], drawn[order]
    sizes = np.bincount(row, minlength=union.rows)
    column = np.arange(len(row)) - (np.cumsum(sizes) - sizes)[row]
    same = _same_rows(parts, k, draws)
    first = parts[0]
    widest = int((first["logprobs"][same] > -np.inf).sum(1).max(initial=0))
    width = max(int(sizes.max(initial=0)), widest)
    found: dict[str, Array] = {
        "ids": np.zeros((union.rows, width), np.int32),
        "logprobs": np.full((union.rows, width), -np.inf, np.float32),
        "tail": tail_NM.astype(np.float32),
        "outcomes": left_N.astype(np.int32),
    }
    found["ids"][row, column], found["logprobs"][row, column] = ids, np.log(p)
    if draws:
        found["draws"] = np.zeros((union.rows, width), np.int32)
        found["draws"][row, column] = drawn
    for name, array in found.items():
        if name not in first:
            continue
        if array.ndim == 2 and name != "tail":
            array[same] = -np.inf if name == "logprobs" else 0
            array[same, :widest] = first[name][same, :widest]
        else:
            array[same] = first[name][same]
    return found


def _same_rows(parts: Sequence[Mapping[str, Array]], k: int, draws: int) -> NDArray[np.bool_]:
    """The rows that are the same in all parts, and that the result has room for, `[N]`."""
    first = parts[0]
    same = np.ones(len(first["ids"]), bool)
    for part in parts:
        if part.keys() & {"draws"} != first.keys() & {"draws"} or part["ids"].shape != first["ids"].shape:
            return np.zeros_like(same)
        for name in ("ids", "logprobs", "tail", "draws"):
            if name in part:
                same &= (part[name] == first[name]).all(1)
        same &= part["outcomes"] == first["outcomes"]
    counts = first["draws"] if "draws" in first else np.zeros_like(first["ids"])
    used = first["logprobs"] > -np.inf
    drawn = counts.sum(1)
    fits: NDArray[np.bool_] = same & ((used & (counts == 0)).sum(1) <= k) & ((drawn == draws) | (drawn == 0))
    return fits
