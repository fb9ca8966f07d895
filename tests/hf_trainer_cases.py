"""Small trainings with DistillTrainer, importable by the processes that the tests start."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from hf_cases import model_of
from torch import Tensor, nn

from fastkd import DistillLoader, linear_kd_loss
from fastkd.errors import StreamError
from fastkd.integrations.hf import DistillDataset, DistillTrainer, attach
from fastkd.models.hub import load_transformers

SIZE = 8  # sequences per step, of all processes
LOSS: dict[str, Any] = {"alpha": 0.3, "temperature": 2.0}
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}

USUAL: dict[str, Any] = {
    "num_train_epochs": 2, "learning_rate": 0.01, "optim": "adamw_torch", "logging_steps": 1, "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "log_level": "error",
}  # fmt: skip


def student(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return model_of("llama", seed=1, dtype=dtype, **changes)


def arguments(out: Path, *, accumulation: int = 1, **changes: Any) -> Any:
    """TrainingArguments for steps of SIZE sequences, however they are divided."""
    from transformers import TrainingArguments

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    given = USUAL | {
        "per_device_train_batch_size": SIZE // accumulation // processes, "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TrainingArguments(str(out), **(given | changes))


def trainer(cache: Any, out: Path, model: Any = None, *, loss: dict[str, Any] = LOSS, **changes: Any) -> Any:
    extra = {n: changes.pop(n) for n in ("callbacks", "processing_class", "card_teacher") if n in changes}
    return DistillTrainer(
        student() if model is None else model, arguments(out, **changes), cache=cache, **loss, **extra
    )


def stock(cache: Any, out: Path, micro_batches: int, model: Any = None, **changes: Any) -> Any:
    """transformers' own Trainer on an attached model, by the parts of a DistillTrainer."""
    given = {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "data_seed": 42} | changes
    args = arguments(out, per_device_train_batch_size=1, per_device_eval_batch_size=1, **given)
    model = attach(student() if model is None else model, alpha=0.3, temperature=2.0)
    dataset = DistillDataset(cache, batch_size=SIZE, micro_batches=micro_batches, seed=42)
    return load_transformers().Trainer(model, args, train_dataset=dataset, data_collator=dataset.collate)


def refused_stock(cache: Path, out: Path) -> None:
    """In a process of several: a stock Trainer is refused. Each process writes why to OUT/RANK."""
    warnings.simplefilter("ignore")
    made = stock(cache, out / "run", 1)
    try:
        made.train()
    except StreamError as error:
        (out / os.environ["RANK"]).write_text(f"step {made.state.global_step}: {error}")


def losses(trained: Any) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def by_hand(
    cache: Any, model: Any, *, epochs: int = 2, autocast: bool = False, **loss: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and weights of the same training in a loop of its own: `DistillLoader`, the hidden states of the
    model, `linear_kd_loss`, AdamW, clipping, and a learning rate that falls to 0."""
    source = DistillLoader(cache, batch_size=SIZE, micro_tokens=10_000, seed=42)
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others}], lr=0.01, weight_decay=0.0)
    steps, found = epochs * len(source), []
    model.train()
    for number, step in zip(range(steps), source.steps(), strict=False):
        (batch,) = step.micro_batches
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            out = linear_kd_loss(
                hidden, model.lm_head.weight, batch.targets, batch.labels, num_items=step.count, **(LOSS | loss)
            )
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - number / steps)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(out.loss.detach()))
    return found, weights(model)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(cache: Path, out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Train by each of some arguments, in a process of several. The first one writes losses, measures and weights to
    OUT/NAME.pt."""
    from accelerate.state import AcceleratorState

    warnings.simplefilter("ignore")
    for name, changes in runs.items():
        changes = dict(changes)
        resume = changes.pop("resume", None)
        made = trainer(cache, out / name, student(attention_dropout=changes.pop("dropout", 0.0)), **changes)
        made.train(resume_from_checkpoint=resume)
        measures = made.evaluate()
        state = made.accelerator.get_state_dict(made.model)
        if made.is_world_process_zero():
            torch.save([losses(made), measures, state], out / f"{name}.pt")
        made.accelerator.free_memory()
        AcceleratorState._reset_state()  # of DDP or FSDP2, for the whole process
    torch.distributed.destroy_process_group()
