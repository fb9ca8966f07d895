"""Causal language models of transformers, for teachers and students: loading, limits, and checks on a probe."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TeacherError
from .adapters import adapter_files, check_adapters, load_adapter
from .hub import ModelFiles, brief, load_transformers
from .lm_head import LMHeadMatch, find_lm_head

_PROBE = (2, 12)  # rows and tokens of the probe batch


class ProbedModel(NamedTuple):
    """What a probe batch told about a causal model of transformers.

    vocab_size: V, the width of its logits. max_positions: the longest input in tokens; None: no limit, or unknown.
    lm_head: None if no reading of its config reproduces its logits from its hidden states. tokens: the probe batch,
    int64 `[B, L]`.
    """

    vocab_size: int
    max_positions: int | None
    lm_head: LMHeadMatch | None
    tokens: Tensor


def load_causal_lm(
    source: str | Path, files: ModelFiles, *, attention: str | None = None, notes: list[str], **options: Any
) -> Any:
    """The model in these files, as `AutoModelForCausalLM.from_pretrained` loads it.

    source: what the person named, for messages. attention: an attention implementation of transformers; None: its
    default. notes: gets a line for weights that the model does not use. options: for `from_pretrained`.
    An adapter is merged into its base. Raises TeacherError for a model that cannot be loaded, or files that lack some
    of the weights.
    """
    transformers = load_transformers()
    if (adapter := adapter_files(files)) is not None:
        if "distributed_config" in options:
            raise TeacherError(
                f"{source}: got an adapter, and several processes for the layers of its base; expected a whole model. "
                "Merge it into its base model first."
            )
        base = load_causal_lm(adapter.base, adapter.base_files, attention=attention, notes=notes, **options)
        merged = load_adapter(base, adapter, trained=False).merge_and_unload()
        notes.append(f"the adapter is merged into its base, {adapter.base}.")
        return merged
    options |= files.arguments
    if files.gguf:
        # kept quantized, weights would be dequantized at every call, depending on which other packages are installed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        raise TeacherError(
            f"{source}: transformers cannot load it as a causal language model ({brief(error)}). Check that it is one, "
            "that its files are complete, and that the settings (attention, dtype, device) are available here."
        ) from error
    _check_weights(source, info, notes)
    return model


def probe_causal_lm(model: Any, name: str, notes: list[str]) -> ProbedModel:
    """Run a model, in evaluation mode, on a small batch, and find its limits and its LM head.

    Raises TeacherError if it fails on the batch, or is not causal.
    """
    check_adapters(model, name)
    longest = max_positions(model.config, notes)
    # the same tokens in every process
    generator = torch.Generator().manual_seed(0)
    ids = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, ids, (_PROBE[0], min(_PROBE[1], longest or _PROBE[1])), generator=generator)
    tokens = tokens.to(model.device)
    with torch.no_grad():
        try:
            logits = model(input_ids=tokens, use_cache=False).logits
        except Exception as error:
            raise TeacherError(
                f"{name}: {type(model).__name__} was loaded, but fails on {tokens.numel()} tokens ({brief(error)}). "
                "Try another attention implementation, dtype or device."
            ) from error
        _check_causal(model, tokens, logits, name)
        lm_head = find_lm_head(model, tokens)
    return ProbedModel(int(logits.shape[-1]), longest, lm_head, tokens)


def _check_weights(source: str | Path, info: dict[str, Any], notes: list[str]) -> None:
    """Refuse a model with weights that were not loaded: transformers initializes those at random."""
    if lacking := sorted({*map(str, info["missing_keys"]), *(str(key[0]) for key in info["mismatched_keys"])}):
        raise TeacherError(
            f"{source}: {len(lacking)} of the model's weights are not in its files, or have another shape: "
            f"{', '.join(lacking[:3])}{', …' * (len(lacking) > 3)}. It is another kind of model, or incomplete."
        )
    if unused := sorted(map(str, info["unexpected_keys"])):
        listed = ", ".join(unused[:3]) + ", …" * (len(unused) > 3)
        notes.append(f"{len(unused)} of the weights in its files are not used by the model: {listed}.")


def _check_causal(model: Any, tokens: Tensor, logits: Tensor, name: str) -> None:
    """Refuse a model whose output depends on later tokens: padding would change the output before it."""
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % int(tokens.max() + 1)
    changed = model(input_ids=other, use_cache=False).logits
    before, after = (z[:, :-1].float() for z in (logits, changed))
    eps = torch.finfo(model.dtype).eps
    moved = ((before - after).abs() > max(1e-5, 4 * eps) * before.abs().max()).any(-1)
    # In 16 bits a mixture of experts may route a token or two differently if an expert's batch has another size.
    if int(moved.sum()) > (0 if eps < 1e-5 else moved.numel() // 2):
        raise TeacherError(
            f"{name}: {type(model).__name__} is not a causal model: changing the last token changed its output at "
            "earlier positions. Expected a decoder (some models need is_decoder in their config)."
        )


class Declared(NamedTuple):
    """What the config of a model says before it is loaded. Outcomes, and tokens of an input, at most; None where it
    does not say. The loaded model has the last word."""

    vocab_size: int | None = None
    max_positions: int | None = None


def declared_by(folder: Path) -> Declared:
    """What the config.json in a folder declares; nothing if there is none, as for GGUF files and adapters."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # transformers says what is wrong with it
        return Declared()
    if not isinstance(config, dict):
        return Declared()
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]

    def number(*names: str) -> int | None:
        found = [part[name] for part in parts for name in names if type(part.get(name)) is int and part[name] > 0]
        return max(found, default=None)

    limited = not any(part.get("alibi") for part in parts)
    return Declared(number("vocab_size"), number("max_position_embeddings", "n_positions") if limited else None)


def max_positions(config: Any, notes: list[str]) -> int | None:
    """The longest input that a model takes, in tokens, by its config; None: no limit, or unknown."""
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return None
    most = next((n for key in ("max_position_embeddings", "n_positions") if (n := getattr(text, key, None))), None)
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        short = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") == "longrope" and short and (most is None or short < most):
            notes.append(
                f"inputs are limited to {short} of its {most} tokens: with rope_type longrope, a longer input changes "
                "the output of every other input in its batch."
            )
            most = int(short)
    return None if most is None else int(most)
