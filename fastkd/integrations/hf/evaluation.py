"""The held-out split of a cache as the evaluation of a Trainer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...evaluate.measures import MEASURES
from ...settings import TrainSettings
from ...stream.batch import AnyBatch
from ...stream.tensors import batch_to_tensors
from ...train.held_out import means
from ...train.inputs import CacheInputs
from ...utils.distributed import Processes


class HeldOutSplit:
    """What stands for the held-out split of a cache where a Trainer wants an `eval_dataset`.

    measures: `fastkd.evaluate` of a student on each cache of a mixture. weights: their shares. It has as many items as
    the split has sequences, which are read by `DistillMixin.evaluate` alone.
    """

    def __init__(self, measures: Sequence[Any], weights: Sequence[float], sequences: int) -> None:
        self.measures, self.weights, self._sequences = measures, weights, sequences

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> Any:
        raise TypeError("HeldOutSplit: got a request for an item; expected Trainer.evaluate of a DistillMixin.")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures by name. All processes call it, with an attached model, in whose forward parameters are complete.

        loss: the cross-entropy, as of a causal model of transformers; kl: from the teacher at T = 1, by the draws of
        the cache, if it has some, or with all tokens outside the top-k entries as one outcome.
        """
        student = _Evaluated(model)
        found = means([measure(student) for measure in self.measures], self.weights)
        kl = found.get("kl_sampled", found.get("kl_bucket"))
        first = {"loss": found["cross_entropy"], **({} if kl is None else {"kl": kl})}
        return first | {name: found[name] for name in MEASURES if name in found}


def held_out_split(
    inputs: CacheInputs, processes: Processes, *, batch_tokens: int, max_positions: int | None, allow_partial: bool
) -> HeldOutSplit | None:
    """The evaluation on the held-out split of the caches; None if nothing was held out. Raises StreamError."""
    if inputs.nothing_held_out():
        return None
    settings = TrainSettings(
        micro_tokens=batch_tokens, evaluate_positions=max_positions, allow_partial=allow_partial
    )  # fmt: skip
    held = inputs.held_out(settings, processes)
    assert held.sequences is not None
    return HeldOutSplit(held.measures, held.weights, held.sequences)


def less_is_better(args: Any) -> None:
    """Of TrainingArguments whose metric_for_best_model is a measure that is better the lower it is: greater_is_better
    is False. transformers takes every name that does not end in "loss" for better the higher it is."""
    name = (args.metric_for_best_model or "").removeprefix("eval_")
    if name == "kl" or (name in MEASURES and MEASURES[name].better == "lower"):
        args.greater_is_better = False


@contextmanager
def full_eval(args: Any, model: nn.Module) -> Iterator[None]:
    """Context manager, for an evaluation outside of a training: with bf16_full_eval or fp16_full_eval, weights and
    buffers are of that type. Afterwards they are what they were, which a Trainer's own evaluation leaves rounded."""
    half = torch.float16 if args.fp16_full_eval else torch.bfloat16 if args.bf16_full_eval else None
    tensors = [] if half is None else [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(half)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


class _Evaluated(nn.Module):
    """An attached model, as `fastkd.evaluate` takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def logits(self, batch: AnyBatch, rows: Tensor) -> Tensor:
        """Logits `[m, V]` at the positions that count, which are all that an evaluation asks for."""
        assert rows is batch.targets.index
        device = next(self.model.parameters()).device
        tensors = {name: value.to(device) for name, value in batch_to_tensors(batch).items()}
        with torch.no_grad():
            logits: Tensor = self.model(**tensors, kd_logits=True).logits
        return logits
