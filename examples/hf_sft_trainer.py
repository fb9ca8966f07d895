"""A cache in TRL's SFTTrainer: your own subclass of it keeps working, and no dataset of text is needed.

    pip install 'fastkd[hf,trl]'
    fastkd capture --teacher HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --loss-on assistant --out my-cache
    python examples/hf_sft_trainer.py my-student my-cache run      # called again, it resumes

The conversations are in the cache, as the teacher's chat template made tokens of them; `--loss-on assistant` said which
positions count. `DistillMixin` goes before the trainer; its arguments (cache, alpha, temperature, ...) are named in its
docstring, and all others are the trainer's.
"""

import sys

from trl import SFTConfig, SFTTrainer

from fastkd.integrations.hf import DistillMixin


class MyTrainer(DistillMixin, SFTTrainer):
    """An SFTTrainer that prints a line of its own."""

    def evaluate(self, *args, **kwargs):
        measures = super().evaluate(*args, **kwargs)
        print(f"{measures['eval_kl']:.3f} nats from the teacher on held-out conversations")
        return measures


def main(student, cache, out, *, processing_class=None, **more):
    args = SFTConfig(
        out,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        num_train_epochs=1,
        logging_steps=1,
        eval_strategy="epoch",
        report_to=[],
        **more,
    )
    trainer = MyTrainer(student, args, cache=cache, alpha=0.3, temperature=2.0, processing_class=processing_class)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main(*sys.argv[1:])
