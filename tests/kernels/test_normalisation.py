"""One batch, however it is cut: micro-batches of unequal counts, and two processes, give the same gradients."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from cases import case
from forked import Forked
from test_linear import close, grads, head_case
from test_matrix import DEVICE_ON

from fastkd import kd_loss, linear_kd_loss

CUTS = (slice(0, 1), slice(1, 6), slice(6, 8), slice(8, 11))


@DEVICE_ON
def test_micro_batches(on) -> None:
    """Four of unequal counts, one of them with nothing that counts."""
    impl, device = on
    c, hidden, weight, _ = head_case()
    c.labels[6:8] = -100
    count = int((c.labels != -100).sum())
    targets, labels = c.targets.to(device), c.labels.to(device)
    hidden, weight = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    whole = linear_kd_loss(hidden, weight, targets, labels, impl=impl, temperature=2.0)
    expected = grads(whole.loss, hidden, weight)
    for num_items in (count, torch.tensor(count, device=device)):
        total = 0.0
        hidden.grad = weight.grad = None
        for rows in CUTS:
            out = linear_kd_loss(
                hidden[rows], weight, targets[rows], labels[rows], impl=impl, temperature=2.0, num_items=num_items
            )
            out.loss.backward()
            total += float(out.loss.detach())
        close([hidden.grad.cpu().double(), weight.grad.cpu().double()], expected, 1e-6)
        assert abs(total - float(whole.loss.detach())) < 1e-5
    logits = c.logits.to(device).requires_grad_()
    (one,) = grads(kd_loss(logits, targets, labels, impl=impl).loss, logits)
    logits.grad = None
    for rows in CUTS:
        kd_loss(logits[rows], targets[rows], labels[rows], impl=impl, num_items=count).loss.backward()
    close([logits.grad.cpu().double()], [one], 1e-6)


def _rank(rank: int, init: str, results: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    c, hidden, weight, _ = head_case()
    rows = slice(0, 3) if rank == 0 else slice(3, 11)
    weight = weight.requires_grad_()
    labels = c.labels[rows]
    count = (labels != -100).sum()
    dist.all_reduce(count)
    linear_kd_loss(hidden[rows], weight, c.targets[rows], labels, num_items=count, temperature=2.0).loss.backward()
    dist.all_reduce(weight.grad)
    if rank == 0:
        torch.save(weight.grad, results)
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """Unequal counts on two ranks, the count reduced beforehand, gradients summed: those of one process."""
    results = tmp_path / "gradient.pt"
    ranks = [Forked(_rank, rank, str(tmp_path / "init"), str(results)) for rank in range(2)]
    assert [(rank.communicate(timeout=300)[1], rank.returncode) for rank in ranks] == [("", 0)] * 2
    c, hidden, weight, _ = head_case()
    weight = weight.requires_grad_()
    (expected,) = grads(linear_kd_loss(hidden, weight, c.targets, c.labels, temperature=2.0).loss, weight)
    close([torch.load(results, weights_only=True).double()], [expected], 1e-6)


def test_the_divisor_is_a_count_not_the_sum_of_weights() -> None:
    c = case("plain", 6, 40, 4)
    plain = kd_loss(c.logits, c.targets, c.labels)
    doubled = kd_loss(c.logits, c.targets, c.labels, weights=torch.full((6,), 2.0))
    assert torch.allclose(doubled.loss, 2 * plain.loss)
