"""DistillMixin: a subclass of transformers' Trainer that trains from a cache; `DistillTrainer` is Trainer with it.

The gradient of an optimizer step is that of Σ losses / count, over the positions of all micro-batches of all processes,
whatever the number of these: the source knows the count of the whole step, the model divides by it, and the loss is
multiplied by the number of processes over which DDP, FSDP2 or DeepSpeed average.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import TrainError
from ...evaluate.measures import MEASURES
from ...kernels import KDError
from ...settings import TrainSettings
from ...settings_changes import AttachChanges, changed
from ...stream.buckets import BUCKETS, up_to
from ...stream.tensors import FACTS
from ...train.cards import write_card
from ...train.inputs import CacheInputs
from ...train.objective import Objective, TokenKD
from ...train.parallel import compile_layers
from ...train.result import CARD, command_line, describe_cache, machine
from ...train.settings_check import check_settings
from ...utils.atomic import write_text
from ...utils.distributed import ALONE, Processes
from .attach import LOSS_SETTINGS, attach, is_attached
from .checks import check_arguments, check_given, check_processes, check_resume, write_state
from .dataset import DistillDataset
from .evaluation import HeldOutSplit, full_eval, held_out_split, less_is_better
from .output import parts_of
from .sft import begin_sft, forward_of_trl

_Base: Any = object  # Trainer, or a subclass of it, comes after the mixin
_DATA = ("layout", "shards_open", "threads", "skip", "max_positions", "allow_partial")
_OTHER = ("evaluate_positions", "allow_other_tokenizer")
SETTINGS = LOSS_SETTINGS | {*_DATA, *_OTHER}
"""The fields of TrainSettings that a DistillTrainer takes; the rest is said by its TrainingArguments."""


class TrainerChanges(AttachChanges, total=False):
    """Fields of `TrainSettings` that a DistillTrainer takes, and what it hands on to Trainer and SFTTrainer."""

    layout: Literal["padded", "packed"]
    shards_open: int
    threads: int
    skip: int
    max_positions: int | None
    allow_partial: bool
    evaluate_positions: int | None
    allow_other_tokenizer: bool
    data_collator: Any
    eval_dataset: Any
    processing_class: Any
    model_init: Any
    compute_metrics: Any
    callbacks: Any
    optimizers: Any
    optimizer_cls_and_kwargs: Any
    preprocess_logits_for_metrics: Any
    peft_config: Any
    formatting_func: Any


class DistillMixin(_Base):  # type: ignore[misc]
    """Before Trainer, or a subclass of it, among the bases of a class: `class Mine(DistillMixin, SFTTrainer)`.

    model: a causal model of transformers (or one with adapters of PEFT), a folder or a name on the Hub (loaded in
        float32; without weights: new ones), or None with model_init.
    args: TrainingArguments. An optimizer step has per_device_train_batch_size · gradient_accumulation_steps ·
        processes sequences of the cache, in the order of data_seed (or seed).
    cache: a `Cache`, what `open_cache` takes, or a mixture [(cache, weight), ...].
    objective: an `Objective`; default: `TokenKD` of the settings, or, without any, that of a model which you attached.
    full_logits: accept a model whose LM head is not one matrix; see `attach`. card_teacher: the teacher's name, for the
        model card, which does not name it otherwise.
    changes: the fields of TrainSettings that say what the loss is (alpha, temperature, divergence, treatment, beta,
        skew, and alpha_end, temperature_end with their schedules), how the cache is read (layout, shards_open, threads,
        skip, max_positions, allow_partial), evaluate_positions and allow_other_tokenizer. Everything else goes to the
        Trainer: callbacks, processing_class, optimizers, ...

    The held-out split of the cache is the eval_dataset, unless there is another. Raises TrainError, StreamError and
    CacheError, before anything is trained, for a model, settings or arguments that do not fit the cache.
    """

    model: Any
    model_wrapped: Any
    eval_dataset: Any
    control: Any
    loss_is_scaled_for_ga = True  # the loss is divided by the count of the whole step, not by a micro-batch's

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        cache: Any,
        objective: Objective | None = None,
        full_logits: bool = False,
        card_teacher: str | None = None,
        **changes: Unpack[TrainerChanges],
    ) -> None:
        own = {name: value for name, value in changes.items() if name in SETTINGS}
        settings = {name: value for name, value in changes.items() if name not in SETTINGS}
        if args is not None:
            check_arguments(args)
        check_given(settings)
        self._kd_settings = changed("DistillTrainer", TrainSettings(), own)
        if objective is not None and (lost := sorted(own.keys() & LOSS_SETTINGS)):
            raise TrainError(f"objective: got one and {', '.join(lost)}; expected one of the two.")
        if objective is None and not own.keys() & LOSS_SETTINGS and is_attached(model) and not model._kd.of_trainer:
            objective = model._kd.objective
        self._kd_inputs = CacheInputs(cache)
        check_settings(self._kd_settings, self._kd_inputs.spec, objective)
        self._kd_objective = TokenKD.from_settings(self._kd_settings) if objective is None else objective
        self._kd_full_logits, self._kd_card_teacher = full_logits, card_teacher
        self._kd_dataset: DistillDataset | None = None
        self._kd_processes = ALONE
        self._kd_buckets: tuple[int, ...] | None = None
        self._kd_parts: dict[str, Tensor] = {}
        self._kd_logged: dict[str, float] = {}
        if isinstance(model, (str, Path)):
            model, settings = self._kd_load(model, args, settings)
        self._kd_begin(model, args, settings)
        self.model_accepts_loss_kwargs = True  # the count of a step is passed to the loss
        check_processes(self.args.n_gpu)
        self._kd_attach(self.model)
        self._kd_set_up()

    # ---- the model

    def _kd_load(self, source: str | Path, args: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model of a folder or a name, and the arguments of the Trainer, with its tokenizer."""
        from ...train.student import make_student

        seed = 0 if args is None else int(args.seed)
        made = make_student(source, self._kd_inputs.spec, replace(self._kd_settings, seed=seed))
        if made.tokenizer is not None:
            settings.setdefault("processing_class", made.tokenizer.backend)
        return made.student.model, settings

    def _kd_begin(self, model: Any, args: Any, settings: dict[str, Any]) -> None:
        """Call the constructor of the Trainer. It has a dataset for evaluations if something was held out."""
        problem = self._kd_inputs.nothing_held_out()
        if problem and settings.get("eval_dataset") is None and getattr(args, "eval_strategy", "no") != "no":
            raise TrainError(
                f"eval_strategy: got {getattr(args.eval_strategy, 'value', args.eval_strategy)!r}, and {problem} "
                "Capture with held_out, or pass eval_dataset."
            )
        held_out = None if problem else HeldOutSplit([], [], 1)
        with _whole(args):
            self._kd_construct(model, args, settings, held_out)

    def _kd_construct(self, model: Any, args: Any, settings: dict[str, Any], held_out: HeldOutSplit | None) -> None:
        if (sft := sys.modules.get("trl.trainer.sft_trainer")) is not None and isinstance(self, sft.SFTTrainer):
            begin_sft(super().__init__, self, model, args, settings, held_out)
            return
        settings.setdefault("eval_dataset", held_out)
        super().__init__(model, args, **settings)

    def _kd_attach(self, model: Any) -> Any:
        if is_attached(model):  # by its user, or by another trainer, of another loss
            model._kd.use(model, self._kd_objective)
        else:
            attach(model, self._kd_objective, full_logits=self._kd_full_logits)
            model._kd.of_trainer = True
        self._kd_check_fits(model)
        if self.args.torch_compile:  # the layers, which are then compiled once, not once for every shape
            options = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
            compile_layers(model._kd.student(model), **{name: o for name, o in options.items() if o is not None})
        return model

    def _kd_check_fits(self, model: Any) -> None:
        from ...models.tokenizers import load_tokenizer
        from ...train.student import check_fits

        processing = getattr(self, "processing_class", None)
        tokenizer = None
        if callable(processing) and hasattr(processing, "get_vocab"):
            tokenizer = load_tokenizer(processing)
        allowed = self._kd_settings.allow_other_tokenizer
        check_fits(model._kd.student(model), tokenizer, self._kd_inputs.spec, allow_other_tokenizer=allowed)

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        # the first call comes from the constructor of the Trainer, which attaches its model afterwards
        return self._kd_attach(model) if self._kd_dataset is not None else model

    # ---- the data

    def _kd_set_up(self) -> None:
        """Open the training split, and the held-out one."""
        args = self.args
        if args.world_size > 1:
            import torch.distributed as dist

            group = dist.new_group(backend="gloo")
            self._kd_processes = Processes(args.process_index, args.world_size, args.device, group)
        else:
            self._kd_processes = Processes(0, 1, args.device)
        if args.torch_compile:
            self._kd_buckets = up_to(BUCKETS, self.model._kd.student(self.model).max_positions)
        self.train_dataset = self._kd_open(self._train_batch_size)
        if isinstance(self.eval_dataset, HeldOutSplit):
            less_is_better(args)
            most = self._kd_settings.evaluate_positions
            self.eval_dataset = held_out_split(
                self._kd_inputs, self._kd_processes, batch_tokens=self._kd_settings.micro_tokens, max_positions=most,
                allow_partial=self._kd_settings.allow_partial,
            )  # fmt: skip

    def _kd_open(self, batch_size: int) -> DistillDataset:
        """The dataset with `batch_size` sequences per micro-batch on each process."""
        args, processes = self.args, self._kd_processes
        size = batch_size * args.gradient_accumulation_steps * processes.world_size
        if self._kd_dataset is not None:
            if self._kd_dataset.source.fingerprint["batch_size"] == size:
                return self._kd_dataset
            self._kd_dataset.close()
        mixture = list(zip(self._kd_inputs.caches, self._kd_inputs.weights, strict=True))
        self._kd_dataset = DistillDataset(
            mixture[0][0] if len(mixture) == 1 else mixture,
            batch_size=size,
            micro_batches=args.gradient_accumulation_steps,
            rank=processes.rank,
            world_size=processes.world_size,
            reduce=processes.reduce,
            seed=args.seed if args.data_seed is None else args.data_seed,
            device=args.device,
            buckets=self._kd_buckets,
            **{name: getattr(self._kd_settings, name) for name in _DATA},
        )
        return self._kd_dataset

    def get_train_dataloader(self) -> Any:
        """Micro-batches of the cache, in its order, on this process's device."""
        self.train_dataset = dataset = self._kd_open(self._train_batch_size)
        loader = DataLoader(dataset, batch_size=1, sampler=dataset.sampler(), collate_fn=dataset.collate)
        return self.accelerator.prepare(loader)

    def num_examples(self, dataloader: Any) -> int:
        dataset = getattr(dataloader, "dataset", None)
        return dataset.sequences if isinstance(dataset, DistillDataset) else super().num_examples(dataloader)

    # ---- the loss

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch of a cache; of other inputs, as of a user's own eval_dataset, the Trainer's."""
        if FACTS not in inputs:
            with forward_of_trl(self):
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
        scheduled = self._kd_objective.schedule(self.state.global_step, self.state.max_steps)
        try:
            outputs = model(**inputs, kd_scheduled=scheduled)
        except KDError as error:
            raise TrainError(
                f"step {self.state.global_step + 1}: {error} If the student has diverged, use a lower learning_rate, a "
                "longer warm-up or a lower max_grad_norm."
            ) from error
        if self.model.training:
            for name, value in parts_of(outputs).items():
                self._kd_parts[name] = value.detach().float() + self._kd_parts.get(name, 0.0)
        loss = outputs["loss"] * self._kd_processes.world_size
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, and the positions that count in the whole step, which the source knows."""
        samples = list(islice(epoch_iterator, num_batches))
        if not samples or FACTS not in samples[0]:
            return super().get_batch_samples(iter(samples), len(samples), device)
        return samples, samples[0][FACTS].count

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0 and self._kd_parts:
            names = sorted(self._kd_parts)
            sums = self._kd_processes.sum_(torch.stack([self._kd_parts[name] for name in names]))
            self._kd_logged = dict(zip(names, (sums / steps).tolist(), strict=True))
            self._kd_parts, last = {}, self.state.max_steps
            ends = [self._kd_objective.schedule(step, last) for step in (0, last - 1, self.state.global_step - 1)]
            self._kd_logged |= {name: float(v) for name, v in ends[2].items() if ends[0][name] != ends[1][name]}
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and with the loss its parts, `hard` and `soft`, and what of the objective changes."""
        if "loss" in logs:
            logs |= self._kd_logged
            self._kd_logged = {}
        super().log(logs, *args, **kwargs)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures on the held-out split of the cache: PREFIX_loss and PREFIX_cross_entropy (the same), PREFIX_kl,
        PREFIX_agreement, PREFIX_accuracy, ... With another eval_dataset, that of the Trainer.

        Raises TrainError if nothing was held out when the cache was captured.
        """
        split = self.eval_dataset if eval_dataset is None else eval_dataset
        if split is None:
            raise TrainError(
                f"evaluate: {self._kd_inputs.nothing_held_out()} Capture with held_out, or pass eval_dataset."
            )
        if not isinstance(split, HeldOutSplit):
            theirs: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return theirs
        if self.compute_metrics is not None:
            from transformers.utils import logging

            logging.get_logger("transformers.trainer").warning_once(
                "compute_metrics is not called for the held-out split of a cache, only for an eval_dataset of your own."
            )
        begun, training = time.time(), self.model.training
        if len(self.accelerator._models) == 0:  # before a training, nothing is prepared
            prepare = self.accelerator.prepare if self.is_fsdp_enabled else self.accelerator.prepare_model
            given = {} if self.is_fsdp_enabled else {"evaluation_mode": True}
            prepared = prepare(self.model, **given)
            if self.is_fsdp_enabled:
                self.model = prepared
            self.model_wrapped = prepared
        try:
            with nullcontext() if self.is_in_train else full_eval(self.args, self.model):
                found = split.evaluate(self.model)
        finally:
            self.model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        seconds = time.time() - begun
        metrics |= {
            f"{metric_key_prefix}_runtime": round(seconds, 4),
            f"{metric_key_prefix}_samples_per_second": round(len(split) / seconds, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As of Trainer. resume_from_checkpoint=True starts from the first step if there is no checkpoint yet.

        Raises TrainError for a checkpoint of another cache, order or loss.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._kd_last_checkpoint()
        if resume_from_checkpoint:
            check_resume(Path(resume_from_checkpoint), self._kd_state())
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._kd_dataset is not None:
                self._kd_dataset.close()

    def _kd_last_checkpoint(self) -> str | None:
        from transformers.trainer_utils import get_last_checkpoint
        from transformers.utils import logging

        folder = Path(self.args.output_dir)
        found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if found is None and self.is_world_process_zero():
            logging.get_logger("transformers.trainer").warning(
                f"resume_from_checkpoint: there is no checkpoint in {folder} yet; training starts from the first step."
            )
        return found

    def _kd_state(self) -> dict[str, Any]:
        """What decides the trained model, beside the TrainingArguments."""
        assert self._kd_dataset is not None
        objective = self._kd_objective
        described = {"type": type(objective).__qualname__, **objective.describe()}
        return {"data": self._kd_dataset.source.fingerprint, "objective": described}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

            run = self._get_output_dir(trial=kwargs.get("trial", args[1] if len(args) > 1 else None))
            write_state(Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self._kd_state())
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        path = Path(output_dir or self.args.output_dir) / CARD
        before = path.read_text(encoding="utf-8") if path.exists() else None
        super()._save(output_dir, state_dict)
        if before is not None:  # PEFT adds lines to a card that is there, which would then pass for a person's
            write_text(path, before)

    def create_model_card(self, *args: Any, model_name: str | None = None, **kwargs: Any) -> None:
        """Write README.md, as `fastkd train` does: what the student was distilled from, and its last evaluation. A card
        that a person wrote or changed is left."""
        if not self.is_world_process_zero():
            return
        folder, student = Path(self.args.output_dir), self.model._kd.student(self.model)
        schedule = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
        size = self.get_total_train_batch_size(self.args)
        of_args = {"rate": self.args.learning_rate, "rate_schedule": schedule, "batch_size": size, "batch_tokens": None}
        measured = {"step": self.state.global_step, "steps": self.state.max_steps, "evaluation": self._kd_measured()}
        run = {
            "student": {"name": model_name or folder.name, "parameters": student.parameters_and_bytes[0]},
            "caches": [describe_cache(cache) for cache in self._kd_inputs.caches],
            "settings": {**asdict(self._kd_settings), **of_args, "seed": self.args.seed},
            "command": command_line(),
            "machine": machine(self.args.device, self.args.world_size),
            "report": measured,
        }
        write_card(folder, run, name=model_name or folder.name, repo=self.hub_model_id, teacher=self._kd_card_teacher)

    def _kd_measured(self) -> dict[str, float]:
        """The last evaluation on the held-out split."""
        for line in reversed(self.state.log_history):
            found = {name: line[f"eval_{name}"] for name in MEASURES if f"eval_{name}" in line}
            if found:
                return found
        return {}


@contextmanager
def _whole(args: Any) -> Iterator[None]:
    """While a Trainer is constructed: keep accelerate from compiling its model as a whole, as `torch_compile` says."""
    backend = getattr(args, "torch_compile_backend", None)
    if backend is not None:
        args.torch_compile_backend = "no"
    try:
        yield
    finally:
        if backend is not None:
            args.torch_compile_backend = backend
