"""What is measured at a position, of a student and of the teacher's own cached row; and how positions become windows.

    cross_entropy   nats; −log of the probability of the label
    kl_bucket       nats; KL(teacher ‖ student) at T = 1 with all outside the head as one outcome: a lower bound of the
                    true one, which is larger by the tail's mass times KL(tail ‖ the student's)
    kl_sampled      nats; the same with the tail by the stored draws: an estimate (unbiased where they were drawn at
                    T = 1), and not negative only on the average
    agreement       share; the student's best token is the teacher's. A cache's steps make equals of near equals: any of
                    the teacher's best will do
    accuracy        share; the student's best token is the label
    ece             expected calibration error: over 15 equal bins of confidence, the mean of |accuracy − mean
                    confidence|, weighted by positions (Guo et al., On Calibration of Modern Neural Networks, 2017)

Of the teacher a cache knows only its head and draws, so that some can only be bounded:

    label_known             share of labels that are among the entries
    cross_entropy_at_least  nats; exact where the label is known; elsewhere it has at most the tail's mass, and no more
                            than the head's last entry
    entropy_at_least        nats; of head and all the rest as one outcome
    entropy_at_most         nats; with the rest spread evenly over its outcomes
    entropy_sampled         nats; with the tail by its draws: an estimate
    tail_mass               share of the probability outside the head
    accuracy, ece           of its best token; of several equal ones, each with an equal part
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import SparseTargets
from ..kernels.reference import cross_entropy_rows, divergence_rows
from ..utils.intervals import Interval, bootstrap_interval, ratio_interval

Floats = NDArray[np.float64]
Rows = dict[str, Tensor]
BINS = 15
_CHUNK = 2**24  # numbers of the logits that are worked on at once
_BIN_SUMS = ("positions", "confidence", "correct")


def student_rows(logits: Tensor, targets: SparseTargets, labels: Tensor) -> Rows:
    """The measures of each row, `[m]` float32, and `confidence`, the probability of the best token.

    logits `[m, V']` with V' >= the teacher's vocabulary, targets of the same m rows, labels `[m]`.
    """
    size = max(1, _CHUNK // logits.shape[1])
    parts = [
        _student_rows(logits[i : i + size].float(), targets[i : i + size], labels[i : i + size])
        for i in range(0, len(logits), size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _student_rows(z_CV: Tensor, targets: SparseTargets, labels: Tensor) -> Rows:
    top, best = z_CV.max(1)
    found = {
        "cross_entropy": cross_entropy_rows(z_CV, labels),
        "accuracy": (best == labels).float(),
        "confidence": (top - z_CV.logsumexp(1)).exp(),
    }
    if _head(targets).any():
        teachers, _ = _best(targets)
        found["agreement"] = (teachers & (targets.ids == best[:, None])).any(1).float()
        found["kl_bucket"] = _kl(z_CV, targets, "bucket")
    if targets.draws is not None:
        found["kl_sampled"] = _kl(z_CV, targets, "sampled")
    return found


def teacher_rows(targets: SparseTargets, labels: Tensor) -> Rows:
    """What a cache knows of the teacher's own measures, `[m]` float32 each; labels `[m]`."""
    used, head = targets.logprobs > -math.inf, _head(targets)
    log_tail = targets.tail[:, targets.temperatures.index(1.0)].float()
    log_tail = log_tail.masked_fill(targets.outcomes == 0, -math.inf)
    at_label = (used & (targets.ids == labels[:, None])).float()
    known = at_label.any(1)
    least = targets.logprobs.float().masked_fill(~head, 0.0).amin(1) if used.shape[1] else log_tail
    exact = (at_label * targets.logprobs.float().masked_fill(~used, 0.0)).sum(1)
    found = {
        "label_known": known.float(),
        "cross_entropy_at_least": -torch.where(known, exact, torch.minimum(log_tail, least)),
        "tail_mass": log_tail.exp(),
    }
    if head.any():
        best, value = _best(targets)
        found["accuracy"] = (best & (targets.ids == labels[:, None])).float().sum(1) / best.sum(1)
        found["confidence"] = value.float().exp()
        q = targets.logprobs.float().masked_fill(~head, -math.inf)
        of_head, of_tail = -_plogp(q).sum(1), -_plogp(log_tail)
        spread = targets.outcomes.clamp(min=1).float().log()
        found["entropy_at_least"] = of_head + of_tail
        found["entropy_at_most"] = of_head + of_tail + log_tail.exp() * spread
    if targets.draws is not None:
        at = targets.at(1.0, "sampled")
        drawn = -(at.weights * at.log_q.masked_fill(at.weights == 0, 0.0)).sum(1)
        found["entropy_sampled"] = drawn - _plogp(at.log_q_tail)
    return found


def _kl(z_CV: Tensor, targets: SparseTargets, treatment: str) -> Tensor:
    return divergence_rows(z_CV, targets.ids, targets.at(1.0, treatment), "forward_kl", 0.0)


def _head(targets: SparseTargets) -> Tensor:
    """Which of the entries are exact `[m, K]`. In a cache all rows have such, or none."""
    used = targets.logprobs > -math.inf
    return used if targets.draws is None else used & (targets.draws == 0)


def _best(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """Which of the entries are the teacher's best `[m, K]`, and their log-probability `[m]`."""
    exact = targets.logprobs.masked_fill(~_head(targets), -math.inf)
    value = exact.amax(1)
    return exact == value[:, None], value


def _plogp(log_q: Tensor) -> Tensor:
    return log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0.0)


@dataclass(eq=False)
class Windows:
    """Sums over the counted positions of each window.

    counts `[W]`: positions. sums: of each measure, `[W]`. bins `[W, BINS, 3]`: by confidence, how many positions, the
    sum of their confidence, and how many were right; None where there is no best token.
    """

    counts: Floats
    sums: dict[str, Floats] = field(default_factory=dict)
    bins: Floats | None = None

    @classmethod
    def empty(cls, windows: int) -> "Windows":
        """Nothing yet of so many windows."""
        return cls(np.zeros(windows))

    @staticmethod
    def zero_bins(windows: int) -> Floats:
        """Bins of so many windows, with nothing in them."""
        return np.zeros((windows, BINS, len(_BIN_SUMS)))

    def add(self, window: NDArray[np.int64], rows: Rows) -> None:
        """Add rows: window `[m]` says which each is of."""
        values = {name: row.double().cpu().numpy() for name, row in rows.items()}
        np.add.at(self.counts, window, 1.0)
        confidence = values.pop("confidence", None)
        for name, row in values.items():
            np.add.at(self.sums.setdefault(name, np.zeros(len(self.counts))), window, row)
        if confidence is not None:
            if self.bins is None:
                self.bins = self.zero_bins(len(self.counts))
            which = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
            columns = np.stack([np.ones_like(confidence), confidence, values["accuracy"]], 1)
            np.add.at(self.bins, (window, which), columns)

    def intervals(self) -> dict[str, Interval]:
        """Each measure over all positions, with its 95% interval over windows (those that have positions)."""
        use = self.counts > 0
        counts = self.counts[use]
        found = {name: ratio_interval(sums[use], counts) for name, sums in self.sums.items()}
        if self.bins is not None:
            found["ece"] = bootstrap_interval(lambda times: self._ece(times, use), len(counts))
        return found

    def minus(self, other: "Windows") -> dict[str, Interval]:
        """Each measure that both have, ours minus theirs, window by window. The windows have to be the same."""
        use = self.counts > 0
        counts = self.counts[use]
        shared = [name for name in self.sums if name in other.sums]
        found = {name: ratio_interval((self.sums[name] - other.sums[name])[use], counts) for name in shared}
        if self.bins is not None and other.bins is not None:
            found["ece"] = bootstrap_interval(lambda times: self._ece(times, use) - other._ece(times, use), len(counts))
        return found

    def reliability(self) -> list[dict[str, float]]:
        """Of each bin that has positions: how many, their mean confidence and their accuracy."""
        if self.bins is None:
            return []
        return [{"positions": n, "confidence": c / n, "accuracy": a / n} for n, c, a in self.bins.sum(0).tolist() if n]

    def _ece(self, times: Floats, use: NDArray[np.bool_]) -> Floats:
        """With each window taken so many times, `[resamples, windows]`."""
        assert self.bins is not None
        gaps = times @ (self.bins[use, :, 2] - self.bins[use, :, 1])
        error: Floats = np.abs(gaps).sum(1) / (times @ self.counts[use])
        return error

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        sums = {name: row.tolist() for name, row in self.sums.items()}
        return {"counts": self.counts.tolist(), "sums": sums, "bins": None if self.bins is None else self.bins.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Windows":
        """What `to_json` made. Raises KeyError, TypeError or ValueError where it is something else."""
        counts = _finite(data["counts"], 1)
        sums = {str(name): _finite(row, 1) for name, row in dict(data["sums"]).items()}
        bins = None if data["bins"] is None else _finite(data["bins"], 3)
        if any(row.shape != counts.shape for row in sums.values()):
            raise ValueError("its measures have not as many windows as its counts")
        if bins is not None and bins.shape != (len(counts), BINS, len(_BIN_SUMS)):
            raise ValueError(f"its bins have shape {bins.shape}")
        if not (counts > 0).any():
            raise ValueError("it has no positions")
        return cls(counts, sums, bins)


def _finite(values: Any, dimensions: int) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise ValueError(f"found numbers that are not finite, or not in {dimensions} dimensions")
    return array
