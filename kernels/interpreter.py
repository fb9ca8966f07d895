"""Whether Triton kernels are interpreted, which is how they run on CPU tensors."""

from typing import Any

import triton


def is_interpreted(kernel: Any) -> bool:
    """True for a kernel that was imported under TRITON_INTERPRET=1; triton decides it at the import."""
    return not isinstance(kernel, triton.JITFunction)
