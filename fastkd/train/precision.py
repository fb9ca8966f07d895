"""The type of matrix products."""

import torch


def autocast_of(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of matrix products for a setting of `precision` on a device; None: that of the weights."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None
