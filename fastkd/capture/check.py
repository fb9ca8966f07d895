"""Check a cache against its teacher: run a random sample of its batches again, and compare.

A batch is run as in the capture: the same segments in the same order, halved if it was halved. On the same hardware
only the codec's error remains, which is bounded.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..cache import Cache, CacheError, Workspace
from ..cache.spec import integer
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..data.packing import batches
from ..errors import DataError, TeacherError
from ..settings import CaptureSettings
from ..teachers.protocol import Answer, Hidden, Teacher, TopK
from ..utils.progress import counting
from ..utils.text import format_table, labelled, printable, without_credentials
from ..utils.words import KINDS, counted, words_of
from .compare import Deviations, compare
from .features.check import FeatureCheck, FeatureDifference, feature_checks, read_all
from .prepare import read_window_plan
from .probe import agree_on_probe
from .rows import Ints, ShardRows
from .teacher_pass import TeacherPass, device_name
from .window_plan import WindowPlan

_SHARDS = 8  # shards to spread the sample over, unless it needs more
_EQUAL = 1e-4  # nats of excess up to which two computations count as the same
_MIN_SAME = 0.9  # share of the rows in which the same computation repeats the entries, at least
_LABELS = {"top_k": "top-k entries", "draws": "draws", "tail": "tails"}
_SAME = {True: "the one in the spec", False: "NOT the one in the spec", None: "the spec names none"}
_MAX_PROBLEMS = 12
_KINDS = {"top_k": "a top-k entry is", "draws": "a drawn entry is", "tail": "a tail is"}


@dataclass
class Difference:
    """A summary of the deviations of one kind, in nats.

    compared: how many numbers. largest: the largest distance; bound: what the codec allows there. over: how many
    exceed their bound. excess: by how much, at most.
    """

    compared: int = 0
    largest: float = 0.0
    bound: float = 0.0
    over: int = 0
    excess: float = 0.0

    def add(self, found: Deviations) -> None:
        """Add some deviations."""
        if not len(found.row):
            return
        at = int(found.distance.argmax())
        if not self.compared or found.distance[at] > self.largest:
            self.largest, self.bound = float(found.distance[at]), float(found.bound[at])
        self.compared += len(found.row)
        self.over += int(np.count_nonzero(found.excess))
        self.excess = max(self.excess, float(found.excess.max()))


@dataclass
class TeacherCheck:
    """The result of `check_teacher`; false if there are problems.

    teacher, expected: fingerprints of the teacher and in the spec. seed: of the sample. positions, batches: how many
        were compared. shards: which were sampled, of cache_shards. recorded_batches: whether the capture's batches were
        repeated; else every sequence was a batch.
    differences: by kind: "top_k", "draws" and "tail" (log-probabilities). outcomes: rows with another number of
        outcomes. features: the deviations of each feature.
    same_top_k, same_draws: share of the rows with the same ids; None without them, or if draws cannot be repeated, and
        draws_unknown says why.
    tolerance: nats by which a number may exceed its bound. captured_on, checked_on: devices and torch versions. kind:
        of the data; see `fastkd.utils.words`.
    """

    cache: str
    teacher: str
    expected: str
    seed: int
    cache_shards: int
    tolerance: float
    checked_on: str
    draws_unknown: str
    differences: dict[str, Difference]
    positions: int = 0
    batches: int = 0
    shards: list[int] = field(default_factory=list)
    recorded_batches: bool = True
    outcomes: int = 0
    same_top_k: float | None = None
    same_draws: float | None = None
    captured_on: list[str] = field(default_factory=list)
    features: dict[str, FeatureDifference] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    kind: str = "text"

    @property
    def fingerprint(self) -> bool | None:
        """Whether the fingerprints are equal; None if the spec has none."""
        return self.teacher == self.expected if self.expected else None

    @property
    def ok(self) -> bool:
        """Whether the teacher is the cache's, and no number exceeds its bound by more than the tolerance."""
        return not self.problems

    @property
    def excess(self) -> float:
        """The largest excess of a log-probability over its bound, in nats. 0: the codec explains all differences."""
        return max(d.excess for d in self.differences.values())

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; null for infinite numbers."""
        result = {**asdict(self), "fingerprint": self.fingerprint, "ok": self.ok, "excess": self.excess}
        return {name: _finite(value) for name, value in result.items()}


def check_teacher(
    cache: Cache,
    teacher: Teacher,
    *,
    positions: int = 4096,
    seed: int | None = None,
    data: Examples | None = None,
    tolerance: float | None = None,
    progress: bool = False,
) -> TeacherCheck:
    """Run the teacher on a random sample of a cache's batches, and compare its answers with what is stored; and its
    states, with the features.

    positions: how many to compare, at least; batches are run whole. seed: of the sample; None: random. data: the
        examples of a cache of examples. progress: a bar on stderr.
    tolerance: nats by which a number may exceed the codec's bound, as another device or torch version rounds
        differently. None: 64 units in the last place of the teacher's dtype (0.5 for bfloat16, 0.06 for float16), and
        at least 0.01.

    Raises TeacherError if the teacher cannot have made the cache, or fails; CacheError if the cache holds no inputs for
    a teacher; DataError without the examples; CorruptShard for a damaged shard.
    """
    spec, shards = cache.spec, cache.shards
    agree_on_probe(teacher, cache.store, write=False)
    _check_fits(cache, shards, teacher, data)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise CacheError(f"tolerance: got {tolerance}; expected a number of nats, from 0 on.")
    if positions < 1:
        raise CacheError(f"positions: got {positions}; expected at least one.")
    seed = secrets.randbelow(2**31) if seed is None else integer("seed", seed, 0)
    plan, draw_seed, unknown = None, 0, "" if spec.draws else "the cache has no draws"
    if spec.draws:
        try:
            plan, draw_seed = read_window_plan(cache.store, spec)
        except DataError as error:
            unknown = str(error)
    features = feature_checks(cache, teacher, data)
    kinds = {"top_k": spec.k, "draws": spec.draws, "tail": 1}
    report = TeacherCheck(
        cache=cache.store.describe(),
        teacher=without_credentials(teacher.fingerprint),
        expected=spec.teacher,
        seed=seed,
        cache_shards=len(shards),
        tolerance=0.01 if tolerance is None else tolerance,
        checked_on=f"{device_name(teacher.device)}, torch {torch.__version__}",
        draws_unknown=unknown,
        differences={kind: Difference() for kind, used in kinds.items() if used},
        features={check.place.name: check.difference for check in features},
        kind=words_of(spec.inputs).kind,
    )

    def on_answer(answer: Answer) -> None:
        if tolerance is None and not isinstance(answer, TopK):
            dtype = answer.states.dtype if isinstance(answer, Hidden) else answer.values.dtype
            report.tolerance = max(report.tolerance, 64 * torch.finfo(dtype).eps)

    names = ("k", "draws", "draw_temperature", "mass", "temperatures")
    settings = CaptureSettings(**{name: getattr(spec, name) for name in names}, seed=draw_seed)
    teacher_pass = TeacherPass(teacher, settings, on_answer=on_answer)
    random, workspace = np.random.default_rng(seed), Workspace()
    share = positions / min(_SHARDS, len(shards))
    with counting(positions, words_of(spec.inputs).position, "compare", shown=progress) as bar:
        for index in random.permutation(shards).tolist():
            shard = _Shard(cache, index, plan, teacher, workspace)
            report.captured_on = sorted({*report.captured_on, *shard.captured_on})
            report.recorded_batches &= shard.recorded
            report.shards = sorted([*report.shards, index])
            before, here = report.positions, read_all(features, index)
            for number in random.permutation(len(shard.batches)).tolist():
                shard.compare(shard.batches[number], teacher_pass, data, report, here)
                bar.add(min(report.positions, positions) - bar.done)
                if report.positions >= min(positions, before + share):
                    break
            report.problems += shard.problems(report.tolerance)
            if report.positions >= positions:
                break
    report.problems += [problem for check in features if (problem := check.problem())]
    _finish(report)
    return report


class _Shard:
    """A shard of the cache with its batches as they were captured; without a record of them, every sequence is one."""

    def __init__(
        self, cache: Cache, index: int, plan: WindowPlan | None, teacher: Teacher, workspace: Workspace
    ) -> None:
        self.spec, self.index = cache.spec, index
        self.arrays = arrays = cache.read_shard(index, into=workspace)
        record = cache.attributes(index).get("record") or {}
        lengths = arrays.get("document_lengths", arrays["sequence_lengths"])
        recorded = None
        if isinstance(record, dict) and "document_lengths" in arrays:
            recorded = _recorded_batches(lengths.astype(np.int64), record)
        self.recorded = recorded is not None
        self.captured_on = {f"{record.get('device')}, torch {record.get('torch')}"} if recorded else set()
        if recorded is None:
            lengths = arrays["sequence_lengths"]
            recorded = [[np.array([i])] for i in range(len(lengths))]
        self.batches = recorded
        document, start = np.full(len(lengths), -1, np.int64), np.zeros(len(lengths), np.int64)
        if plan is not None and self.recorded and index < plan.shards:
            planned = plan.shard(index)
            if np.array_equal(planned.stop - planned.start, lengths):
                document, start = planned.document, planned.start
        self.rows = ShardRows(
            inputs={name: arrays[name] for name in self.spec.inputs},
            counts=arrays["logprobs"][:, 0] > -np.inf,
            sequence_lengths=arrays["sequence_lengths"],
            document_lengths=lengths,
            document=document,
            start=start,
            first_sequence=int(arrays["first_sequence"]),
        )
        _check_inputs(self.rows, index, teacher)
        self._outcomes = 0  # rows with another number of outcomes
        self._worst = (0.0, "")  # the largest excess, and a description

    def compare(
        self,
        parts: list[Ints],
        teacher_pass: TeacherPass,
        data: Examples | None,
        report: TeacherCheck,
        features: list[FeatureCheck],
    ) -> None:
        """Run the teacher on the parts of a batch, and compare."""
        segments = np.concatenate(parts)
        some = self.rows.select(segments)
        of_shard = self.rows.rows_of(segments)[0]
        rows = of_shard[some.counts]
        if not len(rows):
            return
        again = np.split(np.arange(len(segments)), np.cumsum([len(part) for part in parts])[:-1])
        states = [check.collector(some, of_shard) for check in features]
        data = None if "tokens" in some.inputs else data
        now, _ = teacher_pass.run(some, again, data, self.index, collectors=states)
        for check, found_states in zip(features, states, strict=True):
            check.compare(found_states, of_shard)
        stored = {name: self.arrays[name][rows] for name in now}
        found = compare(self.spec, stored, {name: array[some.counts] for name, array in now.items()})
        report.batches += len(parts)
        report.positions += len(rows)
        self._outcomes += int(np.count_nonzero(~found.outcomes))
        report.outcomes += int(np.count_nonzero(~found.outcomes))
        if self.spec.k:
            report.same_top_k = (report.same_top_k or 0.0) + int(found.same_top_k.sum())
        if not report.draws_unknown and (some.document < 0).any():
            report.draws_unknown = f"the record of shard {self.index} does not fit the plan"
        report.same_draws = None if report.draws_unknown else (report.same_draws or 0.0) + int(found.same_draws.sum())
        for kind, deviations in found.deviations.items():
            report.differences[kind].add(deviations)
            if len(deviations.row) and deviations.excess.max() > self._worst[0]:
                at = int(deviations.excess.argmax())
                row = rows[deviations.row[at]]
                name = words_of(self.rows.inputs).document
                documents = self.rows.inputs.get(name)
                document = "" if documents is None else f" ({name} {documents[row]})"
                self._worst = (
                    float(deviations.excess[at]),
                    f"shard {self.index}, row {row}{document}: {_KINDS[kind]} {deviations.distance[at]:.3g} nats from "
                    f"the teacher's; the codec explains {deviations.bound[at]:.2g}",
                )

    def problems(self, tolerance: float) -> list[str]:
        """The problems of this shard."""
        found = []
        if self._worst[0] > tolerance:
            found.append(f"{self._worst[1]}, and the tolerance is {tolerance:.2g}")
        if self._outcomes:
            found.append(
                f"shard {self.index}: {self._outcomes} rows with another number of outcomes than the teacher's"
            )
        return found


def _finish(report: TeacherCheck) -> None:
    """Turn sums into means, and add the problems that are not a shard's."""
    if not report.positions:
        report.problems.append("no position of the sample has a target: nothing was compared")
        return
    for name in ("same_top_k", "same_draws"):
        if (total := getattr(report, name)) is not None:
            setattr(report, name, total / report.positions)
    if report.fingerprint is False:
        another = f"another teacher: got {report.teacher!r}; expected {report.expected!r}, which the spec names"
        report.problems.insert(0, another)
    for same, what in ((report.same_top_k, "top-k entries"), (report.same_draws, "draws")):
        if same is not None and same < _MIN_SAME and report.excess <= _EQUAL:
            report.problems.append(
                f"only {same:.1%} of the rows have the same {what}, although the log-probabilities are the same"
                + (": they were drawn with another seed" if what == "draws" else "")
            )


def _recorded_batches(lengths: Ints, record: dict[str, Any]) -> list[list[Ints]] | None:
    """The segments of the parts of each batch, by a shard's record; None if the record does not fit the segments."""
    batch_tokens, halved = record.get("batch_tokens"), record.get("halved")
    if type(batch_tokens) is not int or batch_tokens < 1 or not isinstance(halved, dict):
        return None
    found = []
    for number, segments in enumerate(batches(lengths, batch_tokens)):
        sizes = halved.get(str(number), [len(segments)])
        if not isinstance(sizes, list) or not all(type(n) is int and n > 0 for n in sizes):
            return None
        if sum(sizes) != len(segments):
            return None
        found.append(np.split(segments, np.cumsum(sizes)[:-1]))
    return found


def _check_fits(cache: Cache, shards: list[int], teacher: Teacher, data: Examples | None) -> None:
    spec, name = cache.spec, cache.store.describe()
    if not shards:
        raise CacheError(f"{name}: the cache has no shards yet; there is nothing to compare.")
    if teacher.vocab_size != spec.vocab_size:
        raise TeacherError(
            f"teacher: got a vocabulary of {teacher.vocab_size}; expected {spec.vocab_size}, that of the cache's "
            f"teacher ({spec.teacher!r}). Nothing was compared."
        )
    if "tokens" in spec.inputs:
        return
    if not set(EXAMPLE_COLUMNS) <= set(spec.inputs):
        raise CacheError(
            f"{name}: got inputs {', '.join(spec.inputs) or 'none'}; expected tokens or examples, to run a teacher on."
        )
    if data is None:
        raise DataError(f"data: got none; {name} is a cache of examples, which it does not contain. Name them.")


def _check_inputs(rows: ShardRows, shard: int, teacher: Teacher) -> None:
    """Errors for inputs that would fail on the device."""
    if "tokens" not in rows.inputs:
        return
    tokens, longest = rows.inputs["tokens"], int(rows.document_lengths.max())
    if len(bad := np.flatnonzero((tokens < 0) | (tokens >= teacher.vocab_size))):
        raise CacheError(
            f"shard {shard}, row {bad[0]}: got token {tokens[bad[0]]}; expected 0 to {teacher.vocab_size - 1}. Delete "
            "the shard and capture again."
        )
    if teacher.max_positions is not None and longest > teacher.max_positions:
        raise TeacherError(
            f"shard {shard}: got a segment of {longest} positions; this teacher takes at most {teacher.max_positions}. "
            "It cannot have made this cache."
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences_lines(title: str, differences: Mapping[str, Difference | FeatureDifference]) -> list[str]:
    """A table of differences by their labels, and an empty line."""
    rows = [[title, "compared", "largest", "its bound", "over bound", "by up to"]]
    for label, d in differences.items():
        row = [f"  {label}", f"{d.compared:,}"]
        if d.compared:
            row += [f"{d.largest:.4f}", f"{d.bound:.4f}", f"{d.over / d.compared:.2%}", f"{d.excess:.2g}"]
        rows.append(row)
    return [*format_table(rows), ""]


def check_text(report: TeacherCheck) -> str:
    """The check as text for 80 columns."""
    batches = "as in the capture" if report.recorded_batches else "one sequence each (the capture's are not recorded)"
    sample = f"{counted(report.positions, KINDS[report.kind].position)} in {report.batches:,} batches of "
    sample += f"{len(report.shards):,} of "
    sample += f"{report.cache_shards:,} shards; seed {report.seed}"
    lines = [
        f"fastkd teacher check  {report.cache}",
        *labelled("  teacher", f"{without_credentials(report.teacher)}: {_SAME[report.fingerprint]}"),
        *labelled("  sample", sample),
        *labelled("  batches", batches),
        *labelled("  captured on", "; ".join(report.captured_on)),
        *labelled("  checked on", report.checked_on),
        "",
    ]
    lines += _differences_lines("Nats", {_LABELS[kind]: d for kind, d in report.differences.items()})
    if report.features:
        lines += _differences_lines("Hidden states, of their rms", report.features)
    lines += labelled("  outcomes", f"{report.outcomes:,} rows differ" if report.outcomes else "equal in all rows")
    if report.same_top_k is not None:
        lines += labelled("  top-k", f"the same ids in {report.same_top_k:.2%} of the rows")
    if report.same_draws is not None:
        lines += labelled("  draws", f"the same ids in {report.same_draws:.2%} of the rows")
    elif "draws" in report.differences:
        lines += labelled("  draws", f"not repeated: {report.draws_unknown}")
    return "\n".join(printable(line) for line in [*lines, "", *_verdict(report)])


def _verdict(report: TeacherCheck) -> list[str]:
    most = max((f.excess for f in report.features.values()), default=0.0)
    if report.ok and not report.excess and most:
        return [f"ok, within the tolerance: states are up to {most:.2g} of their rms beyond the codec's error"]
    if report.ok and not report.excess:
        return ["ok: the cache matches the teacher to within the codec's error"]
    if report.ok:
        return [
            f"ok, within the tolerance: up to {report.excess:.2g} nats beyond the codec's error; tolerance",
            f"{report.tolerance:.2g}. Other hardware or another torch version rounds differently.",
        ]
    lines = []
    for problem in report.problems[:_MAX_PROBLEMS]:
        lines += labelled("problem", without_credentials(problem))
    if (more := len(report.problems) - _MAX_PROBLEMS) > 0:
        lines += labelled("", f"and {more:,} more")
    step = "Use the teacher that the cache was captured from."
    if report.fingerprint is not False:
        step = "Delete the shards named above and capture again with the same settings. If all shards are affected, "
        step += "check what changed since the capture: data, device, torch."
    return [*lines, *labelled("next", step)]
