"""The report of `estimate.py` as text for 80 columns. Imports nothing heavy."""

from typing import TYPE_CHECKING

from ...utils.progress import duration
from ...utils.text import labelled, printable, size_text, without_credentials

if TYPE_CHECKING:
    from .choices import Choice
    from .estimate import Estimate

_MOST_ARRAYS = 5


def estimate_text(report: "Estimate") -> str:
    """What a capture will take, for a person."""
    lines = [
        "fastkd plan",
        *labelled("  teacher", without_credentials(report.teacher)),
        *labelled("  device", report.device),
        *labelled("  settings", _settings(report)),
        *labelled("  measured", _measured(report)),
        "",
        *_data(report),
        "",
        *_bytes(report),
        "",
        *_requests(report),
        "",
        *_time(report),
        "",
        *_memory(report),
        "",
        *_scales(report),
    ]
    if report.choices:
        lines += ["", *_choices(report)]
    return "\n".join(printable(line).rstrip() for line in lines)


def _settings(report: "Estimate") -> str:
    settings = report.settings
    text = f"k = {settings['k']}" + (f" up to a mass of {settings['mass']:g}" if settings["mass"] else "")
    text += (
        f", {settings['draws']} draws at T = {settings['draw_temperature']:g}" if settings["draws"] else ", no draws"
    )
    codec = settings["codec"] if isinstance(settings["codec"], str) else "custom"
    text += f", codec {codec}, context {settings['context']:,}, {settings['packing']}"
    return f"{text}, batches of {settings['batch_tokens']:,} tokens"


def _measured(report: "Estimate") -> str:
    found = report.measured
    text = f"{found['batches']:,} batches of shards {', '.join(map(str, found['shards']))}: {found['positions']:,} "
    text += f"positions in {found['seconds']:.3g} s"
    if found["batches"] == 1 and found["seconds_spent"] > found["seconds_asked"]:
        text += (
            f"; in all {found['seconds_spent']:.3g} s, where {found['seconds_asked']:g} were asked for: a batch is the "
            "least that is run (--batch-tokens makes it smaller)"
        )
    if found["batches_halved"]:
        text += f"; {found['batches_halved']:,} of the batches did not fit into memory and were halved"
    return text


def _data(report: "Estimate") -> list[str]:
    plan = report.plan
    documents = f"{plan['documents']:,}"
    notes = [f"{plan[name]:,} {text}" for name, text in _NOTES.items() if plan[name]]
    documents += f" ({', '.join(notes)})" if notes else ""
    tokens = f"{plan['tokens']:,}" + (f"; {plan['dropped_tokens']:,} are cut off" if plan["dropped_tokens"] else "")
    return [
        "Plan",
        *(labelled("  data", report.understood[0]) if report.understood else ()),
        *labelled("  documents", documents),
        *labelled("  tokens", tokens),
        *labelled("  positions", f"{plan['positions']:,}, in {plan['windows']:,} windows"),
        *labelled("  shards", f"{plan['shards']:,} of up to {report.settings['shard_positions']:,} positions"),
    ]


_NOTES = {"held_out": "held out", "long": "longer than the context", "skipped": "empty, left out"}


def _bytes(report: "Estimate") -> list[str]:
    shown = [item for item in report.by_array.items() if item[1] >= 0.05]
    arrays = [f"{name} {size:.1f}" for name, size in shown[:_MOST_ARRAYS]]
    each = f"{report.bytes_per_position:.1f}" + (f" ({', '.join(arrays)})" if arrays else "")
    return [
        "Bytes",
        *labelled("  a position", each),
        *labelled("  all shards", f"{size_text(report.bytes)}; other objects {size_text(report.other_bytes)}"),
        *labelled(
            "  once a shard",
            f"{size_text(report.once_a_shard)} of that, for the order of its vocabulary and its headers: the slice has "
            "as much, and here all positions of a shard share it",
        ),
    ]


def _requests(report: "Estimate") -> list[str]:
    labels = {"capture": "capture, sealed", "seal": "sealing alone", "epoch": "an epoch of reading"}
    lines = [f"{'Requests':<24}{'PUT':>12}{'GET':>12}{'LIST':>12}"]
    for name, label in labels.items():
        count = report.requests[name]
        lines.append(f"  {label:<22}{count['PUT']:>12,}{count['GET']:>12,}{count['LIST']:>12,}")
    return [*lines, *labelled("  objects", f"{report.objects:,}")]


def _time(report: "Estimate") -> list[str]:
    speed = f"{_rate(report.positions_per_second)} positions/s a worker"
    if report.low is not None and report.high is not None:
        speed += f", {_rate(report.low)} to {_rate(report.high)} (two standard errors, from batch to batch)"
    speed += f"; teacher and top-k of single batches {_rate(report.slowest_batch)} to {_rate(report.fastest_batch)}"
    parts = report.seconds_per_position
    each = f"teacher to host {_micro(parts['run'])}"
    each += f", of which head and top-k {_micro(parts['topk'])}" if parts["topk"] is not None else ""
    each += f"; encoding, on a core, {_micro(parts['encode'])}"
    whole = duration(report.hours * 3600)
    if report.hours_low is not None and report.hours_high is not None:
        whole += f" ({duration(report.hours_low * 3600)} to {duration(report.hours_high * 3600)})"
    if report.workers > 1:
        whole += f" with {report.workers:,} workers, {duration(report.worker_hours * 3600)} of work"
    lines = ["Time", *labelled("  speed", speed), *labelled("  a position", each), *labelled("  in all", whole)]
    if report.cost is not None:
        lines += labelled("  cost", f"{report.cost:,.2f}, at {report.price_per_hour:g} an hour")
    return lines


def _memory(report: "Estimate") -> list[str]:
    host = f"{size_text(report.host_bytes)} a worker, beside its teacher and its data (by shapes)"
    lines = ["Memory", *labelled("  host", host)]
    if report.device_bytes is not None:
        lines += labelled("  device", f"{size_text(report.device_bytes)}, with the teacher (measured)")
    return lines


def _scales(report: "Estimate") -> list[str]:
    head = f"{'Other amounts of data':<25}{'bytes':>9}{'objects':>12}{'manifest':>9}{'worker-hours':>13}"
    head += f"{'cost':>11}" if report.cost is not None else ""
    lines = [head]
    for scale in report.scales:
        line = f"  {_count(scale.positions):<23}{size_text(scale.bytes):>9}{scale.objects:>12,}"
        line += f"{size_text(scale.manifest_bytes):>9}{_rate(scale.worker_hours):>13}"
        lines.append(line + (f"{scale.cost:>11,.0f}" if scale.cost is not None else ""))
    decode = report.seconds_per_position["decode"] or 0.0
    cores = [f"{count:,} for {gpus}" for gpus, count in report.readers.items()]
    return [
        *lines,
        *labelled(
            "  readers",
            f"cores that decode what GPUs train on, {report.student_rate:,.0f} positions/s each: {', '.join(cores)} "
            f"(a core decodes {_rate(1 / decode if decode else 0.0)} positions/s of the slice)",
        ),
    ]


def _count(positions: int) -> str:
    return f"{positions // 10**9:,} billion positions"


def _choices(report: "Estimate") -> list[str]:
    head = f"  {'k':>4}{'draws':>6}{'mass':>6}{'B/pos.':>8}{'in all':>9}{'T = 1':>7}{'T = 2':>7}{'top-k':>9}{'time':>9}"
    head += f"{'cost':>11}" if report.cost is not None else ""
    lines = ["Other settings, on the same slice (T: what heads hold of the probability)", head]
    return lines + [_choice(choice) for choice in report.choices]


def _choice(choice: "Choice") -> str:
    mass = "-" if choice.mass is None else f"{choice.mass:g}"
    mass_2 = "-" if choice.mass_2 is None else f"{choice.mass_2:.3f}"
    line = f"{'*' if choice.asked else ' '} {choice.k:>4}{choice.draws:>6}{mass:>6}{choice.bytes_per_position:>8.1f}"
    line += f"{size_text(choice.bytes):>9}{choice.mass_1:>7.3f}{mass_2:>7}{_micro(choice.topk_seconds):>9}"
    line += f"{duration(choice.hours * 3600):>9}"
    return line + (f"{choice.cost:>11,.2f}" if choice.cost is not None else "")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _micro(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
