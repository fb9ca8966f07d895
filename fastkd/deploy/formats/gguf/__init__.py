"""GGUF: one file with weights, hyperparameters and tokenizer, which llama.cpp runs.

    Deployable ─ architectures.py, vocabulary.py, blocks.py ─ writer.py ─▶ model.gguf ─ llama_cpp.py ─▶ Runtime

Belongs here: what GGUF names, and llama.cpp as a runtime. Does not: other formats' choice of what to quantise.
"""

from .writer import EXTRA, PACKAGES, QUANTIZE, check, load, write

__all__ = ["EXTRA", "PACKAGES", "QUANTIZE", "check", "load", "write"]
