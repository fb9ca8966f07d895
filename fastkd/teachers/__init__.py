"""Who answers: models (local, tensor-parallel) behind the one protocol `Teacher`.

Belongs here: a new kind of teacher, one file each, and how a name becomes a teacher.
Does not: what is kept of the answers (capture) or how they are stored (cache).
"""
