"""A student as files of another runtime, and what that cost: size, latency, memory, and quality against the teacher.

    student folder ─ model.py ─▶ Deployable ─ formats/NAME.py ─▶ FOLDER ─ formats/NAME.py ─▶ Runtime ─ runtime.py

Belongs here: formats, one file each in formats/; what is measured of an exported folder in its own runtime. Does not:
a cache as other programs read it (export), how a student is made or trained (train), measures and pages themselves.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .api import deploy_report as deploy_report
    from .api import export as export

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"api": ["deploy_report", "export"]})
