"""Measures of a student on held-out data, from the cache, with no teacher.

Belongs here: a new measure, and how measures are compared and divided over processes.
Does not: training, or pages that show the measures (report).
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .api import Evaluation as Evaluation
    from .api import compare as compare
    from .api import evaluate as evaluate
    from .measures import MEASURES as MEASURES

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"api": ["Evaluation", "compare", "evaluate"], "measures": ["MEASURES"]}
)
