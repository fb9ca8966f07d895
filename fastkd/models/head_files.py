"""The LM head of a causal model, read from its files without the rest of the model: for engines that return states."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TeacherError
from ..kernels import LMHead
from .hub import ModelFiles, brief, load_transformers
from .lm_head import find_lm_head

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TOKENS = 64  # of the vocabulary of the copy that a config is proven on


def read_lm_head(
    source: str | Path,
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> LMHead:
    """The LM head that computes a model's logits from its last hidden states (after the final norm).

    The matrix (and its bias) is read from the safetensors files, by the name that it has in the model: that of the
    embeddings if they are tied. A scale or a softcap is what the model's code makes of its config, proven on a copy of
    the model without layers. dtype: of the matrix; a head is not quantized in the files, or refused.
    Raises TeacherError.
    """
    transformers = load_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
        plain = copy.deepcopy(config)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        with torch.device("meta"):
            model = _model(transformers, plain, trust_remote_code)
    except Exception as error:
        raise TeacherError(
            f"{source}: transformers cannot read its config as that of a causal language model ({brief(error)}), which "
            "says where its LM head is."
        ) from error
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise TeacherError(
            f"{source}: got a {type(head).__name__} as LM head; expected one plain matrix. Use --teacher without vllm:."
        )
    named = list(model.named_parameters(remove_duplicate=False))
    weight = _read(source, files, [name for name, parameter in named if parameter is head.weight])
    bias = None
    if head.bias is not None:
        bias = _read(source, files, [name for name, parameter in named if parameter is head.bias]).to(device, dtype)
    if tuple(weight.shape) != tuple(head.weight.shape):
        raise TeacherError(
            f"{source}: got an LM head of {tuple(weight.shape)} in its files; expected {tuple(head.weight.shape)}, as "
            "its config says. Check that the files are of one model."
        )
    scale, softcap = _transform(source, transformers, plain, trust_remote_code)
    return LMHead(weight.to(device, dtype), bias, softcap, scale)


def _model(transformers: Any, config: Any, trust_remote_code: bool) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _transform(
    source: str | Path, transformers: Any, config: Any, trust_remote_code: bool
) -> tuple[float | None, float | None]:
    """Scale and softcap of the logits, from a copy of the model with its code and its config, and without layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, _TOKENS, None
    if hasattr(text, "layer_types"):
        text.layer_types = []
    try:
        generator = torch.Generator().manual_seed(0)
        model = _model(transformers, config, trust_remote_code).float().eval()
        with torch.no_grad():
            tokens = torch.randint(0, _TOKENS, (2, 12), generator=generator)
            found = find_lm_head(model, tokens)
    except Exception as error:
        raise TeacherError(
            f"{source}: the LM head cannot be tried on a copy without layers ({brief(error)}). Use --teacher without "
            "vllm:."
        ) from error
    if found is None or not isinstance(found.lm_head, LMHead):
        raise TeacherError(
            f"{source}: no reading of its config reproduces its logits from its last hidden states. Use --teacher "
            "without vllm:, which then materializes logits."
        )
    return found.lm_head.logit_scale, found.lm_head.softcap


def _read(source: str | Path, files: ModelFiles, names: list[str]) -> Tensor:
    """The first of these tensors that is in the files."""
    from safetensors import safe_open

    folder = files.folder
    if (folder / _INDEX).exists():
        places: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
    elif (folder / _SINGLE).exists():
        with safe_open(folder / _SINGLE, "pt") as opened:
            places = dict.fromkeys(opened.keys(), _SINGLE)
    else:
        raise TeacherError(f"{source}: got a folder without {_SINGLE}; expected weights as safetensors.")
    # a file may have the text model within another one, or without its prefix
    ends = [f".{name}" for name in names] + [f".{name.partition('.')[2]}" for name in names if name.count(".") > 1]
    found = [name for name in names if name in places]
    found += [place for end in ends for place in places if f".{place}".endswith(end)]
    if not found:
        raise TeacherError(
            f"{source}: got no tensor {' or '.join(names)} in its safetensors; expected the LM head, not quantized."
        )
    with safe_open(folder / places[found[0]], "pt") as opened:
        tensor: Tensor = opened.get_tensor(found[0])
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TeacherError(
            f"{source}: got an LM head of {tensor.dtype} in {found[0]}; expected one of float16, bfloat16 or float32."
        )
    return tensor
