"""fastkd on a Ray cluster: captures by actors, trainings by Ray Train, sweeps by Ray Tune.

Belongs here: who runs what, where, and again if it died. Ray is imported when one of the functions is called.
Does not: what a worker does, which is `fastkd.capture` and `fastkd.train`.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .capture_driver import capture as capture
    from .capture_report import RayCaptureReport as RayCaptureReport
    from .training import train as train
    from .tuning import sweep as sweep

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "capture_driver": ["capture"],
        "capture_report": ["RayCaptureReport"],
        "training": ["train"],
        "tuning": ["sweep"],
    },
)
