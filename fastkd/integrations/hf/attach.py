"""attach: a causal model of transformers whose forward computes the distillation loss, if it is given targets."""

from typing import Any


def attach(model: Any, objective: Any = None, **settings: Any) -> Any:
    """The model itself, whose forward with `kd_*` tensors returns an output with the distillation loss."""
    raise NotImplementedError


def detach(model: Any) -> Any:
    """The model as it was before `attach`."""
    raise NotImplementedError
