"""Born-again networks: each student is the teacher of the next.

Belongs here: the order of captures and trainings of several generations, and how they compare.
Does not: a single capture (capture), training (train), or the mean of several caches (capture/mix).
"""

from ..utils.callable_package import make_callable

make_callable(__name__)
