"""Targets made while a student trains: a live teacher, with or without a cache that is written on the way.

Belongs here: `LiveSource`, what answers a micro-batch, and what is captured of it.
Does not: teachers themselves (teachers), and what answers inside a student's forward (train).
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .answer import answer as answer
    from .source import LiveSource as LiveSource

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"answer": ["answer"], "source": ["LiveSource"]}
)
