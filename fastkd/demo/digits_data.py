"""scikit-learn's handwritten digits, rotated and shifted at random, and the split that is held out."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from ..data.examples import Examples
from ..data.packing import held_out
from ..errors import DataError
from ..utils.splitmix import mixed

CLASSES = 10
DEGREES, PIXELS = 15, 1  # maximum rotation and shift
HELD_OUT = 0.2


def digits(seed: int, *, images: int, copies: int) -> Examples:
    """The first `images` of the 1797 images `[1, 8, 8]`, from 0 to 1, with labels, each in `copies` augmented copies.

    Raises DataError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits come with scikit-learn ({error}). Use pip install 'fastkd[digits]'.") from error
    found = load_digits()
    pixels = torch.from_numpy((found.images[:images] / 16).astype(np.float32))[:, None]
    fingerprint = f"turned by up to {DEGREES} degrees, shifted by up to {PIXELS} pixel"
    return Examples(
        pixels, labels=found.target[:images], augment=augment, fingerprint=fingerprint, copies=copies, seed=seed
    )


def training_digits(data: Examples, seed: int) -> NDArray[np.int64]:
    """The numbers of the digits that a capture with this seed does not hold out."""
    return np.flatnonzero(~held_out(np.arange(len(data), dtype=np.int32), HELD_OUT, seed))


def augment(images: Tensor, seeds: NDArray[np.int64]) -> Tensor:
    """Each image `[1, h, w]` rotated and shifted by its own seed, independently of the rest of the batch."""
    bits = mixed(seeds.astype(np.uint64)[:, None] ^ mixed(np.arange(3, dtype=np.uint64)))
    uniform = (bits >> np.uint64(11)).astype(np.float64) / 2**52 - 1  # from -1 to 1
    angle = np.deg2rad(DEGREES * uniform[:, 0])[:, None, None]
    h, w = images.shape[-2:]
    # source of each pixel of the new image: 0 is the middle, -1 and 1 are the edges
    y, x = np.meshgrid((2 * np.arange(h) + 1) / h - 1, (2 * np.arange(w) + 1) / w - 1, indexing="ij")
    dx, dy = (2 * PIXELS / n * u[:, None, None] for n, u in ((w, uniform[:, 1]), (h, uniform[:, 2])))
    grid = np.stack([np.cos(angle) * x - np.sin(angle) * y + dx, np.sin(angle) * x + np.cos(angle) * y + dy], -1)
    return grid_sample(images, torch.from_numpy(grid.astype(np.float32)), align_corners=False)
