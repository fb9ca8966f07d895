"""Other implementations: eager PyTorch and torch.compile; Liger-Kernel and Cut Cross-Entropy on a GPU.

Each is measured with its defaults and with the best settings for these sizes. Its name says what it computes:
"cross-entropy" has no teacher, "dense" takes all of the teacher's outcomes or its hidden states.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.bench.cases import eager_kd_loss
from fastkd.bench.timing import Run

if TYPE_CHECKING:
    from fastkd.bench.bench_head import HeadProblem
    from fastkd.bench.logits_problem import LogitsProblem

LOGITS_NAMES = ("Liger cross-entropy", "Liger KL, dense", "Liger JSD, dense")
HEAD_NAMES = (
    "Liger fused linear cross-entropy",
    "Liger fused linear cross-entropy, float32 sums",
    "Liger fused linear cross-entropy, chunks 16 times as large",
    "Liger fused linear JSD, dense",
    "Liger chunked distillation (JSD), dense",
    "Liger chunked distillation (JSD), dense, chunks of 4096",
    "Cut Cross-Entropy",
    "Cut Cross-Entropy, unfiltered",
)
PACKAGES = {"Liger": ("liger_kernel", "liger-kernel"), "Cut": ("cut_cross_entropy", "cut-cross-entropy")}


@dataclass(frozen=True)
class Peer:
    """Another implementation. run: None if it cannot run here, and then `why` is the reason."""

    name: str
    run: Run | None
    why: str = ""


def own(device: str, loss: Callable[..., Tensor], step: Callable[[Callable[..., Tensor]], Run]) -> list[Peer]:
    """The same loss in PyTorch: eager, compiled with defaults, and compiled with autotuning."""
    found = [Peer("eager", step(loss))]
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return [*found, Peer("torch.compile", None, "needs a C++ compiler")]
    torch._dynamo.reset()
    found.append(Peer("torch.compile", step(torch.compile(loss, dynamic=False))))
    if device == "cuda":
        tuned = torch.compile(loss, dynamic=False, mode="max-autotune-no-cudagraphs")
        found.append(Peer("torch.compile, max-autotune", step(tuned)))
    return found


def why_not(name: str, device: str) -> str:
    """Why a package's kernels cannot run here; "" if they can."""
    module, package = PACKAGES[name.split()[0]]
    if device != "cuda":
        return "needs a GPU"
    return "" if find_spec(module) else f"needs {package}: pip install 'fastkd[peers]'"


def of_logits(problem: "LogitsProblem") -> list[Peer]:
    """Liger's losses on given logits. Cross-entropy writes the gradient over the logits; the others take probabilities,
    so that the softmax is part of what is timed."""
    makers: dict[str, Callable[[LogitsProblem], Run]] = {
        "Liger cross-entropy": _liger_cross_entropy,
        "Liger KL, dense": partial(_liger_dense, "liger_kl_div"),
        "Liger JSD, dense": partial(_liger_dense, "liger_jsd"),
    }
    return [_peer(name, problem.device, partial(makers[name], problem)) for name in LOGITS_NAMES]


def of_head(problem: "HeadProblem") -> list[Peer]:
    """Losses that are fused with the LM head."""
    return [_peer(name, problem.device, partial(_head_run, name, problem)) for name in HEAD_NAMES]


def _peer(name: str, device: str, make: Callable[[], Run]) -> Peer:
    why = why_not(name, device)
    return Peer(name, None, why) if why else Peer(name, make())


def _liger_cross_entropy(problem: "LogitsProblem") -> Run:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return problem.step(lambda leaf: liger_cross_entropy(leaf, problem.labels))


def _liger_dense(name: str, problem: "LogitsProblem") -> Run:
    """Half cross-entropy, half a divergence from the dense teacher."""
    from liger_kernel.transformers import functional

    divergence: Any = getattr(functional, name)
    t = problem.temperature
    log_q = F.log_softmax(torch.randn_like(problem.pristine).float() / t, dim=-1).to(problem.pristine.dtype)
    # the KL takes the teacher's probabilities, the JSD their logarithms
    teacher, more = (log_q.exp(), {"reduction": "batchmean"}) if name == "liger_kl_div" else (log_q, {})

    def loss(leaf: Tensor) -> Tensor:
        soft = divergence(F.log_softmax(leaf / t, dim=-1), teacher, **more)
        return 0.5 * F.cross_entropy(leaf, problem.labels) + 0.5 * t * t * soft

    return problem.step(loss)


def _head_run(name: str, problem: "HeadProblem") -> Run:
    labels = problem.labels
    if name.startswith("Cut"):
        from cut_cross_entropy import linear_cross_entropy

        cut = {"filter_eps": None} if "unfiltered" in name else {}
        return problem.step(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, **cut))
    if "cross-entropy" in name:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        more: dict[str, Any] = {}
        if "float32 sums" in name:
            more = {"accum_dtype": torch.float32}
        elif "16 times" in name:
            more = {"chunk_mem_const": 16}
        return problem.step(lambda hidden, weight: liger_fused_linear_cross_entropy(hidden, weight, labels, **more))
    # a teacher of the student's width: its states and its LM head are inputs
    states, head = problem.teacher()
    if "chunked" in name:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        sizes = {"chunk_size": 4096} if "4096" in name else {}
        module = LigerFusedLinearJSDLoss(temperature=problem.temperature, **sizes)
        return problem.step(lambda hidden, weight: module(hidden, weight, states, head, labels))
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return problem.step(
        lambda hidden, weight: liger_fused_linear_jsd(
            hidden, weight, states, head, labels, temperature=problem.temperature
        )
    )


def eager_on(targets: Any, labels: Tensor, temperature: float) -> tuple[Any, ...]:
    """The arguments of `eager_kd_loss` after the logits."""
    at = targets.at(temperature, "bucket")
    return targets.ids.long(), at.log_q, at.log_q_tail, labels, 0.5, temperature


def eager_head(hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The product with the LM head, and the same loss."""
    return eager_kd_loss(hidden @ weight.T, *rest)
