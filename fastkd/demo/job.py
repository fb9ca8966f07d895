"""A run of the language demo: its settings, and the sizes, files and settings of its stages that follow from them."""

from dataclasses import replace
from typing import NamedTuple

from ..settings import CaptureSettings, DemoSettings, ModelSettings, TrainSettings
from ..utils.signals import Stop
from .stages import Stages

BATCH_TOKENS = {"cpu": 2048, "gpu": 16384}  # positions per batch of the teacher
WARMUP = 0.2  # share of the steps: at the full rate, the large first gradients of a pruned model can make it diverge


class Sizes(NamedTuple):
    """Windows and steps; see `DemoSettings`."""

    window: int
    train_windows: int
    held_out: int
    shard_windows: int
    batch_windows: int
    steps: int

    @property
    def windows(self) -> int:
        """Training and held-out windows."""
        return self.train_windows + self.held_out


PRESETS = {
    "cpu": Sizes(window=256, train_windows=16, held_out=48, shard_windows=48, batch_windows=2, steps=24),
    # 4.5 million positions
    "gpu": Sizes(window=1024, train_windows=4096, held_out=256, shard_windows=64, batch_windows=16, steps=512),
}


class Job:
    """A run of the demo.

    sizes: the preset's, except those that are set. teacher, cache, pruned: folders, the last one of the student before
    training. windows: the data, a Parquet file. model, capture: settings of the stages. trainings: the name of each
    run, its settings, and whether it has a control; steps: how long they are, as text. runs: folders of the trained
    runs, then of the evaluation of the pruned student.
    """

    def __init__(self, settings: DemoSettings, stages: Stages, stop: Stop | None = None) -> None:
        self.settings, self.stages, self.stop = settings, stages, stop
        given = {name: value for name in Sizes._fields if (value := getattr(settings, name)) is not None}
        self.sizes = sizes = PRESETS[settings.scale]._replace(**given)
        self.out = out = settings.out
        self.teacher = settings.teacher or out / "teacher"
        self.cache, self.pruned, self.windows = out / "cache", out / f"cut-{settings.cut}", out / "windows.parquet"
        # bfloat16 is five times as slow as float32 on a CPU, and native to GPUs
        self.model = ModelSettings(dtype="bfloat16" if settings.scale == "gpu" else "float32")
        shard_positions = sizes.shard_windows * sizes.window
        self.capture = CaptureSettings(
            k=settings.k, draws=settings.draws, seed=settings.seed, context=sizes.window,
            packing="keep",  # each window is a document, so that the number of held-out windows is exact
            held_out=sizes.held_out / sizes.windows, shard_positions=shard_positions,
            batch_tokens=max(sizes.window, min(BATCH_TOKENS[settings.scale], shard_positions)),
        )  # fmt: skip
        first = TrainSettings(
            steps=sizes.steps, batch_size=sizes.batch_windows, rate=settings.rate, warmup=WARMUP, alpha=settings.alpha,
            seed=settings.seed, evaluate_every=sizes.steps,
        )  # fmt: skip
        # the second student learns from the teacher's distributions alone
        self.trainings = [("healed", first, True), ("soft", replace(first, alpha=0.0), False)]
        self.steps = f"{sizes.steps} steps of {sizes.batch_windows * sizes.window:,} positions"
        self.runs = [out / name for name in ("healed", "soft", "damaged")]
