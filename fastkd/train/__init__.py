"""The training loop: trainer, objectives, optimizer, schedule, checkpoints, metrics and trackers.

Belongs here: what changes a student's weights, and what a run leaves on disk.
Does not: reading caches (stream) or measuring students (evaluate).
"""

from ..utils.callable_package import make_callable

make_callable(__name__)
