"""Teachers: networks on this machine or behind a server, each behind the one protocol `Teacher`.

Belongs here: a new kind of teacher, one file each, and how a name becomes a teacher.
Does not: what is kept of the answers (capture) or how they are stored (cache).
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .protocol import Hidden as Hidden
    from .protocol import LMHead as LMHead
    from .protocol import Logits as Logits
    from .protocol import Teacher as Teacher
    from .protocol import TopK as TopK
    from .registry import register_teacher as register_teacher

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "protocol": ["Hidden", "LMHead", "Logits", "Teacher", "TopK"],
        "registry": ["register_teacher"],
    },
)
