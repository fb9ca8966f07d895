"""The teacher's part: it is loaded, fills the cache, is measured and asked what it would write; and then it is gone."""

import gc
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import Cache, CacheError, open_cache
from ..cache.stores import MemoryStore
from ..capture.api import capture
from ..models.module import parameters_and_bytes
from ..settings import CaptureSettings, DataSettings, DemoSettings, ModelSettings
from ..teachers.hf import HFTeacher
from ..teachers.load import load
from ..utils.hashing import files_sha256
from ..utils.progress import mode_for
from ..utils.signals import Stop, Stopped
from .artifacts import Json, keep, there
from .completions import completions_of, held_out_prefixes
from .overhead import bare_seconds
from .scales import Sizes
from .stages import Clock
from .text import windows_in

BATCH_TOKENS = {"cpu": 2048, "gpu": 16384}  # positions that the teacher is run on at once


@dataclass(frozen=True)
class Places:
    """The demo's folder, and what lies where in it."""

    out: Path
    teacher: Path

    @property
    def cache(self) -> Path:
        """What the teacher said."""
        return self.out / "cache"

    @property
    def windows(self) -> Path:
        """The data."""
        return self.out / "windows.parquet"

    @property
    def record(self) -> Path:
        """What is known of the teacher when it is gone."""
        return self.out / "teacher.json"


def capture_settings(settings: DemoSettings, sizes: Sizes) -> CaptureSettings:
    """What the teacher is asked. A window is a document, so that as many are held out as are asked for."""
    return CaptureSettings(
        k=settings.k,
        draws=settings.draws,
        context=sizes.window,
        packing="keep",
        held_out=sizes.held_out / sizes.windows,
        shard_positions=sizes.shard_windows * sizes.window,
        batch_tokens=max(sizes.window, min(BATCH_TOKENS[settings.scale], sizes.shard_windows * sizes.window)),
        seed=settings.seed,
    )


def model_settings(settings: DemoSettings) -> ModelSettings:
    """How the teacher is run: bfloat16 takes five times as long on a CPU, and is what GPUs are made for."""
    return ModelSettings(dtype="bfloat16" if settings.scale == "gpu" else "float32")


def have_cache(
    places: Places, how: ModelSettings, asked: CaptureSettings, sizes: Sizes, clock: Clock, stop: Stop | None
) -> Json:
    """Have the whole cache, and what is known of the teacher: `teacher.json`. With `captured`: positions that the
    teacher was run on for it now. The teacher is not even loaded where both are there from before.

    Raises `Stopped` where a stop was asked for; what capture raises, where the cache is of something else.
    """
    of = {
        "teacher": identity(places.teacher),
        "windows": files_sha256([places.windows])[0][0],
        "how": asdict(how),
        "capture": asdict(asked),
    }
    found = there(places.record, of)
    if found is not None and _whole(places.cache, found["spec"]):
        clock.say("capture: the cache is there from before, and the teacher is not loaded")
        return found | {"captured": 0}
    captured, found = _teach(places, how, asked, sizes, clock, stop)
    # of the teacher nothing is left but what it said
    gc.collect()
    return keep(places.record, of, found) | {"captured": captured}


def held_out(cache: Cache, sizes: Sizes) -> NDArray[np.int64]:
    """The tokens `[windows, L]` of the windows that no student sees: in the cache they come last."""
    tokens = cache.sequences(range(sizes.train_windows, sizes.windows))["tokens"]
    return np.asarray(tokens, np.int64).reshape(-1, sizes.window)


def identity(folder: Path) -> list[str]:
    """What makes a teacher that one: the sha256 of its config and its weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return [digest for digest, _ in files_sha256(files)]


def _whole(cache: Path, spec: str) -> bool:
    """Whether a sealed cache of this spec is there."""
    try:
        found = open_cache(cache)
    except CacheError:  # verify, or the capture, will say what is wrong
        return False
    return found.sealed and found.spec.hash == spec


def _teach(
    places: Places, how: ModelSettings, asked: CaptureSettings, sizes: Sizes, clock: Clock, stop: Stop | None
) -> tuple[int, Json]:
    """All that needs the teacher; it is known in here alone. The positions it was run on for the cache, and what is to
    be remembered."""
    with clock.stage("teacher", f"loading {places.teacher}"):
        loaded = load(str(places.teacher), how, DataSettings(data=(str(places.windows),)))
        teacher: Any = loaded.teacher
        assert isinstance(teacher, HFTeacher)
    few = windows_in(places.windows)[: asked.batch_tokens // sizes.window]
    with clock.stage("bare teacher", "a batch of it, to hold the capture against"):
        bare = bare_seconds(teacher, few, warm_up=True)
    with clock.stage("capture", f"{sizes.windows * sizes.window:,} positions into {places.cache}"):
        report = capture(
            teacher, loaded.data, places.cache, asked, stop=stop, progress=mode_for(), notes=f"teacher {teacher.name}"
        )
    if not report.complete:
        raise Stopped
    cache = open_cache(places.cache)
    with clock.stage("bare teacher", "the same again"):
        bare += bare_seconds(teacher, few, warm_up=False)
        # of a capture that was interrupted: what it did now; after its end: as much again, into memory
        timed = report
        if not timed.positions_captured:
            timed = capture(teacher, list(held_out(cache, sizes)), MemoryStore(), replace(asked, held_out=0.0))
        captured = timed.seconds / timed.positions_captured
    overhead = {"bare": fmean(bare), "capture": captured, "ratio": captured / fmean(bare)}
    with clock.stage("completions", "by the teacher, for the last time"):
        prefixes = held_out_prefixes(held_out(cache, sizes))
        answers = completions_of(teacher.model, places.teacher, prefixes)
    count, size = parameters_and_bytes(teacher.model)
    return report.positions_captured, {
        "spec": cache.spec.hash,
        "name": teacher.name,
        "parameters": count,
        "bytes": size,
        "overhead": overhead,
        "answers": answers,
    }
