"""Measures of a student on held-out data, from the cache, with no teacher.

Belongs here: a new measure, and how measures are compared and divided over processes.
Does not: training, or pages that show the measures (report).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
