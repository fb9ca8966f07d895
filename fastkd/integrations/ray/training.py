"""`fastkd.integrations.ray.train`: `fastkd.train` by the workers of Ray Train's `TorchTrainer`.

Checkpoints are the run's own, in its folder: if a worker dies, Ray starts all of them again, and they resume from
there.
"""

import os
from pathlib import Path
from typing import Any, Unpack

from ...errors import ClusterError, passes
from ...settings import LiveSettings, RolloutSettings, ShareSettings, TrainSettings
from ...settings_changes import TrainChanges
from ...train.api import DEFAULTS
from ...train.api import train as train_here
from ...train.objective import Objective
from ...train.result import TrainReport
from ...train.trainer import Evaluate, Pause
from ...train.watch import Watch
from ...utils.atomic import remove_folder
from ...utils.output_guard import check_folder
from ...utils.progress import notes_only
from ...utils.signals import Stop
from .board import listening, make_board, stoppable
from .cluster import connected, enter_folder, resources_of


class TrainOptions(TrainChanges, total=False):
    """Other arguments of `fastkd.train`."""

    teacher: Any
    data: Any
    live: LiveSettings
    write_cache: Any
    rollouts: RolloutSettings
    objective: Objective | None
    control: bool
    stop_if_worse: bool
    evaluate: Evaluate | None
    pause: Pause | None
    watch: Watch | None
    share: ShareSettings


FOLDER = ".ray"  # of Ray's own files, in the run's, while it trains


def train(
    student: Any,
    cache: Any,
    out: str | Path,
    settings: TrainSettings = DEFAULTS,
    *,
    workers: int = 1,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    failures: int = 3,
    stop: Stop | None = None,
    progress: str = "none",
    **options: Unpack[TrainOptions],
) -> TrainReport:
    """Train a student on a Ray cluster. Called again with the same arguments, it resumes from the last checkpoint.

    student, cache, settings, options: as for `fastkd.train`, where the workers run: names are opened there, objects
        are pickled and sent there. out: the run's folder, which all machines share.
    workers: processes of the training. gpus_per_worker, cpus_per_worker: reserved for each. None: one GPU if the
        cluster has any.
    failures: how often the training is resumed after the loss of a worker.
    stop: stops the training when called; a checkpoint is written. progress: "none", "lines" or "events".

    Returns the report of `fastkd.train`, and raises what it raises; ClusterError without Ray or a cluster, and after
    too many failures.
    """
    if workers < 1:
        raise ClusterError(f"workers: got {workers}; expected a number from 1 on.")
    out = Path(out).absolute()
    check_folder(out, "run")
    stop = stop or Stop()
    with connected() as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        each = resources_of(ray, cpus_per_worker, gpus_per_worker)
        board = make_board(ray)
        work = {"student": student, "cache": cache, "out": str(out), "settings": settings, "options": options}
        trainer = TorchTrainer(
            _work,
            train_loop_config={**work, "board": board, "folder": os.getcwd()},
            torch_config=TorchConfig(backend="nccl" if each.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=each.gpus > 0, resources_per_worker={"CPU": each.cpus, "GPU": each.gpus}
            ),
            run_config=RunConfig(
                name=FOLDER, storage_path=str(out), failure_config=FailureConfig(max_failures=failures)
            ),
        )
        why: Exception | None = None
        with listening(ray, board, stop, notes_only(progress)):
            try:
                trainer.fit()
            except Exception as error:  # Ray's errors have no common class
                why = error
        reports, errors = ray.get(board.ends.remote())
        ray.kill(board)
        remove_folder(out / FOLDER)
        if errors:
            raise errors[0]
        if not reports:
            raise ClusterError(f"{out}: the training failed {failures + 1} times: {why}") from why
        report: TrainReport = reports[-1]
        return report


def _work(config: dict[str, Any]) -> None:
    """What a worker does: `fastkd.train` in the process group that Ray has made."""
    import ray
    import ray.train

    enter_folder(config["folder"])
    board, first = config["board"], ray.train.get_context().get_world_rank() == 0

    def listen(event: Any) -> None:
        if event["event"] in ("note", "training"):
            board.note.remote(event["text"])

    with stoppable(ray, board) as stop:
        try:
            report = train_here(
                config["student"], config["cache"], config["out"], config["settings"], stop=stop,
                progress=listen if first else "none", **config["options"],
            )  # fmt: skip
        except Exception as error:
            if _is_lost_peer(error):
                raise  # Ray begins again
            ray.get(board.error.remote(error))
            return
    if first:
        ray.get(board.result.remote(report))


def _is_lost_peer(error: Exception) -> bool:
    """Whether another process of the training is gone, or the error passes for another reason."""
    return passes(error) or isinstance(error, ConnectionError) or type(error).__module__.startswith("torch.")
