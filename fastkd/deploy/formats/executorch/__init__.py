"""ExecuTorch with XNNPACK: model.pte, for phones and small computers.

    Deployable ─ graph.py (KV cache, quantised weights) ─ writer.py ─▶ model.pte, weights.ptd ─ runtime.py ─▶ Runtime

Belongs here: what is exported of a model, how it is lowered, and ExecuTorch's runtime. Does not: which weights are
quantised to which values (models/quantization.py).
"""

from .runtime import load
from .writer import EXTRA, PACKAGES, QUANTIZE, check, write

__all__ = ["EXTRA", "PACKAGES", "QUANTIZE", "check", "load", "write"]
