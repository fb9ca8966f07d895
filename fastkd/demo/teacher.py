"""The teacher's part of the language demo: it fills the cache, is timed, writes completions, and is released."""

import gc
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache import Cache, open_cache
from ..cache.manifest import KEY as MANIFEST
from ..cache.stores import MemoryStore
from ..capture.api import capture
from ..kernels.topk.api import default_chunk
from ..models.lm_head import logits_of
from ..models.module import parameters_and_bytes
from ..models.protocol import Hidden
from ..settings import DataSettings
from ..teachers.hf import HFTeacher
from ..teachers.load import load
from ..teachers.protocol import Teacher
from ..utils.hashing import files_sha256
from ..utils.progress import mode_for
from ..utils.signals import Stopped
from .artifacts import Json, load_result, save_result
from .completions import completions_of, prefixes_of
from .job import Job, Sizes

ROUNDS = 2  # of timing the teacher alone, before the capture and again after it


def capture_teacher(job: Job, windows: NDArray[Any]) -> Json:
    """Complete the cache of the windows `[n, L]`. Returns what stays known of the teacher (`teacher.json`), and
    "captured": the positions that this call captured. The teacher is not loaded if both exist.

    Raises `Stopped` if `job.stop` was called; the errors of a capture, for example if the cache has other settings.
    """
    record = job.out / "teacher.json"
    inputs = {
        "teacher": teacher_identity(job.teacher),
        "windows": files_sha256([job.windows])[0][0],
        "how": asdict(job.model),
        "capture": asdict(job.capture),
    }
    found = load_result(record, inputs)
    if found is not None and (job.cache / MANIFEST).exists():  # it is sealed; what is in it is verified later
        job.stages.log("capture: the cache is complete, the teacher is not loaded")
        return found | {"captured": 0}
    captured, found = _run_teacher(job, windows)
    gc.collect()  # the teacher's memory
    return save_result(record, inputs, found) | {"captured": captured}


def held_out_windows(cache: Cache, sizes: Sizes) -> NDArray[np.int64]:
    """Tokens `[windows, L]` of the held-out windows, which are the last in the cache."""
    tokens = cache.sequences(range(sizes.train_windows, sizes.windows))["tokens"]
    return np.asarray(tokens, np.int64).reshape(-1, sizes.window)


def teacher_identity(folder: Path) -> list[str]:
    """sha256 of the config and of each file of weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return [digest for digest, _ in files_sha256(files)]


def _run_teacher(job: Job, windows: NDArray[Any]) -> tuple[int, Json]:
    """Everything that needs the teacher. Returns the positions captured, and what to store."""
    sizes, stages = job.sizes, job.stages
    with stages.stage("teacher", f"loading {job.teacher}"):
        loaded = load(str(job.teacher), job.model, DataSettings(data=(str(job.windows),)))
        teacher: Any = loaded.teacher
        assert isinstance(teacher, HFTeacher)
    batch = windows[: job.capture.batch_tokens // sizes.window]
    with stages.stage("teacher alone", "timing one batch, to compare with the capture"):
        alone = _seconds_alone(teacher, batch, warm_up=True)
    with stages.stage("capture", f"{sizes.windows * sizes.window:,} positions into {job.cache}"):
        report = capture(
            teacher, loaded.data, job.cache, job.capture, stop=job.stop, progress=mode_for(),
            notes=f"teacher {teacher.name}",
        )  # fmt: skip
    if not report.complete:
        raise Stopped
    held_out = held_out_windows(open_cache(job.cache), sizes)
    with stages.stage("teacher alone", "timing it again"):
        alone += _seconds_alone(teacher, batch, warm_up=False)
        timed = report
        if not timed.positions_captured:  # an earlier call captured everything: capture some windows again, in memory
            timed = capture(teacher, list(held_out), MemoryStore(), replace(job.capture, held_out=0.0))
        captured = timed.seconds / timed.positions_captured
    with stages.stage("completions", "by the teacher"):
        answers = completions_of(teacher.model, job.teacher, prefixes_of(held_out))
    count, size = parameters_and_bytes(teacher.model)
    return report.positions_captured, {
        "name": teacher.name,
        "parameters": count,
        "bytes": size,
        "overhead": {"bare": fmean(alone), "capture": captured, "ratio": captured / fmean(alone)},
        "answers": answers,
    }


def _seconds_alone(teacher: Teacher, windows: NDArray[Any], *, warm_up: bool) -> list[float]:
    """Seconds per position of the teacher alone on one batch of windows `[n, L]`, in each round."""
    batch, times = torch.from_numpy(windows).long(), []
    for _ in range(warm_up + ROUNDS):
        begun = time.perf_counter()
        _forward(teacher, batch)
        if teacher.device.type == "cuda":
            torch.cuda.synchronize(teacher.device)
        times.append((time.perf_counter() - begun) / batch.numel())
    return times[warm_up:]


@torch.inference_mode()
def _forward(teacher: Teacher, inputs: torch.Tensor) -> None:
    """Compute all logits of a batch `[n, L]`, in the chunks of a capture, and keep none."""
    answer = teacher(inputs.to(teacher.device))
    if isinstance(answer, Hidden):
        states = answer.states.flatten(0, 1)
        for chunk in torch.split(states, default_chunk(states, teacher.vocab_size)):
            logits_of(chunk, answer.lm_head)
