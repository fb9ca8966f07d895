"""Projectors: from the width of a student's states to the codes of a teacher's. Trained, and not exported."""

import hashlib

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Base class: the optimizer has a group of its own for the parameters of projectors, with a rate of its own."""


class LinearProjector(Projector):
    """Each state, divided by its root mean square, times a matrix, plus a bias: `[N, D]` to coordinates `[N, W]`.

    The codes of a teacher's states are coordinates of x / rms(x) in an orthonormal basis, so both sides are free of
    scale, and the matrix learns the basis with the rest. At first it is random, of a seed and a name, and maps states
    to vectors of root mean square near 1; a training may fit it to its first batch (`LeastSquares`).

    width: D. target_width: W. dtype: of the weights.
    """

    def __init__(
        self,
        width: int,
        target_width: int,
        *,
        seed: int = 0,
        name: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, drawn(width, target_width, seed, name, dtype))

    def forward(self, states_ND: Tensor) -> Tensor:
        return nn.functional.linear(unit(states_ND).to(self.weight.dtype), self.weight, self.bias)


class LeastSquares:
    """The weights of a linear projector with which its outputs for some states are nearest to their coordinates.

    Sums of products are added up, in float64, so that neither micro-batches nor processes change the result. A ridge of
    `RIDGE` per state keeps weights small where there are few.
    """

    RIDGE = 0.01

    def __init__(self, width: int, target_width: int, device: torch.device) -> None:
        self.width = width
        self.sums = torch.zeros(width + 1, width + 1 + target_width, dtype=torch.float64, device=device)

    def add(self, states_ND: Tensor, coordinates_NW: Tensor) -> None:
        """Add N states and what they should be mapped to."""
        x = torch.nn.functional.pad(unit(states_ND.detach()).double(), (0, 1), value=1.0)
        self.sums += x.T @ torch.cat([x, coordinates_NW.double()], 1)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight `[W, D]` and bias `[W]`; of all zeros without any state."""
        products, wanted = self.sums[:, : self.width + 1], self.sums[:, self.width + 1 :]
        count = products[-1, -1].clamp(min=1.0)
        ridge = torch.full_like(products[-1], float(self.RIDGE)) * count
        ridge[-1] = 1e-9 * count  # none for the bias
        solution = torch.linalg.solve(products + ridge.diag(), wanted)
        # contiguous: an all-reduce over gloo takes the memory of other tensors for theirs
        return solution[:-1].T.contiguous(), solution[-1].contiguous()


class MapProjector(Projector):
    """A 1x1 convolution of maps `[B, C, H, W]` to C' channels, at first random (FitNets, Romero et al. 2015)."""

    def __init__(
        self,
        channels: int,
        target_channels: int,
        *,
        seed: int = 0,
        name: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weight, bias = drawn(channels, target_channels, seed, name, dtype)
        self.weight, self.bias = nn.Parameter(weight[:, :, None, None]), nn.Parameter(bias)

    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.conv2d(maps.to(self.weight.dtype), self.weight, self.bias)


def drawn(width: int, target_width: int, seed: int, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix and a bias of zeros, by a seed and a name alone: vectors of root mean square 1 keep about that."""
    digest = hashlib.sha256(f"{seed},{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    weight = torch.randn(target_width, width, generator=generator) / width**0.5
    return weight.to(dtype), torch.zeros(target_width, dtype=dtype)


def unit(states_ND: Tensor) -> Tensor:
    """States divided by their root mean square, in float32 at least."""
    states = states_ND.to(torch.promote_types(states_ND.dtype, torch.float32))
    # the epsilon keeps the gradient finite where a state is all zeros
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + torch.finfo(states.dtype).eps)


def projector_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all projectors in a module."""
    return [p for part in module.modules() if isinstance(part, Projector) for p in part.parameters()]
