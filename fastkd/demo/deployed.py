"""The demos' last stage: the student as an int8 ONNX model, evaluated and measured in onnxruntime.

OUT/  onnx-int8/ (the export)  deploy.html (its page)  deploy.json (its numbers)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from ..cache import open_cache
from ..data.examples import Examples
from ..deploy.api import deploy_report, export
from ..deploy.formats import find
from ..deploy.model import weights_sha256
from ..deploy.page import ratio_cell
from ..deploy.result import DeployReport
from ..errors import ReportError
from ..models.module import state_sha256
from ..report.page import UNKNOWN, Cell, Column, Paragraph, Row, Section, Table
from ..report.runs import in_lines
from ..utils.atomic import remove_folder
from ..utils.numbers import THIN, figures, prefixed, with_half
from ..utils.packages import PAGES, check_packages
from .artifacts import Json, load_result, save_result
from .stages import Stages

TO: Final = "onnx"
QUANTIZE: Final = "int8"
TURNS = 3
WINDOWS = 8
"""Held-out windows of text on which the export is evaluated."""
FOLDER, PAGE, RESULT = "onnx-int8", "deploy.html", "deploy.json"


def check_installed() -> None:
    """Raise ExportError or ReportError, naming the extra, if packages of the format or of pages are not installed."""
    find(TO)
    check_packages(PAGES, "report", "The demo's page", ReportError)


def deploy_student(
    student: Any, cache: Path, out: Path, stages: Stages, *, data: Examples | None = None, positions: int | None = None
) -> Json:
    """Export a student into a folder of `out`, evaluate and measure it, and write its page; or what an earlier run
    found of the same student. Returns the numbers (`DeployReport.to_json`).

    student: its folder, or a module. positions: of the evaluation, at most.
    """
    folder = out / FOLDER
    with stages.stage("deploy", f"the student as {TO}, {QUANTIZE}: {folder}"):
        sha256 = state_sha256(student) if isinstance(student, nn.Module) else weights_sha256(Path(student))
        inputs = {"sha256": sha256, "cache": open_cache(cache).spec.hash, "positions": positions}
        if folder.exists() and (kept := load_result(out / RESULT, inputs)) is not None:
            stages.log(f"{folder} is reused")
            return kept
        remove_folder(folder)
        how: dict[str, Any] = {"data": data}
        export(student, TO, folder, quantize=QUANTIZE, cache=cache, positions=positions, **how)
        command = "" if data is not None else in_lines(["fastkd", "deploy-report", str(student), str(folder)])
        found: DeployReport = deploy_report(student, [folder], out / PAGE, turns=TURNS, command=command, **how)
        return save_result(out / RESULT, inputs, found.to_json())


def deployed_section(found: Json) -> Section:
    """The student in PyTorch and its export, for the demo's page."""
    kl = found["rows"][0]["quality"]["measure"]
    text = found["prompt"] > 0
    columns = [Column("size", "↓"), Column(f"prefill of {found['prompt']}" if text else "one example", "ms ↓")]
    columns += [Column("decoded token", "ms ↓")] if text else []
    columns += [Column("peak memory", "↓"), Column("KL from teacher", "nats ↓"), Column("cost in KL", "nats ↓"),
                Column("agreement with student", "% ↑")]  # fmt: skip
    rows = []
    for number, row in enumerate(found["rows"]):
        ratios, quality = row["ratios"], row["quality"]
        cells = [ratio_cell(prefixed(row["bytes"], "B"), ratios.get("bytes"))]
        for name in ("prefill", "decode") if text else ("prefill",):
            cells.append(ratio_cell(figures(1000 * row[f"{name}_seconds"]), ratios.get(name)))
        memory = row["memory_bytes"]
        cells.append(UNKNOWN if memory is None else ratio_cell(prefixed(memory, "B"), ratios.get("memory")))
        cells.append(_measure(quality["exported"].get(kl)))
        cells.append(_measure(quality["cost"], sign=True) if number else UNKNOWN)
        cells.append(_measure(quality["exported"].get("student_agreement"), scale=100.0) if number else UNKNOWN)
        rows.append(Row(row["name"], cells, note=row["runtime"]))
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    caption = (
        f"{threads}, batch 1, each in a process of its own, by turns; ratios to PyTorch's. Quality in the export's own "
        f"runtime, over {rows_windows(found):,} held-out windows."
    )
    note = Paragraph(f"{PAGE} has the plots, and how each number was measured.", aside=True)
    return Section("Deployed", [Table("", columns, rows, caption), note])


def rows_windows(found: Json) -> int:
    """Windows that the exports were evaluated on."""
    windows: int = found["rows"][-1]["quality"]["windows"]
    return windows


def deployed_text(found: Json) -> str:
    """The export in a line."""
    row = found["rows"][-1]
    ratios, quality = row["ratios"], row["quality"]
    speed = ratios.get("decode", ratios["prefill"])
    return (
        f"deployed: {row['name']} in {row['runtime']}: {ratios['bytes']:.2f} of the size of PyTorch's, "
        f"{speed:.2f} of its latency;\n  KL to the teacher {quality['cost']['mean']:+.4f} nats, agreement with the "
        f"student in PyTorch {100 * quality['exported']['student_agreement']['mean']:.1f}%"
    )


def _measure(value: Mapping[str, float | None] | None, *, scale: float = 1.0, sign: bool = False) -> Cell:
    if value is None or value["mean"] is None:
        return UNKNOWN
    half = float("inf") if value["high"] is None else value["high"] - value["mean"]
    mean, spread = with_half(value["mean"], half, scale=scale, sign=sign)
    return Cell(mean, f"±{THIN}{spread}" if spread else "")
