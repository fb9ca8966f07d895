"""Checks before a shard is written, and of what one holds. An error names the argument, the row, the value, and what
is expected."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoding.grid import LOWEST
from .encoding.ragged import BLOCK
from .encoding.targets import HIGHEST_TAIL_CODE, Targets
from .errors import CacheError, expect, type_name
from .shard.container import LARGEST
from .spec import CacheSpec

Array = NDArray[Any]

LONGEST_RECORD = 2**14  # characters: a shard's attributes must fit into its last 64 KiB
ROUNDING = 1e-4  # nats by which a log-probability may exceed 0, from rounding in float32
_HIGHEST_TAIL = 1e6  # nats, of a tail's absolute value
# Nats, of a tail at T = 1, which is a probability: more than rounding explains, less than would spoil statistics.
_HIGHEST_LOG_MASS = 8.0


def check_targets(
    spec: CacheSpec, ids: Any, logprobs: Any, tail: Any, draws: Any = None, outcomes: Any = None, stored: bool = False
) -> Targets:
    """The targets as the codec takes them. CacheError if they cannot be a teacher's.

    stored: they were decoded, and are rounded to the steps of the spec's codec.
    """
    ids = _array("ids", ids, "iu", 2)
    n, width = ids.shape
    most = min(spec.shard_positions, LARGEST // (4 * spec.width))
    if not 1 <= n <= most:
        raise CacheError(f"ids: got {n} rows; expected 1 to {most} in a shard of {spec.width} entries a row.")
    if width > spec.width:
        raise CacheError(f"ids: got {width} columns; expected at most {spec.k} (k) + {spec.draws} (draws).")
    logprobs = _array("logprobs", logprobs, "f", 2, like=("ids", ids.shape))
    tail = _array("tail", tail, "f", 2, like=("ids and temperatures", (n, len(spec.temperatures))))
    draws = _draws(spec, draws, ids.shape)
    used_NK = logprobs > -np.inf
    drawn_NK = used_NK & (draws > 0) if draws is not None else np.zeros((n, 0), bool)
    used_N, draw_counts = used_NK.sum(1), drawn_NK.sum(1)
    # before it is narrowed, which would make it -inf
    lowest = LOWEST - (max(spec.settings.cap, spec.settings.draw_step) if stored else 0)
    _check("logprobs", logprobs, ~used_NK | (logprobs >= lowest), f"at least {lowest} nats")
    logprobs = logprobs.astype(np.float32, copy=False)
    head_counts = used_N - draw_counts
    for start in range(0, n, BLOCK):
        some = slice(start, start + BLOCK)
        _check_rows(spec, start, ids[some], logprobs[some], used_NK[some], used_N[some])
    if draws is not None:
        _check("draws", draws, used_NK | (draws == 0), "0, of an unused entry")
        heads_first = np.arange(width) < head_counts[:, None]
        _check("draws", draws, ~(drawn_NK & heads_first), "0 before the last top-k entry")
        total = draws.sum(1, dtype=np.int64)
        _check("draws of a row", total, total <= spec.draws, f"at most {spec.draws} together")
    _check("top-k entries", head_counts, head_counts <= spec.k, f"at most {spec.k} (k)")
    tail = _check_tail(spec, tail, used_N, spec.settings.tail_step if stored else 0)
    return Targets(
        ids=ids.astype(np.int32, copy=False),
        logprobs=logprobs,
        tail=tail,
        draws=draws,
        outcomes=_check_outcomes(spec, outcomes, tail, used_N, head_counts, draw_counts),
        head_counts=head_counts,
        draw_counts=draw_counts,
    )


def check_sorted(targets: Targets) -> None:
    """CacheError unless the top-k entries, and the drawn ones, of each row are sorted by falling log-probability."""
    for start in range(0, len(targets.logprobs), BLOCK):
        logprobs = targets.logprobs[start : start + BLOCK]
        falling = logprobs[:, 1:] <= logprobs[:, :-1]
        if targets.draws is not None:
            drawn = targets.draws[start : start + BLOCK] > 0
            falling |= drawn[:, 1:] != drawn[:, :-1]
        _check("logprobs", logprobs[:, 1:], falling, "falling log-probabilities", start, 1)


def check_decoded(spec: CacheSpec, decoded: Mapping[str, Array]) -> None:
    """CacheError if targets that were decoded from a shard are not those that FORMAT.md allows."""
    given = {name: decoded[name] for name in ("ids", "logprobs", "tail", "draws", "outcomes") if name in decoded}
    targets = check_targets(spec, **given, stored=True)
    check_sorted(targets)
    if not (np.array_equal(targets.tail, decoded["tail"]) and np.array_equal(targets.outcomes, decoded["outcomes"])):
        raise CacheError("a row that does not count has a tail, or not all outcomes")


def check_inputs(spec: CacheSpec, inputs: Any, positions: int) -> dict[str, Array]:
    """The input columns by name, `[positions]` each."""
    found = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else inputs
    expect(found == sorted(spec.inputs), "inputs", found, f"the columns {', '.join(spec.inputs)}")
    columns = {name: _array(f"inputs[{name!r}]", inputs[name], "biuf", 1) for name in spec.inputs}
    for name, column in columns.items():
        if len(column) != positions:
            raise CacheError(f"inputs[{name!r}]: got {len(column)} values; expected {positions}, one a position.")
    tokens = columns.get("tokens")
    if tokens is not None:
        expect(tokens.dtype.kind in "iu", "inputs['tokens']", str(tokens.dtype), "integers")
        _check("inputs['tokens']", tokens, (tokens >= 0) & (tokens < 2**31), "a token id, 0 to 2^31")
    return columns


def check_lengths(name: str, lengths: Sequence[int] | Array, positions: int) -> NDArray[np.uint32]:
    """Lengths of consecutive sequences or documents that cover all positions."""
    array = _array(name, lengths, "iu", 1)
    for i in np.flatnonzero((array < 1) | (array > positions))[:1]:
        expected = f"1 to {positions}, all positions of the shard"
        raise CacheError(f"{name}: element {i}: got {array[i]}; expected {expected}.")
    if (total := int(array.sum(dtype=np.int64))) != positions:
        raise CacheError(f"{name}: got a sum of {total}; expected the {positions} positions.")
    return array.astype(np.uint32)


def check_record(record: Any) -> dict[str, Any]:
    """The record of how a shard was made, as JSON returns it."""
    try:
        text = json.dumps(record, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"record: got values that JSON does not have ({error}).") from error
    if not isinstance(record, Mapping) or len(text) > LONGEST_RECORD:
        raise CacheError(f"record: got {len(text)} characters of JSON; expected an object of up to {LONGEST_RECORD}.")
    found: dict[str, Any] = json.loads(text)
    return found


def _draws(spec: CacheSpec, draws: Any, shape: tuple[int, ...]) -> Array | None:
    """The draws as int32, each in its range; None for a cache without draws."""
    if draws is None:
        expect(not spec.draws, "draws", None, f"the draws of each entry, up to {spec.draws} a row")
        return None
    draws = _array("draws", draws, "iu", 2, like=("ids", shape))
    if not spec.draws and draws.any():
        raise CacheError("draws: got drawn entries; the cache was created with draws=0.")
    # before they are narrowed, which would make large numbers small
    _check("draws", draws, (draws >= 0) & (draws <= spec.draws), f"0 to {spec.draws}")
    return draws.astype(np.int32) if spec.draws else None


def _array(
    name: str, value: Any, kinds: str, ndim: int | None, like: tuple[str, tuple[int, ...]] | None = None
) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise CacheError(f"{name}: got a masked array; expected one without a mask. Use `.filled(...)`.")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CacheError(f"{name}: got {type_name(value)}; expected a NumPy array ({error}).") from error
    wanted = {"iu": "integers", "f": "floating-point numbers"}.get(kinds, "numbers")
    if array.dtype.kind not in kinds and array.size:
        raise CacheError(f"{name}: got {array.dtype}; expected {wanted}.")
    if ndim is not None and array.ndim != ndim:
        raise CacheError(f"{name}: got shape {array.shape}; expected {ndim} dimension{'s' * (ndim > 1)}.")
    if like is not None and array.shape != like[1]:
        raise CacheError(f"{name}: got shape {array.shape}; expected {like[1]}, as {like[0]}.")
    return array


def _check(name: str, values: Array, good: Array, expected: str, row: int = 0, column: int = 0) -> None:
    """CacheError for the first value `[n]` or `[n, K]` that is not good. row, column: the numbers of the first ones."""
    if not good.all():
        place = np.unravel_index(int(good.argmin()), good.shape)
        what = "temperature" if name == "tail" else "column"
        at = f"row {place[0] + row}" + (f", {what} {place[1] + column}" if len(place) > 1 else "")
        raise CacheError(f"{name}: {at}: got {values[place]}; expected {expected}.")


def _check_rows(spec: CacheSpec, start: int, ids: Array, logprobs: Array, used: Array, used_N: Array) -> None:
    """Check the entries of a block of rows that begins with row `start` of the shard."""
    vocab, columns = spec.vocab_size, np.arange(ids.shape[1])
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        _check("ids", ids, (ids >= 0) & (ids < vocab), f"0 to {vocab - 1} (vocab_size)", start)
    _check("logprobs", logprobs, logprobs <= ROUNDING, "a log-probability", start)
    if not used.all():
        hole = (columns < used_N[:, None]) & ~used
        _check("logprobs", logprobs, ~hole, "a finite one, as a later one is: unused entries are last", start)
        _check("ids", ids, used | (ids == 0), "id 0 of an unused entry, whose log-probability is -inf", start)
        # distinct numbers, so that unused entries do not look like repeated ids
        ids = np.where(used, ids.astype(np.int64), -1 - columns)
    ordered = np.sort(ids, axis=1)
    for i, j in np.argwhere(ordered[:, 1:] == ordered[:, :-1])[:1]:
        raise CacheError(f"ids: row {start + i}: got id {ordered[i, j]} twice; expected distinct ids.")


def _check_tail(spec: CacheSpec, tail: Array, used_N: Array, slack: float) -> Array:
    # a row that does not count has no tail: values there would only cost bytes
    tail = np.where((used_N == 0)[:, None], -np.inf, tail)
    _check("tail", tail, tail < np.inf, "a log-partition")
    absent = tail == -np.inf
    _check("tail", tail, absent == absent[:, :1], "finite values, or -inf at every temperature")
    highest = np.array([_HIGHEST_TAIL if t != 1.0 else _HIGHEST_LOG_MASS for t in spec.temperatures])
    lowest = -min(_HIGHEST_TAIL, HIGHEST_TAIL_CODE * spec.settings.tail_step)
    possible = absent | ((tail <= highest + slack) & (tail >= lowest - slack))
    _check("tail", tail, possible, "a tail that a teacher can have (at T=1 it is the log of a probability)")
    return tail.astype(np.float32)


def _check_outcomes(
    spec: CacheSpec, outcomes: Any, tail: Array, used_N: Array, head_counts: Array, draw_counts: Array
) -> Array:
    rest = spec.vocab_size - head_counts
    array = rest if outcomes is None else _array("outcomes", outcomes, "iu", None)
    if array.shape not in ((), rest.shape):
        raise CacheError(f"outcomes: got shape {array.shape}; expected one integer, or one per row.")
    array = np.where(used_N == 0, rest, np.broadcast_to(array, rest.shape)).astype(np.int64)
    good = (array >= draw_counts) & (array <= rest)
    _check("outcomes", array, good, "the drawn entries at least, and the vocabulary outside the top-k entries at most")
    _check("outcomes", array, (array > 0) | (tail[:, 0] == -np.inf), "at least 1 where the tail is finite")
    return array
