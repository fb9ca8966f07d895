"""What a DistillTrainer refuses before the first step, each in one sentence."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TrainError
from ...train.settings_check import check_same
from ...utils.atomic import read_sealed, write_json

STATE = "fastkd.json"
"""Beside trainer_state.json in a checkpoint: what the run was begun with."""
FORMAT = "fastkd-trainer"


def check_arguments(args: Any) -> None:
    """Raise TrainError for TrainingArguments that a training from a cache cannot follow."""
    sharded = bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    if getattr(args, "fp16", False) and sharded:
        raise TrainError(
            "fp16: got it with FSDP, whose gradients a loss scaler does not reach; expected bf16=True, which needs no "
            "scaling of the loss, or fp16 without FSDP."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False) and (sharded or getattr(args, "deepspeed", None)):
            raise TrainError(
                f"{name}: got it with {'FSDP' if sharded else 'DeepSpeed'}, whose weights keep their type; expected "
                "False. Leave it out: evaluations run in the precision of the training."
            )
    if getattr(args, "label_smoothing_factor", 0):
        raise TrainError(
            f"label_smoothing_factor: got {args.label_smoothing_factor}; expected 0, as the soft targets of the cache "
            "smooth the labels. Leave it out, or choose alpha."
        )
    accelerator = getattr(args, "accelerator_config", None)
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name, None):
            raise TrainError(
                f"accelerator_config: got {name}=True; expected False, as every process reads its own share of a step "
                "from the cache."
            )
    if (parallel := getattr(args, "parallelism_config", None)) is not None:
        for name in ("tp_size", "cp_size", "sp_size"):
            if (size := getattr(parallel, name, 1)) > 1:
                raise TrainError(
                    f"parallelism_config: got {name}={size}; expected 1: DistillTrainer divides steps over processes "
                    "(DDP, FSDP2, DeepSpeed), not sequences or layers."
                )


def check_given(given: Mapping[str, Any]) -> None:
    """Raise TrainError for arguments of a Trainer that say what its data or its loss is."""
    if given.get("train_dataset") is not None:
        raise TrainError(
            "train_dataset: got one; expected none, as a DistillTrainer trains on the sequences of its cache. Leave it "
            "out, or capture a cache from it (fastkd.capture)."
        )
    if given.get("compute_loss_func") is not None:
        raise TrainError(
            "compute_loss_func: got one; expected none, as the loss is computed inside the forward of the model. Give "
            "the loss as settings (alpha, temperature, divergence) or as an objective."
        )


def check_processes(n_gpu: int) -> None:
    """Raise TrainError for DataParallel, which divides the tensors of a micro-batch."""
    if n_gpu > 1:
        raise TrainError(
            f"DistillTrainer: got {n_gpu} GPUs in one process, which transformers would use by DataParallel; expected "
            "one. Start it with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
        )


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what a run was begun with into a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE, {"format": FORMAT, "version": 1, "state": dict(state)})


def check_resume(folder: Path, ours: Mapping[str, Any]) -> None:
    """Raise TrainError if a checkpoint is not of a run with the same data and loss, naming what differs."""
    import json

    path = folder / STATE
    try:
        document = read_sealed(path)
    except FileNotFoundError as error:
        raise TrainError(
            f"{folder}: got a checkpoint without {STATE}, so not of a DistillTrainer; expected one that knows its "
            "cache. Train into another folder, or leave resume_from_checkpoint out."
        ) from error
    except (OSError, ValueError) as error:
        raise TrainError(f"{path}: cannot be read ({error}). Resume from an older checkpoint.") from error
    if document.get("format") != FORMAT or document.get("version") != 1:
        raise TrainError(f"{path}: got something else; expected what a DistillTrainer wrote. Resume from an older one.")
    check_same(document["state"], json.loads(json.dumps(dict(ours))), str(folder))
