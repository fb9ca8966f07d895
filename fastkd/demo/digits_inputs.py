"""What the digits task starts from: scikit-learn's handwritten digits, rotated and shifted at random, the split that is
held out, and a small convolutional network with its training on labels."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample

from ..data.examples import Examples
from ..data.packing import held_out_documents
from ..errors import DataError
from ..utils.progress import Progress
from ..utils.splitmix import mixed

CLASSES = 10
DEGREES, PIXELS = 15, 1  # maximum rotation and shift
HELD_OUT = 0.2
BATCH, RATE = 64, 3e-3  # of the training on labels


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
    return np.flatnonzero(~held_out_documents(np.arange(len(data), dtype=np.int32), HELD_OUT, seed))


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


class Net(nn.Module):
    """Images `[B, 1, 8, 8]` to logits `[B, 10]`. width: channels of the first layer; the third has 4 * width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(4 * width * 4 * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(images).flatten(1))
        return logits


def new_net(width: int, seed: int) -> Net:
    """A network with random weights. Does not change torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(width)


def train_teacher(width: int, data: Examples, seed: int, *, epochs: int, progress: str = "none") -> Net:
    """A network trained on the labels of the training digits, with new augmentations each epoch."""
    model, numbers = new_net(width, seed), training_digits(data, seed)
    steps = epochs * -(-len(numbers) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    random = np.random.default_rng(seed)
    with Progress(steps, unit="step", mode=progress) as shown:
        for _ in range(epochs):
            order = random.permutation(numbers)
            for begin in range(0, len(order), BATCH):
                batch = order[begin : begin + BATCH]
                images = data.read(batch, random.integers(0, 2**63, len(batch)))
                loss = cross_entropy(model(images), torch.from_numpy(data.labels(batch)))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                shown.add(1)
    return model.eval()
