"""fastkd.kernels: the math of distillation on a device. Imports with torch alone; triton when a Triton path is taken."""

from .checks import set_debug
from .errors import KDError
from .loss import DistillationLoss, KDLoss, kd_loss, linear_kd_loss
from .targets import SparseTargets, TargetsAt
try:
    from .topk import linear_topk_targets, topk_targets
except Exception:  # noqa
    pass

__all__ = [
    "DistillationLoss",
    "KDError",
    "KDLoss",
    "SparseTargets",
    "TargetsAt",
    "kd_loss",
    "linear_kd_loss",
    "linear_topk_targets",
    "set_debug",
    "topk_targets",
]
