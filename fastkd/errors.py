"""What capture raises about its input and its teacher."""


class DataError(Exception):
    """A dataset, or the way it is to be cut up: the file and row, what was found, and what to do next.

    Not a CacheError: that one speaks of what was written, and catching it must not hide a fault in what was read.
    """


class TeacherError(Exception):
    """What a teacher is, or what it said: where, what was found, and what to do next."""
