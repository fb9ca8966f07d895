"""Errors that many rooms treat alike."""

import pytest

from fastkd.cache.errors import CacheError, NotFound, ReadOnly, Refused, StoreError
from fastkd.errors import ClusterError, StreamError, TeacherError, TeacherUnavailable, TrainError, WorkRemains, passes


@pytest.mark.parametrize("kind", [StoreError, TeacherUnavailable, WorkRemains])
def test_errors_that_pass(kind: type[Exception]) -> None:
    assert passes(kind("later"))


@pytest.mark.parametrize(
    "kind", [CacheError, NotFound, ReadOnly, Refused, TeacherError, TrainError, ClusterError, StreamError, OSError]
)
def test_errors_that_do_not_pass(kind: type[Exception]) -> None:
    assert not passes(kind("never"))
