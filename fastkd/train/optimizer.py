"""The optimizer: AdamW, with weight decay where it belongs, and the norm of a step's gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import TrainError
from ..settings import TrainSettings


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameters in two groups, those that decay first: matrices that are no embedding (a head that is the embedding is
    one). Biases, norms and all else of less than two dimensions do not; nor does what is not trained stand in either.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decays}
    rest = [p for p in trained if id(p) not in chosen]
    groups = ({"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0})
    return [dict(group) for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW of the settings; the rate is set at every step. TrainError where no parameter is to be trained."""
    groups = decay_groups(model, settings.weight_decay)
    if not groups:
        raise TrainError("student: none of its parameters requires a gradient; there is nothing to train.")
    return torch.optim.AdamW(
        groups, lr=settings.rate, betas=settings.adam_betas, eps=settings.adam_eps, fused=device.type == "cuda"
    )


def clip_(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor:
    """The norm of all gradients together, 0-d, before they are scaled down to `most`. Of FSDP2's parts, every process
    calls it."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), torch.inf if most is None else most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
