"""The demo's own sections of the report: completions, cost, limits, trust, and the commands that do it by hand."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ..report.page import Code, Paragraph, Section
from ..report.runs import Run, in_lines
from ..report.sections.cost import cost_section as cost
from ..settings import CaptureSettings, ModelSettings, TrainSettings


def cost_section(run: Run, *, positions: int, overhead: dict[str, float]) -> Section:
    """Cumulative seconds with and without a cache. positions: in the cache. overhead: seconds a position of the teacher
    alone ("bare") and of a capture."""
    cached = sum(run.logged("seconds")[1])
    trained = sum(run.logged("positions")[1])
    return cost(
        capture=positions * overhead["capture"],
        cached=cached,
        live=cached + trained * overhead["bare"],
        note=(
            f"Measured here: {1 / overhead['bare']:,.0f} positions a second of the bare teacher, "
            f"{1 / overhead['capture']:,.0f} of a capture, and the steps of {run.name}. With the teacher live a "
            f"student takes the teacher's forward besides, on the {trained:,.0f} positions of its steps; the dense "
            "divergence that it could then take is not counted. Evaluations are the same for both, and left out."
        ),
    )


def trust_section(flipped: str, named: Sequence[str]) -> Section:
    """What was flipped, and what verify said."""
    says = f"In a copy of the cache, {flipped} was changed by one bit. `fastkd verify` names the shard:"
    return Section("Trust", [Paragraph(says), Code("\n".join(named))])


def by_hand(commands: Sequence[Sequence[str]]) -> Section:
    """The same without the demo."""
    says = "What the demo did, as commands; its student is the teacher's folder with layers removed."
    return Section("By hand", [Paragraph(says), Code("\n".join(in_lines(list(command)) for command in commands))])


def capture_command(teacher: Path, data: Path, cache: Path, how: ModelSettings, asked: CaptureSettings) -> list[str]:
    """`fastkd capture` as the demo calls it."""
    places = ["--teacher", str(teacher), "--data", str(data), "--out", str(cache)]
    return ["fastkd", "capture", *places, *options(how), *options(asked)]


def train_command(student: Path, cache: Path, out: Path, settings: TrainSettings, *, control: bool) -> list[str]:
    """`fastkd train` as the demo calls it."""
    places = ["--student", str(student), "--cache", str(cache), "--out", str(out)]
    return ["fastkd", "train", *places, *["--control"] * control, *options(settings)]


def options(settings: Any) -> list[str]:
    """The options that are not what they are by default."""
    found: list[str] = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != _default(field):
            found += [f"--{field.name.replace('_', '-')}", str(value)]
    return found


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default
