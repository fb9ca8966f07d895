"""fastkd.kernels: the math of distillation on a device. Needs torch alone; triton when a Triton path is taken."""

from .errors import KDError
from .lm_head import LMHead
from .loss.api import DistillationLoss, KDLoss, kd_loss, linear_kd_loss
from .loss.checks import set_debug
from .targets import SparseTargets, TargetsAt
from .topk.api import linear_topk_targets, topk_targets
from .topk.dispatch import prepare_topk

__all__ = [
    "DistillationLoss",
    "KDError",
    "KDLoss",
    "LMHead",
    "SparseTargets",
    "TargetsAt",
    "kd_loss",
    "linear_kd_loss",
    "linear_topk_targets",
    "prepare_topk",
    "set_debug",
    "topk_targets",
]
