"""Teachers: networks on this machine or behind a server, each behind the one protocol `Teacher`.

Belongs here: a new kind of teacher, one file each, and how a name becomes a teacher.
Does not: what is kept of the answers (capture) or how they are stored (cache).
"""

from .protocol import Hidden, LMHead, Logits, Teacher, TopK
from .registry import register_teacher

__all__ = ["Hidden", "LMHead", "Logits", "Teacher", "TopK", "register_teacher"]
