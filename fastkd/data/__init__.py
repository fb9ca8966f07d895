"""Documents, conversations and examples as token ids or arrays: the input of teachers and students.

Belongs here: reading, tokenizing and packing datasets.
Does not: models, caches.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .examples import Examples as Examples
    from .seeding import seeded as seeded

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"examples": ["Examples"], "seeding": ["seeded"]}
)
