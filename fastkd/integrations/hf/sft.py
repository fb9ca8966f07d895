"""TRL's SFTTrainer on a cache: what its constructor wants, and a training from a cache does not have."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .evaluation import HeldOutSplit


def begin_sft(
    begin: Callable[..., None],
    trainer: Any,
    model: Any,
    args: Any,
    settings: dict[str, Any],
    held_out: HeldOutSplit | None,
) -> None:
    """Call the constructor of an SFTTrainer, `begin`, which wants datasets of rows: it gets one row, which nothing
    reads. held_out: the eval_dataset, unless the settings have one."""
    from datasets import Dataset

    row = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})
    if (given := settings.pop("eval_dataset", None)) is not None or held_out is not None:
        settings["eval_dataset"] = row if given is None else given
    begin(model, args, train_dataset=row, **settings)
    if given is None:
        trainer.eval_dataset = held_out
    # the fused LM head that TRL puts before the model's forward is of its own loss
    trainer._kd_trl_forward = vars(trainer.model).pop("forward", None)


@contextmanager
def forward_of_trl(trainer: Any) -> Iterator[None]:
    """While an SFTTrainer computes the loss of rows, as of its user's own eval_dataset: with the forward that it put
    before the model's. Other trainers have none."""
    forward = getattr(trainer, "_kd_trl_forward", None)
    if forward is None:
        yield
        return
    held = vars(trainer.model)
    before = {name: held[name] for name in ("forward",) if name in held}
    held["forward"] = forward
    try:
        yield
    finally:
        del held["forward"]
        held.update(before)
