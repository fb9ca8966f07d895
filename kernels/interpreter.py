"""Whether Triton kernels are interpreted, which is the only way they run on CPU tensors."""

import os


def triton_is_interpreted() -> bool:
    """True where TRITON_INTERPRET is set (it must be set before the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
