"""How much of a peer's distribution its targets have to keep: the gradient against that of the whole distribution.

python -m fastkd.bench.mutual_targets PEER STUDENT [--positions 256]

Two causal models of one vocabulary (folders). The error of the gradient in the student's hidden states, position by
position, and in its LM head, summed over positions (where noise averages out and bias stays), relative to the norm of
the dense one.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from fastkd.demo.corpus import language_reference
from fastkd.kernels import TopKConfig, linear_kd_loss, linear_topk_targets
from fastkd.models.tokenizers import load_tokenizer
from fastkd.settings import TrainSettings
from fastkd.train.student import make_student

WAYS = ((16, 0), (32, 0), (64, 0), (128, 0), (256, 0), (1024, 0), (48, 16), (32, 32), (96, 32), (192, 64))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs=2)
    parser.add_argument("--positions", type=int, default=256)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = next(language_reference())[20_000:40_000]
    ids = load_tokenizer(asked.models[0], trust_remote_code=False).encode(text)
    tokens = torch.tensor(ids[: asked.positions])[None]
    outputs: list[tuple[Tensor, Tensor]] = []
    for name in asked.models:
        student = make_student(name, None, TrainSettings()).student.eval()
        with torch.no_grad():
            model: Any = student.model
            hidden = model.base_model(input_ids=tokens).last_hidden_state[0]
        outputs.append((hidden, model.get_output_embeddings().weight.detach()))
    (peer, peer_head), (own, own_head) = outputs
    labels = tokens[0].roll(-1)
    for temperature in (1.0, 2.0):
        with torch.no_grad():
            q = (peer @ peer_head.T / temperature).softmax(-1)
            p = (own @ own_head.T / temperature).softmax(-1)
            g = temperature * (p - q) / len(own)
            dense = (g @ own_head, g.T @ own)
        print(
            f"T = {temperature:g}, KL {float((q * (q.clamp(min=1e-30) / p).log()).sum(1).mean()) * temperature**2:.3f}"
        )
        for k, draws in WAYS:
            config = TopKConfig(k=k, draws=draws, temperatures=tuple(sorted({1.0, temperature})))
            begun = time.process_time()
            targets = linear_topk_targets(peer, peer_head, config=config)
            seconds = time.process_time() - begun
            x, w = own.clone().requires_grad_(), own_head.clone().requires_grad_()
            loss = linear_kd_loss(x, w, targets, labels, alpha=0.0, temperature=temperature).loss
            found = torch.autograd.grad(loss, [x, w])
            rows = ((found[0] - dense[0]).norm(dim=1) / dense[0].norm(dim=1)).mean()
            head = (found[1] - dense[1]).norm() / dense[1].norm()
            print(f"  {k:4} + {draws:2}: states {float(rows):.3f}, LM head {float(head):.3f}, {seconds:.2f} s")


if __name__ == "__main__":
    main()
