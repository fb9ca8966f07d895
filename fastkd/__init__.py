"""fastkd: knowledge distillation from a cached sparse teacher, at the price of ordinary training.

Names are loaded on first use: importing fastkd imports neither torch nor triton nor zarr.
"""

from typing import TYPE_CHECKING

import lazy_loader

from .utils.deprecated import find_moved_modules

if TYPE_CHECKING:
    from .capture.api import capture
    from .kernels import (
        DistillationLoss,
        KDError,
        KDLoss,
        LMHead,
        LossConfig,
        SparseTargets,
        kd_loss,
        linear_kd_loss,
        linear_topk_targets,
        set_debug,
        topk_targets,
    )
    from .stream import DistillLoader, ExampleBatch, MicroBatch, Step
    from .stream.decode import targets_from_arrays, targets_from_raw
    from .sweep.api import sweep
    from .sweep.result import SweepReport
    from .train.api import train
    from .train.result import TrainReport

__version__ = "0.1.0.dev0"
find_moved_modules()

__getattr__, _, _names = lazy_loader.attach(
    __name__,
    submodules=["capture", "sweep", "train"],  # packages that can be called: see utils/callable_package.py
    submod_attrs={
        "kernels": [
            "DistillationLoss",
            "KDError",
            "KDLoss",
            "LMHead",
            "LossConfig",
            "SparseTargets",
            "kd_loss",
            "linear_kd_loss",
            "linear_topk_targets",
            "set_debug",
            "topk_targets",
        ],
        "stream": ["DistillLoader", "ExampleBatch", "MicroBatch", "Step"],
        "stream.decode": ["targets_from_arrays", "targets_from_raw"],
        "sweep.result": ["SweepReport"],
        "train.result": ["TrainReport"],
    },
)

__all__ = ["__version__", *_names]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
