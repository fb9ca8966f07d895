"""The optimizer, AdamW with weight decay for matrices only, and gradient clipping."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import TrainError
from ..settings import TrainSettings
from ..utils.distributed import is_dtensor


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trained parameters in two groups: those with weight decay, then those without it: embeddings (and an LM head tied
    to one), biases, norms and all else with fewer than two dimensions."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decays}
    rest = [p for p in trained if id(p) not in chosen]
    groups = ({"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0})
    return [dict(group) for group in groups if group["params"]]


def make_optimizer(model: nn.Module, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW with these settings; the rate is set at every step. Raises TrainError if no parameter is trained."""
    groups = decay_groups(model, settings.weight_decay)
    if not groups:
        raise TrainError("student: none of its parameters requires a gradient; there is nothing to train.")
    return torch.optim.AdamW(
        groups, lr=settings.rate, betas=settings.adam_betas, eps=settings.adam_eps, fused=device.type == "cuda"
    )


def clip_(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor:
    """Clip the norm of all gradients to `most` (None: do not), and return the norm before that, 0-d. With FSDP2, every
    process calls it."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), torch.inf if most is None else most)
    return norm.full_tensor() if is_dtensor(norm) else norm
