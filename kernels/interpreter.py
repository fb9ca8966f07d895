"""Whether Triton kernels are interpreted, which is the only way they run on CPU tensors."""

from typing import Any

import triton


def is_interpreted(kernel: Any) -> bool:
    """True where a kernel was imported under TRITON_INTERPRET=1: that is when triton decides, for good."""
    return not isinstance(kernel, triton.JITFunction)
