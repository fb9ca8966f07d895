"""fastkd.kernels: the math of distillation on a device. Needs torch alone; triton when a Triton path is taken."""

from .checks import set_debug
from .decode import decode_targets
from .errors import KDError
from .loss import DistillationLoss, KDLoss, kd_loss, linear_kd_loss
from .targets import SparseTargets, TargetsAt
from .topk import linear_topk_targets, topk_targets
from .topk_impl import prepare_topk

__all__ = [
    "DistillationLoss",
    "KDError",
    "KDLoss",
    "SparseTargets",
    "TargetsAt",
    "decode_targets",
    "kd_loss",
    "linear_kd_loss",
    "linear_topk_targets",
    "prepare_topk",
    "set_debug",
    "topk_targets",
]
