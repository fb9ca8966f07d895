"""fastkd.kernels: the math of distillation on a device. Needs torch; triton only where a Triton path is taken.

Names are loaded on first use: importing fastkd.kernels imports neither torch nor triton.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .divergences import register_divergence as register_divergence
    from .errors import KDError as KDError
    from .lm_head import LMHead as LMHead
    from .loss.api import DistillationLoss as DistillationLoss
    from .loss.api import KDLoss as KDLoss
    from .loss.api import kd_loss as kd_loss
    from .loss.api import linear_kd_loss as linear_kd_loss
    from .loss.checks import set_debug as set_debug
    from .loss.config import LossConfig as LossConfig
    from .targets import SparseTargets as SparseTargets
    from .targets import TargetsAt as TargetsAt
    from .topk.api import linear_topk_targets as linear_topk_targets
    from .topk.api import prepare_topk as prepare_topk
    from .topk.api import topk_targets as topk_targets
    from .topk.config import TopKConfig as TopKConfig
    from .treatment import resolve_treatment as resolve_treatment

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "divergences": ["register_divergence"],
        "errors": ["KDError"],
        "lm_head": ["LMHead"],
        "loss.api": ["DistillationLoss", "KDLoss", "kd_loss", "linear_kd_loss"],
        "loss.checks": ["set_debug"],
        "loss.config": ["LossConfig"],
        "targets": ["SparseTargets", "TargetsAt"],
        "topk.api": ["linear_topk_targets", "prepare_topk", "topk_targets"],
        "topk.config": ["TopKConfig"],
        "treatment": ["resolve_treatment"],
    },
)
