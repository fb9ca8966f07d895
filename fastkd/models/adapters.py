"""Adapters of PEFT (LoRA and its kin) on a model of transformers: seen through, checked, loaded.

A PeftModel is a wrapper: `get_base_model()` is the model of transformers, whose layers the adapter has changed, while
its attribute `base_model` is the adapter itself. PEFT is imported only to load an adapter: whoever has made one has
imported it.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache.errors import said
from ..errors import TeacherError
from .hub import INSTALL, ModelFiles, brief, load_transformers, resolve

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOISE = (0.1, 0.05)  # of random adapters: of their standard deviation; where that is 0, as of a new one
_VIRTUAL = "puts virtual tokens before every input, so that positions are not those of the targets"
_REFUSED = {
    "POLY": "needs the number of a task with every input",
    "XLORA": "runs the model twice for every input",
}


def load_peft() -> Any:
    """The package peft. TeacherError if the extra is not installed."""
    load_transformers()
    try:
        import peft
    except ImportError as error:
        raise TeacherError(f"peft: {said(error)}. Use `{INSTALL}`.") from error
    # which peft reads of every model, and newer versions of transformers deprecate
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return peft


def base_of(model: Any) -> Any:
    """The model of transformers inside a PeftModel, with its adapter's layers; any other model as it is."""
    if not is_wrapped(model):
        return model
    return model.get_base_model() if hasattr(model, "peft_type") else model.base_model.model  # of mixed kinds


def is_wrapped(model: Any) -> bool:
    """Whether it is a PeftModel."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def has_adapters(model: Any) -> bool:
    """Whether a model has adapters: a PeftModel, or one of transformers to which `add_adapter` has added some."""
    return is_wrapped(model) or bool(getattr(model, "_hf_peft_config_loaded", False))


def check_adapters(model: Any, name: str) -> None:
    """Raise TeacherError for a kind of adapter whose model is more than its layers on the given tokens."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftMixedModel):
        raise TeacherError(f"{name}: got adapters of mixed kinds, which cannot be saved; expected one, such as LoRA.")
    for config in model.peft_config.values() if has_adapters(model) else ():
        _check_kind(config, name)


def _check_kind(config: Any, name: str) -> None:
    kind = kind_of(config)
    why = _VIRTUAL if config.is_prompt_learning else _REFUSED.get(kind)
    if getattr(config, "alora_invocation_tokens", None):
        kind, why = "activated LoRA", "is active behind certain tokens only"
    if why is not None:
        raise TeacherError(
            f"{name}: got an adapter of the kind {kind}, which {why}; expected one that changes layers, such as LoRA."
        )


def kind_of(config: Any) -> str:
    """The kind of adapter that a config of PEFT is of, such as "LORA"."""
    return str(getattr(config.peft_type, "value", config.peft_type))


@contextmanager
def random_adapters(model: Any) -> Iterator[None]:
    """Context manager: a model with other values of what is trained of it, if it has adapters. A new adapter does
    nothing yet, so that a probe would not see where it is."""
    trained = [p for p in model.parameters() if p.requires_grad] if has_adapters(model) else []
    generator = torch.Generator().manual_seed(0)
    kept = [p.detach().clone() for p in trained]
    try:
        with torch.no_grad():
            for p in trained:
                deviation = float(p.float().std()) if p.numel() > 1 else 0.0
                size = _NOISE[0] * deviation or _NOISE[1]
                p.add_(size * torch.randn(p.shape, generator=generator).to(p))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(trained, kept, strict=True):
                p.copy_(value)


def save_adapter(model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the active adapter of a PeftModel as a folder. tensors: its parameters, by the names of the model's."""
    (name,) = model.active_adapters
    # what is not in `tensors` is of the base, also embeddings
    model.save_pretrained(str(folder), state_dict=dict(tensors), selected_adapters=[name], save_embedding_layers=False)
    if (inner := folder / name).is_dir():  # of an adapter that is not named "default"
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()


class AdapterFiles(NamedTuple):
    """An adapter's folder. base: the name of its base, as in its config; base_files: the base's."""

    folder: Path
    base: str
    base_files: ModelFiles


def adapter_files(files: ModelFiles) -> AdapterFiles | None:
    """The adapter in these files; None if they are those of a whole model. Raises TeacherError if it names no base, or
    the base is not there."""
    path = files.folder / CONFIG
    if files.gguf or not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise TeacherError(f"{path}: cannot be read ({error}); expected the config of an adapter.") from error
    if not isinstance(base, str) or not base:
        raise TeacherError(
            f"{path}: got no base_model_name_or_path; expected the folder or name of its base. Write it there."
        )
    try:
        found = resolve(base, revision if isinstance(revision, str) else None)
    except TeacherError as error:
        raise TeacherError(f"{files.folder}: got an adapter of {base!r}, which is not found: {error}") from error
    if (found.folder / CONFIG).exists() and not found.gguf:
        raise TeacherError(f"{files.folder}: got an adapter of {base!r}, itself an adapter; expected a whole model.")
    return AdapterFiles(files.folder, base, found)


def load_adapter(base: Any, files: AdapterFiles, *, trained: bool) -> Any:
    """A PeftModel of a base, which is changed, and an adapter. trained: whether its parameters require gradients.

    Raises TeacherError if it cannot be loaded.
    """
    peft = load_peft()
    name = files.folder.resolve().name
    try:
        _check_kind(peft.PeftConfig.from_pretrained(str(files.folder)), name)
        model = peft.PeftModel.from_pretrained(base, str(files.folder), is_trainable=trained)
    except TeacherError:
        raise
    except Exception as error:  # of peft, safetensors, torch: each raises its own
        raise TeacherError(
            f"{files.folder}: the adapter cannot be loaded on {files.base!r} ({brief(error)}). Check that it is the "
            "base that it was trained on."
        ) from error
    for one in model.peft_config.values():
        one.base_model_name_or_path = files.base
    check_adapters(model, name)
    return model
