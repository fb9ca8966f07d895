"""What a capture will take, before it runs: its plan, and a measured sample of it, extrapolated."""

import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..cache import CacheSpec
from ..data.documents import Documents, describe_documents
from ..data.examples import Examples
from ..errors import DataError
from ..settings import CaptureSettings
from ..teachers.protocol import Teacher
from ..utils.numbers import duration, size_text
from ..utils.text import format_table, labelled, printable, without_credentials
from ..utils.words import KINDS, counted, words_of
from .answers import check_limits
from .claims import FIRST_SECONDS, LONGEST_SECONDS
from .feature_places import find_places
from .features.estimate import FeatureCost, estimate_features
from .features.prepare import check_sizes
from .prepare import prepare
from .rows import ShardRows
from .sample import Sample, measure_sizes, run_sample
from .teacher_pass import device_name
from .window_plan import WindowPlan, plan_text

KS = (16, 32, 64, 128)
LOST = 0.05
"""Nats of KL from which on a truncation matters: two seeds of one training of a 30M student differ by 0.01 to 0.05."""
HALF = 0.5
"""Of the probability: a teacher whose 128 most likely tokens hold less is hardly sure of anything."""
_TARGETS = ("head/", "draws/", "tail", "outcomes")  # arrays whose size depends on k
_MAX_ARRAYS = 5
_METHODS = ("PUT", "GET", "LIST")
_PAGE = 1000  # objects in one response to LIST


@dataclass(frozen=True)
class KCost:
    """A capture with another k and otherwise the same settings: bytes of all shards, the mean probability (at T = 1) of
    the top-k entries, and what the entries alone lose of the teacher in nats (`lost_nats`), if that is known."""

    k: int
    bytes: float
    bytes_per_position: float
    mass: float
    kl: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What a capture is estimated to take; made by `estimate`.

    data: number and lengths of the documents, a line each; see `describe_documents`. plan: see `WindowPlan.counts`.
    measured: of the sample: batches, positions, seconds, shards, batches_halved; seconds_requested and seconds_spent
        (warm-up included).
    positions_per_second: of one worker on this device. seconds_per_position: "run" (teacher, top-k and copies to the
        host) and "encode" (on one core).
    bytes: of all shards; bytes_per_position; by_array: bytes a position. requests: PUT, GET and LIST of "capture"
        (sealing included) and an "epoch" of training.
    hours: until all workers are done. worker_hours: of all workers together; cost: of these.
    by_k: size and kept probability for other k. features: of each, beyond `bytes`. kind: of the data; see
    `fastkd.utils.words`.
    """

    teacher: str
    device: str
    settings: dict[str, Any]
    data: list[str]
    plan: dict[str, int]
    measured: dict[str, Any]
    positions_per_second: float
    seconds_per_position: dict[str, float]
    bytes: float
    bytes_per_position: float
    by_array: dict[str, float]
    requests: dict[str, dict[str, int]]
    workers: int
    hours: float
    worker_hours: float
    price_per_hour: float | None
    cost: float | None
    by_k: list[KCost]
    features: dict[str, FeatureCost] = field(default_factory=dict)
    kind: str = "text"

    @property
    def nearly_uniform(self) -> bool:
        """Whether the teacher says little beyond that everything is about as likely: not even the largest k of the
        table holds half of the probability, and an even tail loses nothing of the rest."""
        known = [cost for cost in self.by_k if cost.kl is not None]
        return bool(known) and known[-1].mass < HALF and (known[-1].kl or 0.0) <= LOST

    @property
    def recommended(self) -> KCost | None:
        """The smallest k of the table whose entries lose at most LOST nats of the teacher, else the one that loses the
        least; None if that is not known, and for nearly uniform targets."""
        known = [] if self.nearly_uniform else [cost for cost in self.by_k if cost.kl is not None]
        enough = [cost for cost in known if cost.kl is not None and cost.kl <= LOST]
        return next(iter(enough or known[-1:]), None)

    def to_json(self) -> dict[str, Any]:
        """The estimate as a JSON object."""
        result = asdict(self)
        result["recommended_k"] = None if self.recommended is None else self.recommended.k
        result["nearly_uniform"] = self.nearly_uniform
        if not self.features:
            del result["features"]
        return result


def estimate(
    teacher: Teacher,
    data: Documents | Examples,
    settings: CaptureSettings,
    *,
    seconds: float = 20.0,
    price_per_hour: float | None = None,
    workers: int = 1,
    min_batches: int = 1,
    progress: bool = False,
) -> Estimate:
    """Estimate what a capture with these settings will take: measure and plan the data, and run a sample.

    seconds: how long to run the sample, approximately, warm-up included. min_batches: batches to run however long they
        take. price_per_hour: of one worker's machine. workers: number of equal workers. progress: bars on stderr.

    Nothing is written. Raises what `capture` would: DataError, TeacherError, CacheError for impossible settings.
    """
    price = 0.0 if price_per_hour is None else price_per_hour
    for name, value, least in (
        ("workers", workers, 1),
        ("min_batches", min_batches, 1),
        ("seconds", seconds, 0),
        ("price_per_hour", price, 0),
    ):
        if not least <= value < math.inf:
            raise DataError(f"{name}: got {value}; expected a number from {least} on.")
    check_limits(teacher, settings)
    places = find_places(teacher, data, settings.features)
    plan, spec = prepare(teacher, data, settings, progress=progress)
    check_sizes(places, plan)
    most = min(spec.vocab_size, getattr(teacher, "max_k", spec.vocab_size))
    begun = time.perf_counter()
    sample = run_sample(
        teacher,
        data,
        plan,
        settings,
        ks=sorted({settings.k, *(k for k in KS if k <= most)}),
        seconds=seconds,
        min_batches=min_batches,
        places=places,
        progress=progress,
    )
    eligible = sample.stored / sample.positions
    features, encode = estimate_features(teacher, data, plan, spec, settings, places, sample.states, eligible)
    spent = time.perf_counter() - begun
    shard_rows = np.diff(plan.shard_rows)
    context = plan.settings.context if plan.settings.packing == "pack" else None
    sizes = measure_sizes(spec, sample.captured, float(shard_rows.mean()), context)
    by_array = sizes.of(shard_rows)
    size, positions = sum(by_array.values()), plan.totals["positions"]
    run = sample.seconds / sample.positions
    encode += sizes.seconds
    each = position_seconds(run, encode, teacher.device)
    hours = capture_hours(plan, workers, each)
    return Estimate(
        teacher=without_credentials(teacher.fingerprint),
        device=device_name(teacher.device),
        settings={
            **{name: value for name, value in asdict(settings).items() if places or not name.startswith("feature")},
            "context": plan.settings.context,
            "shard_positions": plan.settings.shard_positions,
        },
        data=describe_documents(data, plan.lengths) if isinstance(data, Documents) else [],
        plan=plan.counts(text=isinstance(data, Documents)),
        measured={
            "batches": sample.batches,
            "positions": sample.positions,
            "seconds": sample.seconds,
            "shards": sample.shards,
            "batches_halved": sample.halved,
            "seconds_requested": seconds,
            "seconds_spent": spent,
        },
        positions_per_second=1 / each,
        seconds_per_position={"run": run, "encode": encode},
        bytes=size,
        bytes_per_position=size / positions,
        by_array={name: n / positions for name, n in sorted(by_array.items(), key=lambda item: -item[1])},
        requests=requests(plan.shards, workers, hours, len(places)),
        workers=workers,
        hours=hours,
        worker_hours=hours * workers,
        price_per_hour=price_per_hour,
        cost=None if price_per_hour is None else price * workers * hours,
        by_k=_k_table(spec, settings.k, sample, by_array, plan),
        features=features,
        kind=words_of(spec.inputs).kind,
    )


def position_seconds(run: float, encode: float, device: torch.device) -> float:
    """Seconds a position, from those of the teacher with its top-k and those of encoding: a GPU runs while the host
    encodes; a CPU does both, encoding on all cores."""
    return max(run, encode) if device.type == "cuda" else run + encode / torch.get_num_threads()


def capture_hours(plan: WindowPlan, workers: int, seconds: float) -> float:
    """Hours until all workers are done, from one worker's seconds a position. Shards are not divided, so in the last
    round some workers may have none."""
    rounds = math.ceil(plan.shards / workers)
    return seconds * plan.totals["positions"] * rounds / plan.shards / 3600


def requests(shards: int, workers: int = 1, hours: float = 0.0, features: int = 0) -> dict[str, dict[str, int]]:
    """Requests of a whole capture, sealing included, and of an epoch of training from the cache.

    hours: of the capture; claims on shards are renewed from time to time. Several workers may need a few more, if two
    of them want the same shard. features: their number; of their GETs, more than there will be.
    """
    pages = max(1, math.ceil(shards / _PAGE))
    # a claim is renewed each time half-way to its end, and for a longer time
    renewals, at = 0, FIRST_SECONDS / 2
    while at < hours * 3600 * workers / shards:
        renewals += 1
        at += (min(at, LONGEST_SECONDS - FIRST_SECONDS) + FIRST_SECONDS) / 2
    # each worker reads plan, lengths, spec (twice) and manifest first, the last two again at its end; and for each
    # shard, before it is run and before it is encoded, whether it was written meanwhile, and whether the cache was
    # sealed. sealing writes the manifest, and reads and lists all shards
    capture = {
        "PUT": 3 + 2 * workers + (2 + renewals) * shards,
        "GET": 7 * workers + 4 * shards + (workers - 1) * shards,
        # each worker first looks for foreign objects
        "LIST": 1 + workers + (2 * workers + 1) * pages + shards,
    }
    # a feature has three objects beside its shards, which are read several times, and each of its shards is looked for
    # twice and bound to the cache's
    capture["PUT"] += features * (shards + 3)
    capture["GET"] += features * (6 * shards + 12 * workers)
    capture["LIST"] += features * (2 * workers + 1) * pages
    return {"capture": capture, "epoch": {"PUT": 0, "GET": (1 + features) * (shards + 2), "LIST": 0}}


def _k_table(spec: CacheSpec, k: int, sample: Sample, by_array: dict[str, float], plan: WindowPlan) -> list[KCost]:
    """The table, by ascending k; empty if no row of the sample has a target. by_array: bytes of all shards with k."""
    mean_shard = plan.totals["positions"] / plan.shards
    bytes_of, mass_of = {}, {}
    for other, rows in sample.by_k.items():
        found = measure_sizes(replace(spec, k=other), [rows], mean_shard).of(np.diff(plan.shard_rows))
        bytes_of[other] = sum(size for name, size in found.items() if name.startswith(_TARGETS))
        mass_of[other] = _mass(rows)
    size, positions = sum(by_array.values()), plan.totals["positions"]
    share = sum(n for name, n in by_array.items() if name.startswith(_TARGETS))
    total = {other: size + share * (n / bytes_of[k] - 1) for other, n in bytes_of.items()}
    return [KCost(other, n, n / positions, mass_of[other], sample.kl.get(other)) for other, n in total.items()]


def _mass(rows: ShardRows) -> float:
    """Mean probability of the top-k entries over the rows with a target."""
    probabilities = np.exp(rows.inputs["logprobs"][rows.counts])
    if "draws" in rows.inputs:
        probabilities = np.where(rows.inputs["draws"][rows.counts] > 0, 0.0, probabilities)
    return float(probabilities.sum(1).mean())


def estimate_text(report: Estimate) -> str:
    """The estimate as text for 80 columns."""
    sections = [_header(report), _costs(report)]
    if report.by_k:
        sections.append(_k_lines(report))
    return "\n\n".join("\n".join(printable(line).rstrip() for line in section) for section in sections)


def _k_lines(report: Estimate) -> list[str]:
    """The table of other k, and which one is recommended and why."""
    words = KINDS[report.kind]
    rows = [["  k", f"bytes/{words.position}", "all shards", "mass", "KL lost"]]
    best = report.recommended
    for cost in report.by_k:
        mark = "*" if cost.k == report.settings["k"] else " "
        lost = "-" if cost.kl is None else f"{cost.kl:.3f}"
        row = [f"{mark} {cost.k}", f"{cost.bytes_per_position:.1f}", size_text(cost.bytes), f"{cost.mass:.3f}", lost]
        rows.append([*row, "<- recommended"] if cost is best else row)
    lines = ["Other k, on the sample (* as asked; mass: probability of the top-k entries;"]
    lines.append("KL lost: nats of divergence from the teacher, with the rest spread evenly)")
    lines += format_table(rows)
    if report.nearly_uniform:
        largest = report.by_k[-1]
        text = f"none. The teacher's targets are nearly uniform: even the {largest.k} most likely {words.outcomes} "
        text += f"hold {largest.mass:.1%} of the probability. Little is lost only because all others are about equally "
        text += "likely, and no k has a student learn much. Is the teacher trained, and for such data?"
        return [*lines, *labelled("  recommended", text)]
    if best is None or best.kl is None:
        return lines
    seeds = f"{LOST:g} nats of the teacher, about what another seed of a training changes"
    some = "the smallest k here whose entries lose at most" if best.kl <= LOST else "no k here loses as little as"
    why = f"{some} {seeds}"
    text = f"k = {best.k}: {why}. {best.bytes_per_position:.1f} bytes {words.one('position')}, "
    text += f"{size_text(best.bytes)} in all"
    asked = next(cost for cost in report.by_k if cost.k == report.settings["k"])
    if asked is not best:
        sign = "less" if best.bytes < asked.bytes else "more"
        text += f", {size_text(abs(asked.bytes - best.bytes))} {sign} than as asked"
    also = "" if report.cost is None else " and its cost"
    text += f"; the time of the teacher{also} does not depend on k."
    if report.settings["draws"]:
        text += f" The {report.settings['draws']} draws stand for the rest: with treatment sampled, a smaller k does."
    elif best.kl > LOST:
        text += " Draws stand for the rest: --draws 16."
    return [*lines, *labelled("  recommended", text)]


def _header(report: Estimate) -> list[str]:
    settings, sample = report.settings, report.measured
    measured = f"{sample['batches']:,} batches of shards {', '.join(map(str, sample['shards']))}: "
    measured += f"{counted(sample['positions'], KINDS[report.kind].position)} in {sample['seconds']:.3g} s"
    if sample["batches"] == 1 and sample["seconds_spent"] > sample["seconds_requested"]:
        measured += f"; {sample['seconds_spent']:.3g} s in all instead of {sample['seconds_requested']:g}: at least one"
        measured += " batch is run (a smaller --batch-tokens makes it shorter)"
    if sample["batches_halved"]:
        measured += f"; {sample['batches_halved']:,} of the batches did not fit into memory and were halved"
    plan = plan_text(report.plan, settings["context"], settings["on_long"], KINDS[report.kind])
    return [
        "fastkd plan",
        *labelled("  teacher", report.teacher),
        *labelled("  device", report.device),
        *(labelled("  data", report.data[0]) if report.data else ()),
        *labelled("  plan", plan.partition(": ")[2]),
        *labelled("  measured", measured),
    ]


def _costs(report: Estimate) -> list[str]:
    arrays = [f"{name} {size:.1f}" for name, size in report.by_array.items() if size >= 0.05][:_MAX_ARRAYS]
    words = KINDS[report.kind]
    one = words.one("position")
    each = f"{report.bytes_per_position:.1f} bytes {one}" + (f" ({', '.join(arrays)})" if arrays else "")
    rate, seconds = report.positions_per_second, report.seconds_per_position
    speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    whole = duration(report.hours * 3600)
    if report.workers > 1:
        whole += f" with {report.workers:,} workers, {duration(report.worker_hours * 3600)} of work"
    lines = ["Capture", *labelled("  size", f"{size_text(report.bytes)}, {each}")]
    for name, feature in report.features.items():
        lines += labelled(f"  feature {name}", feature.text)
    if report.features:
        total = report.bytes + sum(feature.bytes for feature in report.features.values())
        positions = report.plan["positions"]
        lines += labelled("  with features", f"{size_text(total)}, {total / positions:.1f} bytes {one}")
    lines += [
        *labelled(
            "  speed",
            f"{speed} {words.positions}/s a worker; {one} takes {_micro(seconds['run'])} for teacher and top-k, "
            f"{_micro(seconds['encode'])} for encoding on a core",
        ),
        *labelled("  time", whole),
    ]
    if report.cost is not None:
        lines += labelled("  cost", f"{report.cost:,.2f}, at {report.price_per_hour:g} an hour")
    for name, label in (("capture", "  requests"), ("epoch", "  of an epoch")):
        lines += labelled(label, ", ".join(f"{report.requests[name][method]:,} {method}" for method in _METHODS))
    return lines


def _micro(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
