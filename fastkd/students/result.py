"""What `fastkd student` made, and why: the candidates with their sizes and divergences, as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..models.axes import Shape
from ..utils.text import format_table, size_text

PRUNED, NEW = "pruned copy", "new weights"


@dataclass(frozen=True)
class Candidate:
    """A shape that was tried. size: parameters. kl: KL(teacher ‖ candidate) in nats, untrained; None: not measured.
    positions: on which it was measured."""

    shape: Shape
    size: int
    kl: float | None = None
    positions: int = 0


@dataclass(frozen=True)
class StudentReport:
    """A student that was written.

    folder: where. kind: `PRUNED` or `NEW`. parameters, bytes: of its weights, those in the folder for a pruned copy.
    teacher: the parameters of its teacher. layers: the numbers of its layers in the teacher; None for new weights.
    order: of a pruned copy for a budget, layers in the order in which they are removed, and kl_after: the KL after
    each. candidates: the best first. teacher_kl: of the teacher itself from the cache's targets. notes: for the user.
    """

    folder: Path
    kind: str
    parameters: int
    bytes: int
    teacher: int
    layers: tuple[int, ...] | None = None
    order: Sequence[int] = ()
    kl_after: Sequence[float] = ()
    candidates: Sequence[Candidate] = ()
    teacher_kl: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """For a terminal."""
        lines = []
        if self.order:
            trail = ", ".join(f"{n} ({kl:.3f})" for n, kl in zip(self.order, self.kl_after, strict=True))
            lines += [f"layers in the order of removal (KL after it): {trail}", ""]
        if self.candidates:
            rows = [["candidate", "layers", "hidden", "KV heads", "MLP", "parameters", "KL"]]
            for number, one in enumerate(self.candidates):
                kl = "-" if one.kl is None else f"{one.kl:.4f}"
                sizes = (one.shape.layers, one.shape.hidden, one.shape.groups, one.shape.mlp)
                name = "chosen" if number == 0 else str(number + 1)
                rows.append([name, *map(str, sizes), f"{one.size / 1e6:,.2f}M", kl])
            lines += format_table(rows)
            lines.append("  KL from the teacher in nats per position, before training")
            if self.teacher_kl is not None:
                lines.append(f"  of the teacher itself: {self.teacher_kl:.4f} (what the cache does not store)")
            lines.append("")
        lines.append(
            f"{self.folder}: {self.kind}, {self.parameters / 1e6:,.2f}M parameters "
            f"({self.parameters / self.teacher:.1%} of the teacher's), {size_text(self.bytes)}"
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        found = {
            name: getattr(self, name) for name in ("kind", "parameters", "bytes", "teacher", "teacher_kl", "notes")
        }
        return found | {
            "student": str(self.folder),
            "layers": None if self.layers is None else list(self.layers),
            "order": list(self.order),
            "kl_after": list(self.kl_after),
            "candidates": [asdict(one) for one in self.candidates],
        }
