"""Other implementations: PyTorch, eager, compiled and its fused head; on a GPU Liger-Kernel, QuACK, Cut Cross-Entropy.

Each is measured with its defaults and with the best settings for these sizes. Its name says what it computes:
"cross-entropy" has no teacher, "dense" takes all of the teacher's outcomes or its hidden states.
"""

import inspect
import shutil
from collections.abc import Callable, Sequence
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

LOGITS_NAMES = ("Liger cross-entropy", "Liger KL, dense", "Liger JSD, dense", "QuACK cross-entropy")
HEAD_NAMES = (
    "torch linear_cross_entropy",
    "torch linear_cross_entropy, long chunks",
    "torch linear_cross_entropy, chunked",
    "Liger fused linear cross-entropy",
    "Liger fused linear cross-entropy, float32 sums",
    "Liger fused linear cross-entropy, chunks 16 times as large",
    "Liger fused linear JSD, dense",
    "Liger chunked distillation (JSD), dense",
    "Liger chunked distillation (JSD), dense, chunks of 4096",
    "QuACK chunked linear cross-entropy",
    "QuACK chunked linear cross-entropy, logits in memory",
    "Cut Cross-Entropy",
    "Cut Cross-Entropy, unfiltered",
)
_GPU = "needs a GPU"
# by the first word of a name: the module, and the package that has it
PACKAGES = {
    "Liger": ("liger_kernel", "liger-kernel"),
    "QuACK": ("quack", "quack-kernels"),
    "Cut": ("cut_cross_entropy", "cut-cross-entropy"),
}


@dataclass(frozen=True)
class Peer:
    """Another implementation. run: None if it cannot run here, and then `why` is the reason."""

    name: str
    run: Run | None
    why: str = ""


def own(
    device: str, loss: Callable[..., Tensor], step: Callable[[Callable[..., Tensor]], Run], *, compiled: bool = True
) -> list[Peer]:
    """The same loss in PyTorch: eager and, if `compiled`, compiled with defaults, and compiled with autotuning."""
    found = [Peer("eager", step(loss))]
    if not compiled:
        return found
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return [*found, Peer("torch.compile", None, "needs a C++ compiler")]
    torch._dynamo.reset()
    found.append(_tried("torch.compile", lambda: step(torch.compile(loss, dynamic=False))))
    if device == "cuda":
        tuned = torch.compile(loss, dynamic=False, mode="max-autotune-no-cudagraphs")
        found.append(_tried("torch.compile, max-autotune", lambda: step(tuned)))
    return found


def why_not(name: str, device: str) -> str:
    """Why a peer cannot run here; "" if it can."""
    who = name.split()[0]
    if who == "torch":
        return "" if hasattr(F, "linear_cross_entropy") else f"needs torch 2.13, this is {torch.__version__}"
    module, package = PACKAGES[who]
    if device != "cuda":
        return _GPU
    if not find_spec(module):
        return f"needs {package}: pip install 'fastkd[peers]'"
    if who == "QuACK" and torch.cuda.get_device_capability() < (9, 0):
        return "needs a GPU of compute capability 9.0 or higher"
    if "16 times" in name and "chunk_mem_const" not in _parameters_of_liger():
        return "this version of liger-kernel has no chunk_mem_const"
    return ""


def _parameters_of_liger() -> set[str]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return set(inspect.signature(liger_fused_linear_cross_entropy).parameters)


def of_logits(problem: "LogitsProblem") -> list[Peer]:
    """Liger's losses on given logits. Cross-entropy writes the gradient over the logits; the others take probabilities,
    so that the softmax is part of what is timed."""
    makers: dict[str, Callable[[LogitsProblem], Run]] = {
        "Liger cross-entropy": _liger_cross_entropy,
        "Liger KL, dense": partial(_liger_dense, "liger_kl_div"),
        "Liger JSD, dense": partial(_liger_dense, "liger_jsd"),
        "QuACK cross-entropy": _quack_cross_entropy,
    }
    return _in_one([_peer(name, problem.device, partial(makers[name], problem)) for name in LOGITS_NAMES])


def of_head(problem: "HeadProblem") -> list[Peer]:
    """Losses that are fused with the LM head."""
    return _in_one([_peer(name, problem.device, partial(_head_run, name, problem)) for name in HEAD_NAMES])


def of_torch(problem: "HeadProblem") -> list[Peer]:
    """torch's own loss that is fused with the LM head. (Chunked by its own heuristic it takes 30 times as long as the
    products on a CPU: only among all peers.)"""
    return [_peer(name, problem.device, partial(_head_run, name, problem)) for name in HEAD_NAMES[:2]]


def _in_one(found: Sequence[Peer]) -> list[Peer]:
    """The peers, those that need a GPU as one."""
    without = [peer for peer in found if peer.why == _GPU]
    if not without:
        return list(found)
    packages = dict.fromkeys(PACKAGES[peer.name.split()[0]][1] for peer in without)
    one = Peer(f"{len(without)} losses of {', '.join(packages)}", None, _GPU.replace("needs", "need"))
    return [*(peer for peer in found if peer.why != _GPU), one]


def _peer(name: str, device: str, make: Callable[[], Run]) -> Peer:
    why = why_not(name, device)
    return Peer(name, None, why) if why else _tried(name, make)


def _tried(name: str, make: Callable[[], Run]) -> Peer:
    """A peer that has run once: what fails is a row with the reason, and not the end of all other rows."""
    try:
        run = make()
        run()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return Peer(name, None, f"fails here: {type(error).__name__}: {reason}"[:160])
    return Peer(name, run)


def _liger_cross_entropy(problem: "LogitsProblem") -> Run:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return problem.step(lambda leaf: liger_cross_entropy(leaf, problem.labels))


def _quack_cross_entropy(problem: "LogitsProblem") -> Run:
    from quack.cross_entropy import cross_entropy

    return problem.step(lambda leaf: cross_entropy(leaf, problem.labels, inplace_backward=True))


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
    if name.startswith("torch"):
        options = None
        if "chunked" in name:  # as its own heuristic has it: of few rows
            options = torch.nn.LinearCrossEntropyOptions()
        elif "long" in name:
            rows = min(problem.chunk, 2048)
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        return problem.step(lambda hidden, weight: F.linear_cross_entropy(hidden, weight, labels, options=options))
    if name.startswith("QuACK"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        # by default exponentials are stored in place of logits where the card and the width allow it
        quack = {"use_scaled_exp": False} if "logits in memory" in name else {}
        return problem.step(lambda hidden, weight: chunked_linear_cross_entropy(hidden, weight, labels, **quack))
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
