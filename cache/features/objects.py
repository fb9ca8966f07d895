"""The objects of a feature beside its shards: where they lie, and how they are read."""

import hashlib
import re

from ..errors import CacheError, NotFound, said
from ..manifest import read_twice
from ..shard.container import Damage
from ..spec import MOST_JSON
from ..stores import Store
from .basis import Basis
from .spec import FOLDER, FeatureSpec, folder_of, name_of

SPEC, BASIS, BLOCK = "spec.json", "basis.zarr.zip", "block.safetensors"  # in the folder of a feature
_NUMBER = re.compile(r"-?[0-9]{1,6}")


def read_feature_spec(store: Store, name: str) -> FeatureSpec | None:
    """The spec of a feature; None if there is none. CacheError if it cannot be read."""
    key = f"{folder_of(name)}{SPEC}"

    def read() -> FeatureSpec:
        spec = FeatureSpec.from_json(store.get_tail(key, MOST_JSON + 1), key)
        if spec.name != name:
            raise CacheError(f"{key}: name: got {spec.name!r}; expected {name!r}, as its folder is called.")
        return spec

    try:
        return read_twice(store, read)
    except NotFound:
        return None


def read_basis(store: Store, name: str) -> Basis | None:
    """The basis of a feature, whether it has a spec yet or not; None if there is none. CacheError if it is damaged."""
    key = f"{folder_of(name)}{BASIS}"
    try:
        return read_twice(store, lambda: Basis.from_bytes(store.get(key)))
    except NotFound:
        return None
    except Damage as damage:
        where = f', array "{damage.array}"' if damage.array else ""
        raise CacheError(
            f"{store.describe()}: {key}{where}: {said(damage)}. Restore it, or drop the feature."
        ) from damage


def listed_objects(store: Store) -> tuple[dict[str, dict[str, int]], list[str]]:
    """The sizes of the objects in a store by feature and by name in its folder; and keys that belong to no feature."""
    sizes: dict[str, dict[str, int]] = {}
    foreign: list[str] = []
    for entry in store.list(FOLDER):
        if (name := name_of(entry.key)) is None:
            foreign.append(entry.key)
        else:
            sizes.setdefault(name, {})[entry.key.removeprefix(folder_of(name))] = entry.size
    return sizes, foreign


def listed_features(store: Store) -> list[str]:
    """The names of the features in a store, layers first, by their numbers."""
    names = [name for name, objects in listed_objects(store)[0].items() if SPEC in objects]
    last = float("inf")
    return sorted(names, key=lambda n: (not is_number(n), int(n) % last if is_number(n) else 0, n))


def is_number(name: str) -> bool:
    """Whether a feature's name is the number of a layer."""
    return _NUMBER.fullmatch(name) is not None


def read_block(store: Store, spec: FeatureSpec) -> bytes | None:
    """What lies beside the basis of a feature; None if its spec names nothing. CacheError if it is damaged."""
    if spec.block is None:
        return None
    key = f"{spec.folder}{BLOCK}"

    def read() -> bytes:
        data = store.get(key)
        if hashlib.sha256(data).hexdigest() != spec.block:
            raise CacheError(f"{key}: its bytes differ from the hash in the spec. Restore it, or drop the feature.")
        return data

    try:
        return read_twice(store, read)
    except NotFound as error:
        raise CacheError(f"{store.describe()}: {key}: it is missing. Restore it, or drop the feature.") from error
