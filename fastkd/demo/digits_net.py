"""A small convolutional network for digits, and its training on labels: the teacher of the digits task."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.examples import Examples
from ..utils.progress import Progress
from .digits_data import CLASSES, training_digits

BATCH, RATE = 64, 3e-3


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
