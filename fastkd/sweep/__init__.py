"""Many trainings with different settings, ranked.

Belongs here: the arms of a sweep, their ranking and its plot.
Does not: a single training (train).
"""

from ..utils.callable_package import make_callable

make_callable(__name__)
