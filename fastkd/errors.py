"""What is raised about input: data, teachers, students and how they are trained."""


class DataError(Exception):
    """A dataset, or the way it is to be cut up: the file and row, what was found, and what to do next.

    Not a CacheError: that one speaks of what was written, and catching it must not hide a fault in what was read.
    """


class TeacherError(Exception):
    """A teacher, or its tokenizer: where it lies, what it is, or what it says; and what to do next."""


class StreamError(ValueError):
    """What a student is to be trained on, or how: the argument or cache, what was found, and what to do next."""


class TrainError(Exception):
    """A student, its training or what was left of an earlier one: the thing, what was found, and what to do next."""


class WorkRemains(TrainError):
    """What hindered a training that the same call goes on with afterwards: a full disk, say."""


class ReportError(Exception):
    """What a report is to be made of: the file and the line, what was found, and what to do next."""


class NoRun(ReportError):
    """What was given is no run's folder."""


class BenchError(Exception):
    """What a measurement needs: the thing, what was found, and what to do next."""


class NoSuite(BenchError):
    """What was asked for is no suite of measurements, or there is nothing to compare it with."""
