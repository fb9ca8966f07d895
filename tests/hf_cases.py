"""Tiny models of transformers with random weights, saved in the usual way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.models.hub import load_transformers

SPECIAL = ["<|end|>", "<|begin|>", "<|turn|>"]
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
WORDS = "the quick brown fox jumps over the lazy dog and the other dogs, user assistant system " * 3

VOCAB = 96
USUAL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", USUAL),
    "mistral": ("Mistral", {**USUAL, "sliding_window": 4}),
    "qwen2": ("Qwen2", USUAL),
    "qwen3": ("Qwen3", USUAL),
    "smollm3": ("SmolLM3", {**USUAL, "no_rope_layers": [1, 0]}),
    "gemma": ("Gemma", {**USUAL, "head_dim": 8}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    # with windows and caps that the few tokens and the small weights of a test exceed
    "gemma2": ("Gemma2", {**USUAL, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3Text", {**USUAL, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention",
                                                                                           "full_attention"]}),
    "cohere": ("Cohere", {**USUAL, "logit_scale": 0.0625}),
    "granite": ("Granite", {**USUAL, "logits_scaling": 8.0}),
    "hyperclovax": ("HyperCLOVAX", {**USUAL, "logits_scaling": 8.0}),
    "minicpm3": ("MiniCPM3", {**USUAL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}),
    "phi": ("Phi", USUAL),  # an LM head with a bias
    "opt": ("OPT", {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "word_embed_proj_dim": 16}),
    "mixtral": ("Mixtral", {**USUAL, "num_local_experts": 4}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "recurrent_gemma": ("RecurrentGemma", {**USUAL, "num_hidden_layers": 3, "lru_width": 32,
                                           "attention_window_size": 8, "logits_soft_cap": 0.5}),
    "phi3": ("Phi3", {**USUAL, "max_position_embeddings": 128, "original_max_position_embeddings": 32,
                      "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                          "long_factor": [2.0] * 4}}),
    "bert": ("Bert", {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                      "num_attention_heads": 4}),
}  # fmt: skip


def config_of(name: str, **changes: Any) -> Any:
    kind, arguments = CONFIGS[name]
    return getattr(load_transformers(), f"{kind}Config")(**(arguments | changes))


def model_of(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in evaluation mode. If its LM head has a bias, the bias is large."""
    torch.manual_seed(seed)
    model = load_transformers().AutoModelForCausalLM.from_config(config_of(name, **changes)).eval().to(dtype)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    return model


def saved(folder: Path, name: str, **arguments: Any) -> Path:
    """The folder of such a model."""
    model_of(name, **arguments).save_pretrained(folder / name)
    return folder / name


def tokenizer_of(*, bos: bool = False, words: str = WORDS, template: str | None = TEMPLATE, **changes: Any) -> Any:
    """A byte-level tokenizer of some 290 ids; bos: it puts <|begin|> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([words], trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    given = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": template} | changes
    return load_transformers().PreTrainedTokenizerFast(tokenizer_object=raw, **given)


def write_gguf(path: Path, model: Any, tokenizer: Any) -> Path:
    """A Llama model and a byte-level tokenizer as llama.cpp's converter writes them."""
    import gguf

    config, vocabulary = model.config, tokenizer.get_vocab()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:  # it rotates neighbours where transformers rotates halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
