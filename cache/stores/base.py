"""What every store shares: the protocol, the check of keys, and messages that never show a credential."""

import re
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from ..errors import ReadOnly, StoreError

# Where a store keeps what is its own: unfinished attempts, a probe. Never listed, never an object's key.
ATTEMPTS = "attempts"
PROBE = f"{ATTEMPTS}/exclusive-create"
PROBE_TEXT = b"fastkd asks with this object whether the store creates exclusively.\n"


NO_LISTING = (
    "{store}: {prefix!r} cannot be listed, HTTP has no listing. Only a sealed cache can be read from here: run "
    "`fastkd seal` on it where it was written."
)

Names = list[str]  # inside a store's class, `list` is a method


class Entry(NamedTuple):
    """One object of a listing: its key and its size in bytes."""

    key: str
    size: int


@runtime_checkable
class Store(Protocol):
    """Immutable objects by key, each made whole and once. Anything with these members is a store.

    Keys are relative paths with "/" between their parts. Every method raises StoreError when a request fails.
    """

    @property
    def readonly(self) -> bool:
        """Whether `create` is known to be refused."""
        ...

    def describe(self) -> str:
        """The store's name for messages and logs; never with credentials."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound if it is absent."""
        ...

    def get_tail(self, key: str, length: int) -> bytes:
        """The last `length` bytes, or all if the object is shorter. Raises NotFound if it is absent."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose key starts with `prefix` ("shards/"), in no order; without the store's own files."""
        ...

    def create(self, key: str, data: bytes | memoryview) -> bool:
        """Make the object if none is there. True: made whole by this call. False: one was there; it is untouched.

        After a StoreError the object may be there or not; and a store that retries a lost answer may say False of
        an object that this call made. What the object says of its writer decides.
        """
        ...

    def sweep(self) -> Names:
        """Remove what dead attempts left behind, and nothing of living ones; the names of what was removed."""
        ...


def check_key(store: Store, key: str) -> list[str]:
    """The parts of a key that stays inside the store. Raises StoreError for any other."""
    parts = key.split("/") if isinstance(key, str) else []
    if not parts or {"", ".", ".."} & set(parts) or "\\" in key or not key.isprintable() or parts[0] == ATTEMPTS:
        raise StoreError(
            f"{store.describe()}: {key!r} is no key of an object. A key is a relative path with '/' between its parts, "
            f"none of them empty, '.' or '..', without backslashes or control characters, and not in '{ATTEMPTS}/'."
        )
    return parts


def check_prefix(store: Store, prefix: str) -> list[str]:
    """The folders that a prefix of keys names in full. Raises StoreError if it leads out of the store."""
    folders = prefix.split("/")[:-1]
    if folders:
        check_key(store, "/".join(folders))
    return folders


def check_length(length: int) -> None:
    """Raises ValueError unless a tail of `length` bytes can be asked for."""
    if length < 1:
        raise ValueError(f"the tail of an object is at least one byte, not {length}")


def flat(data: bytes | memoryview) -> memoryview:
    """The bytes of `data` as a flat, contiguous view. Raises TypeError if they are not contiguous."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def clean(text: str) -> str:
    """`text` without what may be a credential: user:password@ and queries of URLs, values named like secrets."""
    text = re.sub(r"(\w://[^\s?\"'<>]*)\?[^\s\"'<>]*", r"\1", text)
    text = re.sub(r"(\w://)[^/\s\"'<>]*@", r"\1", text)
    secret = (
        r"sig|signature|secret\w*|password|\w*token|\w*credentials?|access_?key\w*|sas_key|account_key|x-amz-[\w-]+"
    )
    return re.sub(rf"(?i)\b({secret})(['\"]?\s*[=:]\s*['\"]?)(Bearer\s+|Basic\s+)?[^&\s\"',}}]+", r"\1\2…", text)


def words(error: BaseException) -> str:
    """What an error says, on one line of reasonable length and without credentials."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        text = str(error).split("\n\nDebug source")[0]
    text = " ".join(clean(text).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:600] + " …"


def harmless(error: BaseException) -> BaseException:
    """The error itself as a cause to chain, or its cleaned words where a traceback would print a credential."""
    link: BaseException | None = error
    while link is not None:
        if clean(str(link)) != str(link):
            return StoreError(f"{type(error).__name__}: {words(error)}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return error


def refuse(
    store: Store, operation: str, key: str, error: BaseException, step: str, kind: type[StoreError] = StoreError
) -> NoReturn:
    """Raise `kind` for a request that failed, naming store, operation, object, the error's words and the next step."""
    raise kind(f"{store.describe()}: {operation} of {key!r} failed: {words(error)}. {step}") from harmless(error)


class BaseStore:
    """The members that most stores have in common."""

    def describe(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.describe()}>"

    @property
    def readonly(self) -> bool:
        return False

    def sweep(self) -> Names:
        """Nothing: here an attempt leaves nothing behind."""
        return []


class ReadOnlyStore(BaseStore):
    """A store that is read and never written."""

    @property
    def readonly(self) -> bool:
        return True

    def create(self, key: str, data: bytes | memoryview) -> bool:
        """Refused. Raises ReadOnly."""
        raise ReadOnly(
            f"{self.describe()}: {key!r} cannot be created, this kind of store is read-only. "
            "Write the cache to a local folder or an object store (s3://, gs://, az://)."
        )
