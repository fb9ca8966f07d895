"""The job that fills a cache: a window plan, a teacher pass over each shard, claims, checks and estimates.

Belongs here: whatever runs once per cache.
Does not: teachers themselves (teachers), the format on disk (cache).
"""

from ..utils.callable_package import make_callable

make_callable(__name__)
