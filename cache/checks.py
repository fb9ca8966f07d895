"""Checks before a shard is written. An error names the argument, the row, the value, and what is expected."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoding.grid import LOWEST
from .encoding.ragged import BLOCK
from .encoding.targets import Targets
from .errors import CacheError
from .shard.container import LARGEST
from .spec import CacheSpec
from .values import integer

Array = NDArray[Any]

LONGEST_RECORD = 2**14  # characters: a shard's attributes must fit into its last 64 KiB
ROUNDING = 1e-4  # nats by which a log-probability may exceed 0, from rounding in float32
_HIGHEST_TAIL = 1e6  # nats, of a tail's absolute value
# Nats, of a tail at T = 1, which is a probability: more than rounding explains, less than would spoil statistics.
_HIGHEST_LOG_MASS = 8.0
_HIGHEST_TAIL_CODE = 2**30 - 1  # a difference of two is an int32


def check_targets(
    spec: CacheSpec, ids: Any, logprobs: Any, tail: Any, draws: Any = None, outcomes: Any = None
) -> Targets:
    """The targets as the codec takes them. CacheError if they cannot be a teacher's."""
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
    far = used_NK & (logprobs < LOWEST)
    _first(far, lambda i, j: f"logprobs: row {i}, column {j}: got {logprobs[i, j]}; expected at least {LOWEST} nats.")
    logprobs = logprobs.astype(np.float32, copy=False)
    head_counts = used_N - draw_counts
    for start in range(0, n, BLOCK):
        some = slice(start, start + BLOCK)
        _check_rows(spec, start, ids[some], logprobs[some], used_NK[some], used_N[some])
    if draws is not None:
        _check_draws(spec, draws, used_NK, drawn_NK, head_counts)
    _first(head_counts > spec.k, lambda i: f"ids: row {i}: got {head_counts[i]} top-k entries; expected {spec.k}.")
    tail = _check_tail(spec, tail, used_N)
    return Targets(
        ids=ids.astype(np.int32, copy=False),
        logprobs=logprobs,
        tail=tail,
        draws=draws,
        outcomes=_check_outcomes(spec, outcomes, tail, used_N, head_counts, draw_counts),
        head_counts=head_counts,
        draw_counts=draw_counts,
    )


def _draws(spec: CacheSpec, draws: Any, shape: tuple[int, ...]) -> Array | None:
    """The draws as int32, each in its range; None for a cache without draws."""
    if draws is None:
        if spec.draws:
            raise CacheError(f"draws: got None; expected the draws of each entry, up to {spec.draws} a row.")
        return None
    draws = _array("draws", draws, "iu", 2, like=("ids", shape))
    if not spec.draws and draws.any():
        raise CacheError("draws: got drawn entries; the cache was created with draws=0.")
    # before they are narrowed, which would make large numbers small
    _first(
        (draws < 0) | (draws > spec.draws),
        lambda i, j: f"draws: row {i}, column {j}: got {draws[i, j]}; expected 0 to {spec.draws}.",
    )
    return draws.astype(np.int32) if spec.draws else None


def check_inputs(spec: CacheSpec, inputs: Any, positions: int) -> dict[str, Array]:
    """The input columns by name, `[positions]` each."""
    if not isinstance(inputs, Mapping) or set(inputs) != set(spec.inputs):
        found = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else inputs
        raise CacheError(f"inputs: got {found}; expected the columns {', '.join(spec.inputs)}.")
    columns = {name: _array(f"inputs[{name!r}]", inputs[name], "biuf", 1) for name in spec.inputs}
    for name, column in columns.items():
        if len(column) != positions:
            raise CacheError(f"inputs[{name!r}]: got {len(column)} values; expected {positions}, one a position.")
    tokens = columns.get("tokens")
    if tokens is not None and (tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= 2**31):
        raise CacheError("inputs['tokens']: got numbers that are no token ids; expected integers from 0 to 2^31.")
    return columns


def check_lengths(name: str, lengths: Sequence[int] | Array, positions: int) -> NDArray[np.uint32]:
    """Lengths of consecutive sequences or documents that cover all positions."""
    array = _array(name, lengths, "iu", 1)
    _first(
        (array < 1) | (array > positions),
        lambda i: f"{name}: element {i}: got {array[i]}; expected 1 to {positions}, all positions of the shard.",
    )
    if (total := int(array.sum(dtype=np.int64))) != positions:
        raise CacheError(f"{name}: got a sum of {total}; expected the {positions} positions.")
    return array.astype(np.uint32)


def check_number(name: str, value: Any) -> int:
    """The number of a shard or a sequence."""
    return integer(name, value, 0, 10**18 - 1)


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


def _array(
    name: str, value: Any, kinds: str, ndim: int | None, like: tuple[str, tuple[int, ...]] | None = None
) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise CacheError(f"{name}: got a masked array; expected one without a mask. Use `.filled(...)`.")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CacheError(f"{name}: got {type(value).__name__}; expected a NumPy array ({error}).") from error
    wanted = {"iu": "integers", "f": "floating-point numbers"}.get(kinds, "numbers")
    if array.dtype.kind not in kinds and array.size:
        raise CacheError(f"{name}: got {array.dtype}; expected {wanted}.")
    if ndim is not None and array.ndim != ndim:
        raise CacheError(f"{name}: got shape {array.shape}; expected {ndim} dimension{'s' * (ndim > 1)}.")
    if like is not None and array.shape != like[1]:
        raise CacheError(f"{name}: got shape {array.shape}; expected {like[1]}, as {like[0]}.")
    return array


def _first(bad: Array, message: Callable[..., str]) -> None:
    """CacheError with message(row) or message(row, column) for the first element that is True."""
    if bad.any():
        raise CacheError(message(*(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))))


def _check_rows(spec: CacheSpec, start: int, ids: Array, logprobs: Array, used: Array, used_N: Array) -> None:
    """Check the entries of a block of rows that begins with row `start` of the shard."""
    vocab = spec.vocab_size
    whole = bool(used.all())
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        _first(
            (ids < 0) | (ids >= vocab),
            lambda i, j: f"ids: row {start + i}, column {j}: got {ids[i, j]}; expected 0 to {vocab - 1} (vocab_size).",
        )
    good = logprobs <= ROUNDING
    if not good.all():
        _first(
            ~good,
            lambda i, j: f"logprobs: row {start + i}, column {j}: got {logprobs[i, j]}; expected a log-probability.",
        )
    if not whole:
        columns = np.arange(ids.shape[1])
        _first(
            (columns < used_N[:, None]) != used,
            lambda i, j: f"logprobs: row {start + i}, column {j}: got -inf, then a finite one; expected -inf last.",
        )
        _first(
            ~used & (ids != 0),
            lambda i, j: (
                f"logprobs: row {start + i}, column {j}: got -inf for id {ids[i, j]}; expected a finite one, or id 0 "
                "of an unused entry."
            ),
        )
        # distinct numbers, so that unused entries do not look like repeated ids
        ids = np.where(used, ids.astype(np.int64), -1 - columns)
    ordered = np.sort(ids, axis=1)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    _first(repeated, lambda i, j: f"ids: row {start + i}: got id {ordered[i, j]} twice; expected distinct ids.")


def _check_draws(spec: CacheSpec, draws: Array, used: Array, drawn: Array, head_counts: Array) -> None:
    _first(
        ~used & (draws != 0),
        lambda i, j: f"draws: row {i}, column {j}: got {draws[i, j]} draws of an unused entry.",
    )
    heads_first = np.arange(draws.shape[1]) < head_counts[:, None]
    _first(
        drawn & heads_first,
        lambda i, j: f"draws: row {i}, column {j}: got a draw before the last top-k entry; expected draws after.",
    )
    total = draws.sum(1, dtype=np.int64)
    _first(total > spec.draws, lambda i: f"draws: row {i}: got {total[i]} draws; expected at most {spec.draws}.")


def check_sorted(targets: Targets) -> None:
    """CacheError unless the top-k entries, and the drawn ones, of each row are sorted by falling log-probability."""
    for start in range(0, len(targets.logprobs), BLOCK):
        draws = None if targets.draws is None else targets.draws[start : start + BLOCK]
        _check_sorted_block(start, targets.logprobs[start : start + BLOCK], draws)


def _check_sorted_block(start: int, logprobs: Array, draws: Array | None) -> None:
    rising = logprobs[:, 1:] > logprobs[:, :-1]
    if draws is not None:
        rising &= (draws[:, 1:] > 0) == (draws[:, :-1] > 0)
    _first(
        rising,
        lambda i, j: (
            f"logprobs: row {start + i}, column {j + 1}: got {logprobs[i, j + 1]} after {logprobs[i, j]}; "
            "expected falling log-probabilities."
        ),
    )


def _check_tail(spec: CacheSpec, tail: Array, used_N: Array) -> Array:
    # a row that does not count has no tail: values there would only cost bytes
    tail = np.where((used_N == 0)[:, None], -np.inf, tail)
    bad = np.isnan(tail) | (tail == np.inf)
    _first(bad, lambda i, m: f"tail: row {i}, temperature {m}: got {tail[i, m]}; expected a log-partition.")
    absent = tail == -np.inf
    _first(
        absent.any(1) & ~absent.all(1),
        lambda i: f"tail: row {i}: got {tail[i]}; expected finite values, or -inf at every temperature.",
    )
    highest = np.array([_HIGHEST_TAIL if t != 1.0 else _HIGHEST_LOG_MASS for t in spec.temperatures])
    far = ~absent & ((tail > highest) | (tail < -min(_HIGHEST_TAIL, _HIGHEST_TAIL_CODE * spec.settings.tail_step)))
    _first(
        far,
        lambda i, m: (
            f"tail: row {i}, temperature {m}: got {tail[i, m]}; no teacher has such a tail (at T=1 it is "
            "the log of a probability)."
        ),
    )
    return tail.astype(np.float32)


def _check_outcomes(
    spec: CacheSpec, outcomes: Any, tail: Array, used_N: Array, head_counts: Array, draw_counts: Array
) -> Array:
    rest = spec.vocab_size - head_counts
    array = rest if outcomes is None else _array("outcomes", outcomes, "iu", None)
    if array.shape not in ((), rest.shape):
        raise CacheError(f"outcomes: got shape {array.shape}; expected one integer, or one per row.")
    array = np.where(used_N == 0, rest, np.broadcast_to(array, rest.shape)).astype(np.int64)
    _first(
        (array < draw_counts) | (array > rest),
        lambda i: (
            f"outcomes: row {i}: got {array[i]}; expected {draw_counts[i]} (the drawn entries) to {rest[i]} (the "
            "vocabulary outside the top-k entries)."
        ),
    )
    _first(
        (array == 0) & (tail[:, 0] > -np.inf),
        lambda i: f"outcomes: row {i}: got 0 with a tail of {tail[i, 0]} nats; expected at least 1.",
    )
    return array
