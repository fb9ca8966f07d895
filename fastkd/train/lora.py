"""LoRA in a training (`--lora-rank`): new adapters on a student's frozen base, what identifies the base, and a copy of
the student with its adapters merged.

RUN/student/          adapter_config.json, adapter_model.safetensors: for `PeftModel.from_pretrained`
RUN/student-merged/   with --lora-merge: a whole model

Checkpoints have what is trained, and the sha256 of the base.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..models.adapters import base_of, has_adapters, is_wrapped, kind_of, load_peft
from ..models.hub import ModelFiles, brief
from ..models.module import tensors_sha256
from ..models.taps import layers_of
from ..settings import TrainSettings
from ..utils.distributed import is_dtensor, local_device
from .precision import autocast_of

MERGED = "merged"
SETTINGS = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "lora_merge")
_ALL = "all-linear"  # by peft: except the LM head
_QUANTISED = "got quantised weights, which cannot be trained"


def without_lora(settings: TrainSettings) -> TrainSettings:
    """The settings without new adapters, as for a student that has its own."""
    plain = TrainSettings()
    return replace(settings, **{name: getattr(plain, name) for name in SETTINGS})


def with_lora(model: Any, name: str, settings: TrainSettings, base: str | None) -> Any:
    """A PeftModel of a model, which is changed and frozen, with new LoRA layers by the settings, drawn from torch's
    generator.

    name: for messages. base: where the model came from, as it was named, "" if that is unknown; None if its weights are
        new.
    Raises TrainError if it cannot have them.
    """
    rank, alpha = settings.lora_rank, settings.lora_alpha
    assert rank is not None
    if has_adapters(model):
        raise TrainError(
            f"lora_rank: got {rank} for {name}, which has adapters of its own; expected a student without, or no "
            "lora_rank to train those it has."
        )
    if base is None:
        raise TrainError(
            f"lora_rank: got {rank} for {name}, whose weights are new; expected a trained model, as the base of an "
            "adapter stays as it is. Leave it out."
        )
    peft = load_peft()
    scaled = 2 * rank if alpha is None else alpha
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=int(scaled) if scaled == int(scaled) else scaled,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_targets) or _ALL,
        revision=settings.revision,
    )
    own = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        made = peft.get_peft_model(model, config)
    except Exception as error:  # of peft: a ValueError for names that are not there, and others
        listed = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in own)) or "none"
        raise TrainError(
            f"lora_targets: got {', '.join(settings.lora_targets) or _ALL} for {name}, which can have no adapter there "
            f"({brief(error)}); expected names of its linear layers: {listed}."
        ) from error
    for one in made.peft_config.values():
        one.base_model_name_or_path = base or None
    return made


def check_trainable(model: Any, name: str) -> None:
    """Raise TrainError for quantised weights without adapters, and for adapters that one folder cannot hold."""
    if is_wrapped(model) and len(active := list(model.active_adapters)) != 1:
        raise TrainError(
            f"{name}: got {len(active)} active adapters ({', '.join(active)}); expected one (set_adapter), which the "
            "result is a folder of."
        )
    if not has_adapters(model) and is_quantised(model):
        raise TrainError(
            f"{name}: {_QUANTISED}; expected adapters on them, such as by lora_rank=16 (--lora-rank 16), or the model "
            "before it was quantised."
        )


def notes_on(model: Any) -> list[str]:
    """For the user, a line each: what the adapters of a student are without."""
    if not has_adapters(model):
        return []
    config, notes = next(iter(model.peft_config.values())), []
    if not config.base_model_name_or_path:
        notes.append(
            "its base has no name, so its adapter folder will not say what it is for: load it as "
            "PeftModel.from_pretrained(base, folder), or set the model's name_or_path"
        )
    if kind_of(config) == "ADALORA":
        notes.append("AdaLoRA is trained with the ranks it has now, and without its penalty for orthogonality")
    return notes


def check_sharded(settings: TrainSettings, model: Any, name: str, processes: int) -> None:
    """Raise TrainError for a quantised base that FSDP2 would have to divide."""
    if processes > 1 and settings.parallel == "fsdp" and is_quantised(model):
        raise TrainError(
            f"parallel: got 'fsdp' for {name}, whose base is quantised: its codes cannot be divided over processes; "
            "expected 'ddp'."
        )


def is_quantised(model: Any) -> bool:
    """Whether weights of a model are codes: no floating-point numbers, or held by a quantizer of transformers."""
    held = getattr(base_of(model), "hf_quantizer", None)
    return (held is not None and not getattr(held.quantization_config, "dequantize", False)) or any(
        not p.is_floating_point() for p in model.parameters()
    )


def base_type(files: ModelFiles, settings: TrainSettings) -> torch.dtype:
    """The type of a base that stays as it is: bfloat16 if its files and matrix products are, which takes half the
    memory; float32 otherwise."""
    path = files.folder / "config.json"
    if files.gguf or not path.exists():
        return torch.float32
    config = json.loads(path.read_text(encoding="utf-8"))
    half = "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    device = local_device(settings.device, TrainError)
    return torch.bfloat16 if half and autocast_of(settings.precision, device) == torch.bfloat16 else torch.float32


def frozen_names(model: nn.Module) -> list[str]:
    """The parameters of a model with adapters that are not trained; of another model, none."""
    if not has_adapters(model):
        return []
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def base_sha256(student: nn.Module, names: frozenset[str]) -> str:
    """What identifies the base of adapters: the sha256 of what checkpoints leave out. names: of these parameters."""
    return tensors_sha256({name: p for name, p in student.named_parameters() if name in names})


def describe_adapters(model: Any) -> dict[str, Any]:
    """For run.json: the kind of a student's adapter, the name of its base, and the number of parameters that are
    trained; of a model without one, nothing."""
    if not has_adapters(model):
        return {}
    config = next(iter(model.peft_config.values()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"adapter": {"kind": kind_of(config), "base": config.base_model_name_or_path, "trained_parameters": trained}}


def check_merge(model: Any, name: str) -> None:
    """Raise TrainError, before the training, if the adapters of a student cannot be merged into its base."""
    problem = ""
    if not is_wrapped(model):
        problem = "which has no adapters; expected lora_rank, or an adapter folder as the student"
    elif is_quantised(model):
        problem = "whose base is quantised, so that merging would round the adapters away; expected none"
    elif not hasattr(model.base_model, "merge_and_unload"):
        problem = "whose kind of adapter peft cannot merge; expected none"
    elif tied_and_adapted(model):
        problem = (
            "whose LM head is tied to its embeddings, of which an adapter changes one; expected adapters on other "
            "layers"
        )
    if problem:
        raise TrainError(f"lora_merge: got it for {name}, {problem}.")


def tied_and_adapted(model: Any) -> bool:
    """Whether an adapter is on embeddings or LM head that are one matrix in the base."""
    base = base_of(model)
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return False
    plain = (nn.Linear, nn.Embedding)
    return not all(isinstance(end, plain) for end in (base.get_input_embeddings(), base.get_output_embeddings()))


def whole_tensors(student: nn.Module, names: frozenset[str], *, kept: bool) -> dict[str, Tensor]:
    """Parameters on the CPU, complete. With FSDP2, every process calls it. kept: whether this process needs them."""
    found = {}
    for name, p in student.named_parameters():
        if name in names:
            whole = p.full_tensor() if is_dtensor(p) else p
            if kept:
                found[name] = whole.detach().to("cpu", copy=True)  # merging changes them in place
    return found


def merged(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A model of transformers with the adapters of a PeftModel in its weights, on the CPU, to be written: what is not
    in a state dict is meta tensors.

    tensors: all parameters, by the names of the PeftModel, whose own may be divided over processes.
    """
    peft, base = load_peft(), base_of(model)
    (name,) = model.active_adapters
    with torch.device("meta"):
        made = peft.PeftModel(type(base)(copy.deepcopy(base.config)), copy.deepcopy(model.peft_config[name]), name)
    made.load_state_dict(dict(tensors), strict=False, assign=True)
    made.get_base_model().tie_weights()
    whole = made.merge_and_unload()
    if lacking := [path for path, p in whole.named_parameters() if p.is_meta]:
        raise RuntimeError(f"{lacking[0]}: the merged model lacks it ({len(lacking)} such tensors).")
    if len(layers_of(whole)) != len(layers_of(base)):
        raise RuntimeError("the merged model has another number of layers than its base.")
    if hasattr(base, "generation_config"):
        whole.generation_config = copy.deepcopy(base.generation_config)
    return whole
