"""LoRA on a cache: an adapter of PEFT in transformers' Trainer. What is saved is an adapter folder.

    pip install 'fastkd[hf]'
    fastkd capture --teacher HuggingFaceTB/SmolLM2-1.7B --data 'corpus/*.parquet' --out my-cache
    python examples/lora.py HuggingFaceTB/SmolLM2-135M my-cache run
    python examples/lora.py --toy run                    # a small random teacher and student: seconds

The same without Python, with a whole model beside the adapter:
    fastkd train --student HuggingFaceTB/SmolLM2-135M --cache my-cache --out run --lora-rank 16 --lora-merge
"""

import argparse

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from fastkd import capture
from fastkd.integrations.hf import DistillTrainer


def toy(folder):
    """A student, and the cache of a teacher, both small and random."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **size))
    documents = [torch.randint(0, 64, (20,)).tolist() for _ in range(60)]
    capture(teacher, documents, f"{folder}/cache", k=8, draws=4, context=32, held_out=0.2)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **size)).save_pretrained(f"{folder}/student")
    return f"{folder}/student", f"{folder}/cache"


def main(student, cache, out, **more):
    base = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config)  # nothing else is special: the LM head is found inside
    args = TrainingArguments(
        out,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        num_train_epochs=2,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        report_to=[],
        **more,
    )
    trainer = DistillTrainer(model, args, cache=cache, alpha=0.3)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    trainer.save_model()  # adapter_config.json, adapter_model.safetensors
    return before, trainer.evaluate()["eval_kl"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", help="STUDENT CACHE OUT; with --toy: OUT")
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    student, cache = toy(given.paths[-1]) if given.toy else given.paths[:2]
    before, after = main(student, cache, given.paths[-1])
    print(f"nats from the teacher on held-out text: {before:.3f} before, {after:.3f} after")
    AutoPeftModelForCausalLM.from_pretrained(given.paths[-1]).merge_and_unload()  # a whole model, in memory
