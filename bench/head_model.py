"""The time of the loss fused with the LM head on a GPU, on paper: a prediction, from the rates of a product and a copy.

What is assumed:

- the three products run at the rate of a large one, whole or in chunks, and so does the bare product they are over;
- the loss on a chunk's logits takes LOSS times a read and a write of them, and runs beside nothing else;
- with more than one chunk, the sum of the weight's gradient in float32 is written by the first and read and written by
  each other one. A product computes while it waits for memory: SEEN of that traffic shows. (Of a prototype on an H100,
  17.6, 10.4 and 2.16 ms of products took 20.2, 13.1 and 3.0: with the loss at 1.16 times the copy, 0.2 to 0.5 showed.)
- then that sum is read, and the gradient written in the weight's type, at the rate of a copy;
- launches, the gradient in hidden states, targets and totals take no time.
"""

from dataclasses import dataclass

import torch

from fastkd.kernels.loss.linear import default_chunk, weight_gradient_type

LOSS = 1.2
SEEN = 0.5


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of a large product, and TB/s of a large copy, read plus written."""

    product: float
    copy: float


H100 = Rates(735, 3.0)  # measured, bfloat16


@dataclass(frozen=True)
class HeadTime:
    """Milliseconds by part. chunks: of tokens."""

    products: float
    loss: float
    sums: float
    cast: float
    chunks: int

    @property
    def total(self) -> float:
        """All parts."""
        return self.products + self.loss + self.sums + self.cast

    @property
    def share(self) -> float:
        """The three bare products over the total."""
        return self.products / self.total

    def __str__(self) -> str:
        parts = {"products": self.products, "loss": self.loss, "sums": self.sums, "cast": self.cast}
        return f"{self.chunks} chunk{'s' * (self.chunks != 1)}: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items())


def predict(n: int, d: int, v: int, rates: Rates = H100, *, loss: float = LOSS, seen: float = SEEN) -> HeadTime:
    """Forward and backward of bfloat16 hidden states `[n, d]` and weight `[v, d]`, both with gradients.

    loss: of given logits, over one read and one write. seen: the share of the sums' traffic that shows.
    """
    weight = torch.empty(v, d, dtype=torch.bfloat16, device="meta")
    once = weight_gradient_type(weight, torch.bfloat16, n, 0) == torch.bfloat16
    chunks = 1 if once else -(-n // default_chunk(torch.device("cuda"), v, 2, rows=n, longer=d))
    # a bare product writes the gradient once, in two bytes an element
    sums, cast = (0, 0) if once else (4 + 8 * (chunks - 1) - 2, 4 + 2)
    move = 1e-9 / rates.copy  # milliseconds a byte
    return HeadTime(
        products=6e-9 * n * d * v / rates.product,
        loss=loss * 2 * n * v * 2 * move,
        sums=seen * sums * v * d * move,
        cast=cast * v * d * move,
        chunks=chunks,
    )
