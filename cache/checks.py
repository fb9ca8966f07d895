"""What is refused before anything is written: which argument, which row, what was found, what would be right."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoding.grid import LOWEST
from .encoding.ragged import BLOCK
from .encoding.targets import Targets
from .errors import CacheError
from .shard.container import LARGEST
from .spec import CacheSpec

Array = NDArray[Any]

LONGEST_RECORD = 2**14  # characters: what a shard says of itself has to fit into its last 64 KiB
ROUNDING = 1e-4  # nats by which a log-probability may exceed 0: what float32 arithmetic leaves of log 1
_HIGHEST_TAIL = 1e6  # nats, of a tail's absolute value
# Nats, of a tail at T = 1, which is a probability: more than rounding explains, less than would spoil statistics.
_HIGHEST_LOG_MASS = 8.0
_HIGHEST_TAIL_CODE = 2**30 - 1  # a difference of two is an int32


def check_targets(
    spec: CacheSpec, ids: Any, logprobs: Any, tail: Any, draws: Any = None, outcomes: Any = None
) -> Targets:
    """The targets as the codec takes them. CacheError where they are not what a teacher can have said."""
    ids = _array("ids", ids, "iu", 2)
    n, width = ids.shape
    if not n:
        raise CacheError("ids: found no rows; a shard holds at least one position.")
    if n > spec.shard_positions:
        raise CacheError(f"ids: got {n} rows; a shard of this cache holds {spec.shard_positions} at most.")
    if n * spec.width * 4 > LARGEST:
        most = LARGEST // (4 * spec.width)
        raise CacheError(f"ids: got {n} rows; with {spec.width} places a row a shard holds {most} at most.")
    if width > spec.width:
        raise CacheError(f"ids: got {width} places a row; the cache has k={spec.k} and draws={spec.draws}.")
    logprobs = _array("logprobs", logprobs, "f", 2, like=("ids", ids.shape))
    tail = _array("tail", tail, "f", 2, like=("ids and temperatures", (n, len(spec.temperatures))))
    if draws is None and spec.draws:
        raise CacheError(f"draws: found None; the cache holds up to {spec.draws} drawn entries a row.")
    if draws is not None:
        draws = _array("draws", draws, "iu", 2, like=("ids", ids.shape))
        if not spec.draws and draws.any():
            raise CacheError("draws: found drawn entries; the cache was made with draws=0.")
        # before they are narrowed, which would make small numbers of great ones
        _first(
            (draws < 0) | (draws > spec.draws),
            lambda i, j: f"draws: row {i}, place {j}: got {draws[i, j]}; 0 to {spec.draws} is possible.",
        )
        draws = draws.astype(np.int32) if spec.draws else None
    used_NK = logprobs > -np.inf
    drawn_NK = used_NK & (draws > 0) if draws is not None else np.zeros((n, 0), bool)
    used_N, draw_counts = used_NK.sum(1), drawn_NK.sum(1)
    far = used_NK & (logprobs < LOWEST)
    _first(far, lambda i, j: f"logprobs: row {i}, place {j}: got {logprobs[i, j]}; it is below {LOWEST} nats.")
    logprobs = logprobs.astype(np.float32, copy=False)
    head_counts = used_N - draw_counts
    for start in range(0, n, BLOCK):
        some = slice(start, start + BLOCK)
        _check_rows(spec, start, ids[some], logprobs[some], used_NK[some], used_N[some])
    if spec.draws and draws is not None:
        _check_draws(spec, draws, used_NK, drawn_NK, head_counts)
    _first(head_counts > spec.k, lambda i: f"ids: row {i}: found a head of {head_counts[i]} entries; k is {spec.k}.")
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


def check_inputs(spec: CacheSpec, inputs: Any, positions: int) -> dict[str, Array]:
    """The input columns, each `[positions]`."""
    if not isinstance(inputs, Mapping) or set(inputs) != set(spec.inputs):
        found = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else inputs
        raise CacheError(f"inputs: got {found}; the cache has the columns {', '.join(spec.inputs)}.")
    columns = {name: _array(f"inputs[{name!r}]", inputs[name], "biuf", 1) for name in spec.inputs}
    for name, column in columns.items():
        if len(column) != positions:
            raise CacheError(f"inputs[{name!r}]: got {len(column)} values for {positions} positions.")
    tokens = columns.get("tokens")
    if tokens is not None and (tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= 2**31):
        raise CacheError("inputs['tokens']: got other than token ids; expected integers from 0 to 2^31.")
    return columns


def check_lengths(name: str, lengths: Sequence[int] | Array, positions: int) -> NDArray[np.uint32]:
    """Lengths of consecutive pieces that cover all positions."""
    array = _array(name, lengths, "iu", 1)
    _first(
        (array < 1) | (array > positions),
        lambda i: f"{name}: place {i}: got {array[i]}; 1 to {positions}, all positions of the shard, is possible.",
    )
    if int(array.sum(dtype=np.int64)) != positions:
        raise CacheError(f"{name}: found a sum of {int(array.sum(dtype=np.int64))} for {positions} positions.")
    return array.astype(np.uint32)


def check_number(name: str, value: Any) -> int:
    """A number of a shard or a sequence."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= int(value) < 10**18:
        raise CacheError(f"{name}: got {value!r}; expected an integer from 0 on, below 10^18.")
    return int(value)


def check_record(record: Any) -> dict[str, Any]:
    """What a shard says of how it came about, as JSON gives it back."""
    try:
        text = json.dumps(record, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"record: found what is no JSON ({error}).") from error
    if not isinstance(record, Mapping) or len(text) > LONGEST_RECORD:
        raise CacheError(f"record: got {len(text)} characters of JSON; expected an object of up to {LONGEST_RECORD}.")
    found: dict[str, Any] = json.loads(text)
    return found


def _array(
    name: str, value: Any, kinds: str, ndim: int | None, like: tuple[str, tuple[int, ...]] | None = None
) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise CacheError(f"{name}: found a masked array; a mask has no meaning here. Use `.filled(...)`.")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CacheError(f"{name}: found what is no NumPy array and cannot be made one ({error}).") from error
    wanted = {"iu": "integers", "f": "floating-point numbers"}.get(kinds, "numbers")
    if array.dtype.kind not in kinds and array.size:
        raise CacheError(f"{name}: got {array.dtype}; expected {wanted}.")
    if ndim is not None and array.ndim != ndim:
        raise CacheError(f"{name}: got shape {array.shape}; expected {ndim} dimension{'s' * (ndim > 1)}.")
    if like is not None and array.shape != like[1]:
        raise CacheError(f"{name}: got shape {array.shape}; expected {like[1]}, as {like[0]}.")
    return array


def _first(bad_N: Array, message: Any) -> None:
    """Raise for the first row (or row and place) that is bad."""
    if bad_N.any():
        where = np.unravel_index(int(bad_N.argmax()), bad_N.shape)
        raise CacheError(message(*(int(i) for i in where)))


def _check_rows(spec: CacheSpec, start: int, ids: Array, logprobs: Array, used: Array, used_N: Array) -> None:
    """The entries of a block of rows, the first of which is row `start` of the shard."""
    vocab = spec.vocab_size
    whole = bool(used.all())
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        _first(
            (ids < 0) | (ids >= vocab),
            lambda i, j: f"ids: row {start + i}, place {j}: got {ids[i, j]}; expected 0 to {vocab - 1} (vocab_size).",
        )
    good = logprobs <= ROUNDING
    if not good.all():
        _first(
            ~good,
            lambda i, j: f"logprobs: row {start + i}, place {j}: got {logprobs[i, j]}; expected a log-probability.",
        )
    if not whole:
        places = np.arange(ids.shape[1])
        _first(
            (places < used_N[:, None]) != used,
            lambda i, j: f"logprobs: row {start + i}, place {j}: found -inf inside a head; unused places come last.",
        )
        _first(
            ~used & (ids != 0),
            lambda i, j: (
                f"logprobs: row {start + i}, place {j}: found -inf for id {ids[i, j]}; an entry needs a finite one, "
                "and an unused place has id 0."
            ),
        )
        # unused places must not look like twins of each other
        ids = np.where(used, ids.astype(np.int64), -1 - places)
    ordered = np.sort(ids, axis=1)
    twins = ordered[:, 1:] == ordered[:, :-1]
    _first(twins, lambda i, j: f"ids: row {start + i}: found id {ordered[i, j]} twice; each entry has its own.")


def _check_draws(spec: CacheSpec, draws: Array, used: Array, drawn: Array, head_counts: Array) -> None:
    _first(
        ~used & (draws != 0),
        lambda i, j: f"draws: row {i}, place {j}: got {draws[i, j]} in an unused place.",
    )
    heads_first = np.arange(draws.shape[1]) < head_counts[:, None]
    _first(drawn & heads_first, lambda i, j: f"draws: row {i}, place {j}: found a drawn entry before the head's last.")
    total = draws.sum(1, dtype=np.int64)
    _first(total > spec.draws, lambda i: f"draws: row {i}: got {total[i]} draws; the cache holds {spec.draws} a row.")


def check_sorted(targets: Targets) -> None:
    """Head and drawn entries of each row best first."""
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
            f"logprobs: row {start + i}, place {j + 1}: got {logprobs[i, j + 1]} after {logprobs[i, j]}; "
            "the entries go best first."
        ),
    )


def _check_tail(spec: CacheSpec, tail: Array, used_N: Array) -> Array:
    # a row that does not count has no tail: whatever stands there would only cost bytes
    tail = np.where((used_N == 0)[:, None], -np.inf, tail)
    bad = np.isnan(tail) | (tail == np.inf)
    _first(bad, lambda i, m: f"tail: row {i}, temperature {m}: got {tail[i, m]}; expected a log-partition.")
    absent = tail == -np.inf
    _first(
        absent.any(1) & ~absent.all(1),
        lambda i: f"tail: row {i}: got {tail[i]}; an empty tail is -inf at every temperature.",
    )
    highest = np.array([_HIGHEST_TAIL if t != 1.0 else _HIGHEST_LOG_MASS for t in spec.temperatures])
    far = ~absent & ((tail > highest) | (tail < -min(_HIGHEST_TAIL, _HIGHEST_TAIL_CODE * spec.settings.tail_step)))
    _first(
        far,
        lambda i, m: (
            f"tail: row {i}, temperature {m}: got {tail[i, m]}; no teacher has such a tail (at T=1 it is the "
            "log of a probability)."
        ),
    )
    return tail.astype(np.float32)


def _check_outcomes(
    spec: CacheSpec, outcomes: Any, tail: Array, used_N: Array, head_counts: Array, draw_counts: Array
) -> Array:
    rest = spec.vocab_size - head_counts
    array = rest if outcomes is None else _array("outcomes", outcomes, "iu", None)
    if array.shape not in ((), rest.shape):
        raise CacheError(f"outcomes: got shape {array.shape}; expected one integer, or one a row.")
    array = np.where(used_N == 0, rest, np.broadcast_to(array, rest.shape)).astype(np.int64)
    _first(
        (array < draw_counts) | (array > rest),
        lambda i: (
            f"outcomes: row {i}: got {array[i]}; {draw_counts[i]} (the drawn entries) to {rest[i]} (what is outside "
            "the head) is possible."
        ),
    )
    _first(
        (array == 0) & (tail[:, 0] > -np.inf),
        lambda i: f"outcomes: row {i}: found 0 beside a tail of {tail[i, 0]} nats.",
    )
    return array
