"""An estimate as text for 80 columns. Imports nothing heavy."""

from typing import TYPE_CHECKING

from ...utils.numbers import duration, size_text
from ...utils.text import format_table, labelled, printable, without_credentials

if TYPE_CHECKING:
    from .estimate import Estimate

_MAX_ARRAYS = 5
_NOTES = {"held_out": "held out", "long": "longer than the context", "skipped": "empty, left out"}
_REQUESTS = {"capture": "capture, sealed", "epoch": "an epoch of training"}


def estimate_text(report: "Estimate") -> str:
    """The estimate, for a person."""
    sections = [_header(report), _plan(report), _size(report), _requests(report), _time(report), _memory(report)]
    if report.by_k:
        sections.append(_by_k(report))
    return "\n\n".join("\n".join(printable(line).rstrip() for line in section) for section in sections)


def _header(report: "Estimate") -> list[str]:
    settings, sample = report.settings, report.measured
    kept = f"k = {settings['k']}" + (f" up to a mass of {settings['mass']:g}" if settings["mass"] else "")
    draws = f"{settings['draws']} draws at T = {settings['draw_temperature']:g}" if settings["draws"] else "no draws"
    codec = settings["codec"] if isinstance(settings["codec"], str) else "custom"
    shape = f"context {settings['context']:,}, {settings['packing']}, batches of {settings['batch_tokens']:,} tokens"
    measured = f"{sample['batches']:,} batches of shards {', '.join(map(str, sample['shards']))}: "
    measured += f"{sample['positions']:,} positions in {sample['seconds']:.3g} s"
    if sample["batches"] == 1 and sample["seconds_spent"] > sample["seconds_requested"]:
        measured += f"; {sample['seconds_spent']:.3g} s in all instead of {sample['seconds_requested']:g}: at least one"
        measured += " batch is run (a smaller --batch-tokens makes it shorter)"
    if sample["batches_halved"]:
        measured += f"; {sample['batches_halved']:,} of the batches did not fit into memory and were halved"
    return [
        "fastkd plan",
        *labelled("  teacher", without_credentials(report.teacher)),
        *labelled("  device", report.device),
        *labelled("  settings", f"{kept}, {draws}, codec {codec}, {shape}"),
        *labelled("  measured", measured),
    ]


def _plan(report: "Estimate") -> list[str]:
    plan = report.plan
    notes = [f"{plan[name]:,} {text}" for name, text in _NOTES.items() if plan[name]]
    truncated = f"; {plan['dropped_tokens']:,} are truncated" if plan["dropped_tokens"] else ""
    return [
        "Plan",
        *(labelled("  data", report.data[0]) if report.data else ()),
        *labelled("  documents", f"{plan['documents']:,}" + (f" ({', '.join(notes)})" if notes else "")),
        *labelled("  tokens", f"{plan['tokens']:,}{truncated}"),
        *labelled("  positions", f"{plan['positions']:,}, in {plan['windows']:,} windows"),
        *labelled("  shards", f"{plan['shards']:,} of up to {report.settings['shard_positions']:,} positions"),
    ]


def _size(report: "Estimate") -> list[str]:
    arrays = [f"{name} {size:.1f}" for name, size in report.by_array.items() if size >= 0.05][:_MAX_ARRAYS]
    each = f"{report.bytes_per_position:.1f} bytes" + (f" ({', '.join(arrays)})" if arrays else "")
    return [
        "Size",
        *labelled("  position", each),
        *labelled("  all shards", f"{size_text(report.bytes)}; other objects {size_text(report.other_bytes)}"),
    ]


def _requests(report: "Estimate") -> list[str]:
    methods = ("PUT", "GET", "LIST")
    rows = [["Requests", *methods]]
    rows += [
        [f"  {label}", *(f"{report.requests[name][method]:,}" for method in methods)]
        for name, label in _REQUESTS.items()
    ]
    return [*format_table(rows), *labelled("  objects", f"{report.objects:,}")]


def _time(report: "Estimate") -> list[str]:
    seconds = report.seconds_per_position
    whole = duration(report.hours * 3600)
    if report.hours_low is not None and report.hours_high is not None:
        whole += f" ({duration(report.hours_low * 3600)} to {duration(report.hours_high * 3600)}: two standard errors)"
    if report.workers > 1:
        whole += f" with {report.workers:,} workers, {duration(report.worker_hours * 3600)} of work"
    lines = [
        "Time",
        *labelled("  speed", f"{_rate(report.positions_per_second)} positions/s a worker"),
        *labelled(
            "  position", f"teacher and top-k {_micro(seconds['run'])}; encoding {_micro(seconds['encode'])} on a core"
        ),
        *labelled("  total", whole),
    ]
    if report.cost is not None:
        lines += labelled("  cost", f"{report.cost:,.2f}, at {report.price_per_hour:g} an hour")
    return lines


def _memory(report: "Estimate") -> list[str]:
    lines = ["Memory", *labelled("  host", f"{size_text(report.host_bytes)} a worker, beside its teacher and data")]
    if report.device_bytes is not None:
        lines += labelled("  device", f"{size_text(report.device_bytes)}, teacher included (measured)")
    return lines


def _by_k(report: "Estimate") -> list[str]:
    rows = [["  k", "bytes/position", "all shards", "mass T=1", "mass T=2"]]
    for cost in report.by_k:
        mark = "*" if cost.k == report.settings["k"] else " "
        masses = ("-" if mass is None else f"{mass:.3f}" for mass in (cost.mass_1, cost.mass_2))
        rows.append([f"{mark} {cost.k}", f"{cost.bytes_per_position:.1f}", size_text(cost.bytes), *masses])
    return ["Other k, on the sample (mass: probability of the top-k entries)", *format_table(rows)]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
