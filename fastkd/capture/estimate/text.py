"""An estimate as text for 80 columns. Imports nothing heavy."""

from typing import TYPE_CHECKING

from ...utils.numbers import duration, size_text
from ...utils.text import format_table, labelled, printable, without_credentials

if TYPE_CHECKING:
    from .estimate import Estimate

_MAX_ARRAYS = 5
_NOTES = {"held_out": "held out", "long": "longer than the context", "skipped": "empty, left out"}
_METHODS = ("PUT", "GET", "LIST")


def estimate_text(report: "Estimate") -> str:
    """The estimate, for a person."""
    sections = [_header(report), _plan(report), _costs(report)]
    if report.by_k:
        rows = [["  k", "bytes/position", "all shards", "mass"]]
        for cost in report.by_k:
            mark = "*" if cost.k == report.settings["k"] else " "
            each = f"{cost.bytes_per_position:.1f}"
            rows.append([f"{mark} {cost.k}", each, size_text(cost.bytes), f"{cost.mass:.3f}"])
        sections.append(["Other k, on the sample (mass: probability of the top-k entries)", *format_table(rows)])
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


def _costs(report: "Estimate") -> list[str]:
    arrays = [f"{name} {size:.1f}" for name, size in report.by_array.items() if size >= 0.05][:_MAX_ARRAYS]
    each = f"{report.bytes_per_position:.1f} bytes a position" + (f" ({', '.join(arrays)})" if arrays else "")
    rate, seconds = report.positions_per_second, report.seconds_per_position
    speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    whole = duration(report.hours * 3600)
    if report.workers > 1:
        whole += f" with {report.workers:,} workers, {duration(report.worker_hours * 3600)} of work"
    lines = [
        "Capture",
        *labelled("  size", f"{size_text(report.bytes)}, {each}"),
        *labelled(
            "  speed",
            f"{speed} positions/s a worker; a position takes {_micro(seconds['run'])} for teacher and top-k, "
            f"{_micro(seconds['encode'])} for encoding on a core",
        ),
        *labelled("  time", whole),
    ]
    if report.cost is not None:
        lines += labelled("  cost", f"{report.cost:,.2f}, at {report.price_per_hour:g} an hour")
    for name, label in (("capture", "  requests"), ("epoch", "  an epoch's")):
        lines += labelled(label, ", ".join(f"{report.requests[name][method]:,} {method}" for method in _METHODS))
    return lines


def _micro(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
