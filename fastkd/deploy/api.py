"""`fastkd.deploy.export` and `deploy_report`: a student as files of another runtime, and what that cost."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache, open_cache
from ..data.examples import Examples, as_examples
from ..errors import ExportError, ReportError
from ..models.module import parameters_and_bytes
from ..models.tokenizers import load_tokenizer
from ..report.render import to_html
from ..settings import DeploySettings, ExportSettings
from ..settings_changes import DeployChanges, ExportChanges
from ..stream.split import open_split
from ..utils.atomic import check_place, write_text
from ..utils.output_guard import check_file
from ..utils.packages import PAGES, check_packages
from ..utils.progress import Mode, is_shown
from .calibration import Calibration
from .exported import Exported, read_exported, write_exported
from .formats import check_quantize, find
from .measure import TURNS, Subject, measure, prompt
from .model import Deployable, find_student, load_deployable, source_json, weights_sha256
from .page import page_of
from .quality import Judge, Quality, load_quality, save_quality
from .result import DeployReport, DeployRow, ExportReport

DEFAULTS = ExportSettings()
REPORT_DEFAULTS = DeploySettings()
PAGE = "deploy-report.html"
_Settings = TypeVar("_Settings", bound=DeploySettings)


def export(
    student: Any,
    to: str,
    out: str | Path,
    settings: ExportSettings = DEFAULTS,
    *,
    cache: Any = None,
    data: Examples | None = None,
    progress: Mode = "none",
    **changes: Unpack[ExportChanges],
) -> ExportReport:
    """Write a trained student as files of another runtime, and evaluate them there if a cache is given.

    student: the folder RUN/student; or trained:module:factory@RUN/student, for a module whose run does not know what
        made it; or a module.
    to: a format (see `formats`). out: a new folder, which is there whole or not at all.
    cache: a `Cache`, or what `open_cache` takes. Formats choose scales of activations by its training split; the export
        is evaluated on its held-out split, in the format's runtime, beside the student in PyTorch.
    data: of a classifier, `Examples` (labelled, and those of the cache if there is one).
    settings, changes: an `ExportSettings`, and other values of its fields: `export(..., quantize="int8")`.
    An export that costs more than `at_most` is kept, and its report has status 1.
    Raises ExportError, and the errors of caches and models, before anything is written.
    """
    begun = time.perf_counter()
    settings = _changed(settings, changes)
    out = Path(out)
    found = find(to)
    check_quantize(to, found, settings.quantize)
    if out.exists():
        raise ExportError(f"out: got {out}, which exists; expected a new folder. Delete it, or choose another.")
    check_place(out, "out", ExportError)
    _check_settings(settings, cache)
    data = as_examples(data)
    opened = _opened(cache, data, settings)
    model = _loaded(student, data, settings)
    _check_cache(model, opened, settings)
    found.check(model, settings.quantize)
    calibration = None if opened is None else Calibration(opened, data)
    exported, notes = write_exported(model, out, to, found, settings.quantize, calibration)
    seconds, quality, name = time.perf_counter() - begun, None, ""
    if opened is not None:
        judge = Judge(model, opened, data, settings, progress=is_shown(progress))
        size = student_bytes(model)
        del model
        quality, name = _judged(judge, exported, settings)
    else:
        size = student_bytes(model)
    return ExportReport(
        str(out), to, settings.quantize, exported.bytes, size, seconds, name, quality, settings.at_most, notes
    )


def deploy_report(
    student: Any,
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    settings: DeploySettings = REPORT_DEFAULTS,
    *,
    cache: Any = None,
    data: Examples | None = None,
    turns: int = TURNS,
    command: str = "",
    progress: Mode = "none",
    **changes: Unpack[DeployChanges],
) -> DeployReport:
    """Compare exports of a student with it in PyTorch, and write a page: size, latency, memory, and quality.

    student, data: as of `export`. folders: that `export` wrote. out: the page; None: deploy-report.html beside the
        first folder.
    cache: evaluate all of them on its held-out split; None: show what `export` has evaluated.
    turns: that latencies are medians over. command: how to make this page again.
    The report has status 1 if an export costs more than `at_most`. Raises ExportError and ReportError.
    """
    settings = _changed(settings, changes)
    if not folders:
        raise ExportError("folders: got none; expected the folder of at least one export.")
    page = Path(out) if out is not None else Path(folders[0]).parent / PAGE
    check_file(page, "out", ExportError)
    check_packages(PAGES, "report", "The page", ReportError)
    _check_settings(settings, cache, stored=True)
    data = as_examples(data)
    opened = _opened(cache, data, settings)
    exports = [read_exported(folder) for folder in folders]
    for one in exports:
        find(one.to)  # its packages are there
    stored = {} if opened is not None else {str(one.folder): load_quality(one.folder) for one in exports}
    if settings.at_most is not None and opened is None and (lack := [f for f, q in stored.items() if q is None]):
        raise ExportError(f"at_most: got {settings.at_most:g}, but {lack[0]} has not been evaluated. Give a cache.")
    model = None
    if opened is None and isinstance(student, (str, Path)) and exports[0].kind == "text":
        # only its name and the hash of its weights are used
        folder, factory = find_student(str(student))
        source = {"student": str(folder.resolve()), "sha256": weights_sha256(folder)}
        vocab_size = exports[0].vocab_size if factory is None else 1
        subject, size = Subject("text", vocab_size, exports[0].max_positions, folder, factory), weights_bytes(folder)
    else:
        model = _loaded(student, data, settings)
        source, subject, size = source_json(model), Subject.of(model), student_bytes(model)
    for one in exports:
        one.check_source(source, subject.factory)
    if model is not None:
        _check_cache(model, opened, settings)
    threads = settings.threads or torch.get_num_threads()
    measured = measure(subject, exports, threads, turns=turns)
    if opened is None or model is None:
        qualities = [stored[str(one.folder)] for one in exports]
        first = next((quality.student for quality in qualities if quality is not None), None)
    else:
        judge = Judge(model, opened, data, settings, progress=is_shown(progress))
        qualities, first = [_judged(judge, one, settings)[0] for one in exports], judge.student
    itself = None if first is None else Quality(first, first)
    rows = [DeployRow("PyTorch", source["student"], size, 1.0, measured[0], itself)]
    rows += [
        DeployRow(
            name, str(one.folder), one.bytes, one.bytes / size, latency, quality,
            quality is not None and quality.above(settings.at_most),
        )
        for name, one, latency, quality in zip(_names(exports), exports, measured[1:], qualities, strict=True)
    ]  # fmt: skip
    report = DeployReport(
        source["student"], str(page), rows, 0 if subject.kind == "examples" else len(prompt(subject)), threads, turns,
        settings.at_most, [f"{row.name} was not evaluated: give a cache." for row in rows[1:] if row.quality is None],
    )  # fmt: skip
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, to_html(page_of(report, command)), sync=False)
    return report


def student_bytes(model: Deployable) -> int:
    """Bytes of a student's weights as they are on disk; of a module that was given, in memory."""
    return parameters_and_bytes(model.model)[1] if model.folder is None else weights_bytes(model.folder)


def weights_bytes(folder: Path) -> int:
    """Bytes of the files of weights in a student's folder."""
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def _changed(settings: _Settings, changes: Mapping[str, Any]) -> _Settings:
    known = {field.name for field in fields(settings)}
    if unknown := sorted(changes.keys() - known):
        raise ExportError(f"settings: got {unknown[0]!r}; expected some of {', '.join(sorted(known))}.")
    return replace(settings, **changes)


def _check_settings(settings: DeploySettings, cache: Any, *, stored: bool = False) -> None:
    if settings.at_most is not None and not (math.isfinite(settings.at_most) and settings.at_most >= 0):
        raise ExportError(f"at_most: got {settings.at_most!r}; expected a number of nats from 0 on.")
    for name, value in (("threads", settings.threads), ("positions", settings.positions)):
        if value is not None and value < 1:
            raise ExportError(f"{name}: got {value!r}; expected an integer from 1 on.")
    for name in ("positions",) if stored else ("at_most", "positions"):
        if (given := getattr(settings, name)) is not None and cache is None:
            raise ExportError(f"{name}: got {given!r} without a cache; expected one, to evaluate on.")


def _opened(cache: Any, data: Examples | None, settings: DeploySettings) -> Cache | None:
    if cache is None:
        return None
    opened = cache if isinstance(cache, Cache) else open_cache(cache)
    if "tokens" not in opened.spec.inputs and data is None:
        raise ExportError(f"{opened!r}: got a cache of examples without data; expected its labelled Examples.")
    open_split(opened, "held_out", max_positions=settings.positions, limit="positions")  # before anything is written
    return opened


def _loaded(student: Any, data: Examples | None, settings: DeploySettings) -> Deployable:
    examples: Tensor | None = None
    if data is not None:
        numbers = np.arange(min(2, len(data)))
        examples = data.read(numbers, data.seeds(numbers, np.zeros_like(numbers)))
    return load_deployable(student, examples=examples, trust_remote_code=settings.trust_remote_code)


def _check_cache(model: Deployable, cache: Cache | None, settings: DeploySettings) -> None:
    """ExportError for a cache of another kind, vocabulary or tokenizer."""
    if cache is None:
        return
    spec = cache.spec
    if ("tokens" in spec.inputs) != (model.kind == "text"):
        raise ExportError(f"{cache!r}: got a cache of another kind of inputs; expected {model.kind}.")
    if model.vocab_size < spec.vocab_size:
        raise ExportError(
            f"{cache!r}: got a cache of {spec.vocab_size} outcomes; expected at most {model.vocab_size}, those of "
            f"{model.name}. Give the cache that the student was trained from."
        )
    known = spec.provenance.tokenizer and spec.provenance.tokenizer.sha256
    if model.tokenizer is None or not known or settings.allow_other_tokenizer:
        return
    own = load_tokenizer(model.tokenizer, trust_remote_code=settings.trust_remote_code)
    if own.identity != known:
        raise ExportError(
            f"{cache!r}: got a cache with the tokenizer of sha256 {known[:12]}…; expected the student's ({own.name}, "
            f"{own.identity[:12]}…). Give the cache that the student was trained from, or use allow_other_tokenizer if "
            "both give the same ids."
        )


def _judged(judge: Judge, exported: Exported, settings: DeploySettings) -> tuple[Quality, str]:
    """Evaluate an export, and keep the result in its folder. Returns the name of its runtime as well."""
    runtime = exported.runtime(settings.threads or torch.get_num_threads())
    try:
        found = judge.quality(runtime)
    finally:
        runtime.close()
    save_quality(exported.folder, found)
    return found, runtime.name


def _names(exports: Sequence[Exported]) -> list[str]:
    """Names that tell them apart: "onnx int8", and the folder's where two are alike."""
    names = [one.name for one in exports]
    return [f"{one.name}, {one.folder.name}" if names.count(one.name) > 1 else one.name for one in exports]
