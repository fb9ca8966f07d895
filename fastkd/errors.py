"""Errors about user input. Each message names the thing, the evidence, and the next step."""

from .cache.credentials import redact
from .cache.errors import NotFound, Refused, StoreError


class _MaskedError(Exception):
    """An error whose message names what a person gave, without the credentials in it."""

    def __init__(self, message: object = "", *more: object) -> None:
        super().__init__(redact(str(message)), *more)


class DataError(_MaskedError):
    """A problem with a dataset or its settings.

    Not a CacheError, which is about stored caches: catching that must not hide a fault in the input data.
    """


class TeacherError(_MaskedError):
    """A problem with a teacher or its tokenizer."""


class TeacherUnavailable(TeacherError):
    """A teacher that does not answer now, such as a server that is down: the same call resumes later."""


class ExportError(_MaskedError):
    """A problem with an export of a cache or a student: its selection, its folder, or what its format does not take."""


class StreamError(ValueError):
    """A problem with a batch source: its arguments, or the cache that it reads."""


class TrainError(Exception):
    """A problem with a student, its training, or the checkpoints of an earlier run."""


class WorkRemains(TrainError):
    """A recoverable problem, such as a full disk: the same call resumes afterwards."""


class ClusterError(_MaskedError):
    """A problem with a cluster that runs a job: it is not there, or its workers die."""


class ReportError(Exception):
    """A problem with the files that a report is made of."""


class NoRun(ReportError):
    """The given folder is not a run folder."""


class BenchError(Exception):
    """A problem with a benchmark or its input."""


class NoSuite(BenchError):
    """Unknown benchmark suite, or no recording to compare with."""


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed later, and continues then: a store or a teacher that does not answer, a full
    disk. Commands then end with status 75, and workers of a cluster begin again."""
    transient = isinstance(error, (StoreError, TeacherUnavailable, WorkRemains))
    return transient and not isinstance(error, (Refused, NotFound))
