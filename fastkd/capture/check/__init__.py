"""The check of a cache against its teacher.

Belongs here: running the teacher again on a sample of a cache, and comparing.
Does not: checks of a cache by itself (fastkd.cache.verify_cache).
"""
