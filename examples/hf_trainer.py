"""A cache in transformers' Trainer: callbacks, evaluation, the best model and a resume as everywhere.

    pip install 'fastkd[hf]'
    fastkd capture --teacher HuggingFaceTB/SmolLM2-135M --data 'corpus/*.parquet' --out my-cache
    python examples/hf_trainer.py my-student my-cache run      # called again, it resumes
    python examples/hf_trainer.py --toy run                    # a small random teacher and student: seconds

Under `torchrun --nproc-per-node 8` or `accelerate launch` it is the same file: DDP, FSDP2 or DeepSpeed are said by the
TrainingArguments, and every process reads its own share of each step.
"""

import argparse

import torch
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainingArguments

from fastkd import capture
from fastkd.integrations.hf import DistillTrainer


def toy(folder):
    """A student, and the cache of a teacher, both small and random."""
    size = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **size))
    documents = [torch.randint(0, 64, (20,)).tolist() for _ in range(60)]
    capture(teacher, documents, f"{folder}/cache", k=8, draws=4, context=32, held_out=0.2)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **size)), f"{folder}/cache"


def main(student, cache, out, **more):
    args = TrainingArguments(
        out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-4,
        num_train_epochs=2,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="kl",
        greater_is_better=False,
        report_to=[],
        **more,
    )
    trainer = DistillTrainer(
        student, args, cache=cache, alpha=0.3, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)]
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", help="STUDENT CACHE OUT; with --toy: OUT")
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    student, cache = toy(given.paths[-1]) if given.toy else given.paths[:2]
    print(main(student, cache, given.paths[-1]))
