"""Caches of a teacher's targets: sharded, checksummed, resumable. NumPy, Zarr and Arrow; no torch. See FORMAT.md.

Belongs here: what lies on disk, and how it is written, read, checked and described.
Does not: models, teachers, the data that were captured, or anything that computes a loss.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
