"""What a teacher said on a fixed input when a cache was begun: another model behind the same name is noticed by it.

Models in this process are known by the hash of their weights. One behind a server is known by its name and by what it
says, and that changes in the last digits with batches and hardware: so what it said is kept, and compared.
"""

import json
from typing import Any

from ..cache import CacheError, NotFound
from ..cache.errors import said
from ..cache.manifest import SPEC_KEY
from ..cache.stores import Store
from ..teachers.protocol import Teacher

PROBE_KEY = "teacher_probe.json"


def agree_on_probe(teacher: Teacher, store: Store, *, write: bool = True) -> None:
    """CacheError if the teacher has a `probe`, and the store has one of another model; if it has that of this model, it
    becomes the teacher's. write: whether to write the teacher's, if the store has no cache yet."""
    probe: Any = getattr(teacher, "probe", None)
    if probe is None:
        return
    known = _read(store)
    if known is None:
        # a cache without one is of another teacher, as their fingerprints will tell
        if not write or store.exists(SPEC_KEY) or store.create(PROBE_KEY, json.dumps(probe()).encode()):
            return
        known = _read(store)
    compare: Any = teacher
    if problem := compare.compare_probe(known):
        raise CacheError(
            f"{store.describe()}: {said(problem)}. Start the server with the model of the cache, or write to another "
            "folder."
        )


def _read(store: Store) -> Any:
    """The probe in a store, as JSON; None if there is none."""
    try:
        return json.loads(store.get(PROBE_KEY))
    except NotFound:
        return None
    except ValueError:
        return ""
