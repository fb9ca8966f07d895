"""From a cache to optimizer steps: the order, the loader, and what it yields.

Names are loaded on first use (PEP 562): importing this imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import StreamError
    from .student.batch import ExampleBatch, MicroBatch, Step
    from .student.loader import DistillLoader
    from .student.order import Epoch, order
    from .student.run import summed_over

_HOME = {
    "DistillLoader": "student.loader",
    "Epoch": "student.order",
    "ExampleBatch": "student.batch",
    "MicroBatch": "student.batch",
    "Step": "student.batch",
    "StreamError": "errors",
    "order": "student.order",
    "summed_over": "student.run",
}

__all__ = ["DistillLoader", "Epoch", "ExampleBatch", "MicroBatch", "Step", "StreamError", "order", "summed_over"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd.stream' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
