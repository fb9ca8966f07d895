"""Tiny models with adapters."""

from typing import Any

import torch
from hf_cases import model_of

from fastkd.models.adapters import base_of, load_peft

ATTENTION = ["q_proj", "v_proj"]


def adapted(kind: str = "LoraConfig", *, base: Any = None, seed: int = 1, trained: bool = True, **changes: Any) -> Any:
    """A tiny Llama with an adapter: by default LoRA on queries and values. trained: with random values, as after a
    training: new ones do nothing."""
    peft = load_peft()
    given = {"task_type": "CAUSAL_LM"} | ({"target_modules": ATTENTION} if kind != "IA3Config" else {}) | changes
    if kind == "LoraConfig":
        given = {"r": 3, "lora_alpha": 6} | given
    torch.manual_seed(seed)
    base = model_of("llama") if base is None else base
    base.name_or_path = base.name_or_path or "tiny"
    model = peft.get_peft_model(base, getattr(peft, kind)(**given))
    return randomized(model, seed) if trained else model


def randomized(model: Any, seed: int = 1) -> Any:
    """With random values added to all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def folder_of(model: Any, folder: Any, base: Any) -> Any:
    """An adapter folder whose base is another folder. Returns it."""
    base_of(model).name_or_path = str(base)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder
