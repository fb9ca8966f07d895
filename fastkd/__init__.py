"""fastkd: knowledge distillation from a cached sparse teacher, at the price of ordinary training.

Names are loaded on first use: importing fastkd imports neither torch nor triton nor zarr.
"""

from typing import TYPE_CHECKING

import lazy_loader

from .utils.deprecated import find_moved_modules

if TYPE_CHECKING:
    from .capture.api import capture as capture
    from .capture.mix_caches import mix_targets as mix_targets
    from .generations.api import generations as generations
    from .kernels import DistillationLoss as DistillationLoss
    from .kernels import HiddenTargets as HiddenTargets
    from .kernels import KDError as KDError
    from .kernels import KDLoss as KDLoss
    from .kernels import LMHead as LMHead
    from .kernels import LossConfig as LossConfig
    from .kernels import SparseTargets as SparseTargets
    from .kernels import kd_loss as kd_loss
    from .kernels import linear_kd_loss as linear_kd_loss
    from .kernels import linear_topk_targets as linear_topk_targets
    from .kernels import set_debug as set_debug
    from .kernels import topk_targets as topk_targets
    from .stream import DistillLoader as DistillLoader
    from .stream import ExampleBatch as ExampleBatch
    from .stream import MicroBatch as MicroBatch
    from .stream import Step as Step
    from .stream.decode import targets_from_arrays as targets_from_arrays
    from .stream.decode import targets_from_raw as targets_from_raw
    from .sweep.api import sweep as sweep
    from .sweep.result import SweepReport as SweepReport
    from .train.api import train as train
    from .train.mutual import MutualReport as MutualReport
    from .train.mutual import mutual as mutual
    from .train.own_loop import backward as backward
    from .train.own_loop import distill_module as distill_module
    from .train.result import TrainReport as TrainReport

__version__ = "0.1.0.dev0"
find_moved_modules()

__getattr__, _, _names = lazy_loader.attach(
    __name__,
    submodules=[
        "capture",
        "generations",
        "sweep",
        "train",
    ],  # packages that can be called: see utils/callable_package.py
    submod_attrs={
        "capture.mix_caches": ["mix_targets"],
        "kernels": [
            "DistillationLoss",
            "HiddenTargets",
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
        "train.mutual": ["MutualReport", "mutual"],
        "train.own_loop": ["backward", "distill_module"],
        "train.result": ["TrainReport"],
    },
)

__all__ = ["__version__", *_names]


def __dir__() -> list[str]:
    return sorted(__all__)
