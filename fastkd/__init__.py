"""fastkd: knowledge distillation from a cached sparse teacher, at the price of ordinary training.

Names are loaded on first use (PEP 562): importing fastkd imports neither torch nor triton nor zarr.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding import targets_from_arrays, targets_from_raw
    from .kernels import (
        DistillationLoss,
        KDError,
        KDLoss,
        SparseTargets,
        kd_loss,
        linear_kd_loss,
        linear_topk_targets,
        set_debug,
        topk_targets,
    )
    from .student.batch import ExampleBatch, MicroBatch, Step
    from .student.loader import DistillLoader
    from .student.result import TrainReport
    from .student.sweep import sweep
    from .student.sweep_result import SweepReport
    from .student.train import train
    from .teacher.capture import capture

__version__ = "0.1.0.dev0"

_HOME = {
    "DistillLoader": "student.loader",
    "DistillationLoss": "kernels",
    "KDError": "kernels",
    "KDLoss": "kernels",
    "ExampleBatch": "student.batch",
    "MicroBatch": "student.batch",
    "SparseTargets": "kernels",
    "SweepReport": "student.sweep_result",
    "capture": "teacher.capture",
    "Step": "student.batch",
    "kd_loss": "kernels",
    "linear_kd_loss": "kernels",
    "linear_topk_targets": "kernels",
    "set_debug": "kernels",
    "sweep": "student.sweep",
    "targets_from_arrays": "decoding",
    "targets_from_raw": "decoding",
    "topk_targets": "kernels",
    "train": "student.train",
    "TrainReport": "student.result",
}

__all__ = [
    "DistillLoader",
    "DistillationLoss",
    "ExampleBatch",
    "KDError",
    "KDLoss",
    "MicroBatch",
    "SparseTargets",
    "Step",
    "SweepReport",
    "TrainReport",
    "__version__",
    "capture",
    "kd_loss",
    "linear_kd_loss",
    "linear_topk_targets",
    "set_debug",
    "sweep",
    "targets_from_arrays",
    "targets_from_raw",
    "topk_targets",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
