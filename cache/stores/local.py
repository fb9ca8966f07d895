"""A cache in a local folder. POSIX: it rests on hard links, flock and openat."""

import errno
import fcntl
import logging
import os
import stat
import urllib.parse
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..credentials import redact
from ..errors import CacheError, NotFound
from .base import ATTEMPTS, MOST_BYTES, Entry, Names, Store, open_store, refuse, register_store

log = logging.getLogger(__name__)

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
SUFFIX = ".part"
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK}
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}


class LocalStore(Store):
    """Objects are files under one folder.

    An attempt writes a file in `attempts/`, syncs it, and links it to its final name, which fails if that exists; so
    an object is never partial, and a power cut does not undo what `create` reported. The attempt's file is locked
    (flock) while its writer lives, which is how `sweep` recognizes dead attempts. Reading writes nothing, and follows
    no symbolic link below the folder. Modes follow the umask. Can be pickled, and used after a fork.
    """

    ERRORS = (OSError,)

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.realpath(root)
        self._durable: set[tuple[str, ...]] = set()  # folders whose own entry this process has synced

    def describe(self) -> str:
        return self._root

    @property
    def readonly(self) -> bool:
        """Whether this process may not write the folder (permissions, or a read-only file system)."""
        return not os.access(self._root, os.W_OK | os.X_OK)

    def _put(self, key: str, data: memoryview) -> bool:
        *folders, name = key.split("/")
        with self._folder(folders, make=True) as target:
            if _stat(name, target):
                os.fsync(target)  # its writer may not have synced it yet, and False also promises that it is durable
                return False
            with self._folder([ATTEMPTS], make=True) as attempts:
                return self._commit(key, name, target, attempts, data)

    def _remove(self, key: str) -> bool:
        *folders, name = key.split("/")
        try:
            with self._folder(folders) as folder:
                os.unlink(name, dir_fd=folder)
                os.fsync(folder)
        except FileNotFoundError:
            return False
        with suppress(OSError):  # it is not empty; or another process was faster
            for depth in range(len(folders), 0, -1):
                with self._folder(folders[: depth - 1]) as parent:
                    os.rmdir(folders[depth - 1], dir_fd=parent)
                self._durable.discard(tuple(folders[:depth]))
        return True

    def sweep(self) -> Names:
        """Remove the files of attempts whose writer is gone; their names. Raises StoreError.

        On a file system without locks nothing is removed: a dead attempt looks like a living one.
        """
        with self._errors("sweeping", ATTEMPTS), suppress(FileNotFoundError), self._folder([ATTEMPTS]) as attempts:
            names = [name for name in os.listdir(attempts) if name.endswith(SUFFIX)]
            return [name for name in sorted(names) if _remove_dead(name, attempts)]
        return []  # nobody has attempted anything yet

    @contextmanager
    def _folder(self, folders: Names, make: bool = False) -> Iterator[int]:
        """The open folder (a descriptor), reached part by part so that no symbolic link can lead out of the cache."""
        folder = os.open(self._root, FOLDER)
        try:
            for depth, name in enumerate(folders, 1):
                path = tuple(folders[:depth])
                if make and not _stat(name, folder):
                    with suppress(FileExistsError):  # another writer was faster
                        os.mkdir(name, dir_fd=folder)
                    self._durable.discard(path)
                if make and path not in self._durable:
                    os.fsync(folder)
                    self._durable.add(path)
                inner = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def _read(self, key: str, length: int | None) -> bytes:
        *folders, name = key.split("/")
        with self._folder(folders) as folder:
            # Non-blocking, so that a pipe of that name is refused and not waited for.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if length is None and status.st_size > MOST_BYTES:
                raise OSError(errno.EINVAL, f"{status.st_size} bytes, more than an object of a cache has")
            with open(file, "rb", buffering=0, closefd=False) as reader:
                reader.seek(0 if length is None else max(0, status.st_size - length))
                return reader.readall()
        finally:
            os.close(file)

    def _entries(self, folders: Names) -> Iterator[Entry]:
        inner, found = deque[Names](), deque[Entry]()
        try:
            with self._folder(folders) as folder, os.scandir(folder) as entries:
                for entry in entries:
                    path = [*folders, entry.name]
                    if path == [ATTEMPTS]:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        inner.append(path)
                    else:
                        # A symbolic link is listed: that `get` refuses it says more than its absence.
                        found.append(Entry("/".join(path), entry.stat(follow_symlinks=False).st_size))
        except FileNotFoundError as error:
            if not os.path.isdir(self._root):
                refuse(self, "listing", "/".join(folders), error, "Has the cache been moved?", NotFound)
        yield from found
        for path in inner:
            yield from self._entries(path)

    def _next_step(self, error: Exception) -> str:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "Nothing was committed. Free some space (or raise the quota) and run again; what is committed stays."
        if code in (errno.EROFS, errno.EACCES, errno.EPERM):
            return "Nothing was changed. Check the folder's owner and mode, and whether its file system is read-only."
        if code in (errno.ELOOP, errno.ENOTDIR):
            return "A cache's objects are its own files: symbolic links are not followed. Copy it with `cp -rL`."
        return "If this message does not explain it, look at the disk and at the kernel's log, then run again."

    def _commit(self, key: str, name: str, target: int, attempts: int, view: memoryview) -> bool:
        """Write, sync, link, sync, unlink. True if the object is this attempt's."""
        file, temporary = _attempt(name, attempts)
        try:
            while view:
                view = view[os.write(file, view) :]
            os.fsync(file)
            try:
                os.link(temporary, name, src_dir_fd=attempts, dst_dir_fd=target, follow_symlinks=False)
                created = True
            except FileExistsError:
                # NFS reports this for a link that it made itself if the first response was lost.
                created = _is(file, name, target)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                step = (
                    "This file system makes no hard links, and an object is committed by one. Put the cache on one "
                    "that does (ext4, xfs, btrfs, NFS, tmpfs), or in an object store."
                )
                refuse(self, "creation", key, error, step)
            try:
                os.fsync(target)
            except OSError as error:
                step = "The object is there, but might not outlast a power cut. Run again: that syncs it."
                refuse(self, "creation", key, error, step)
        except BaseException as error:
            try:
                os.unlink(temporary, dir_fd=attempts)
            except OSError as second:
                error.add_note(f"{self.describe()}: {ATTEMPTS}/{temporary} is left over as well: {second.strerror}")
            raise
        else:
            os.unlink(temporary, dir_fd=attempts)
            return created
        finally:
            os.close(file)


@register_store("")
def open_path(path: str, create: bool) -> LocalStore:
    """The folder at a path, made with `create`. Raises NotFound if it does not exist, StoreError on failure."""
    try:
        if create:
            make_folder(path)
        elif not os.path.isdir(path):
            what = "a file, not a folder" if os.path.exists(path) else "not there"
            raise NotFound(f"{path}: {what}. A cache is a folder; `fastkd capture`, or `create_cache`, makes one.")
    except OSError as error:
        refuse(LocalStore(path), "opening", "", error, "The folder cannot be made; check the path and its owner.")
    return LocalStore(path)


@register_store("file://")
def open_file_url(url: str, create: bool) -> Store:
    """The store at the path of a URL of this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise CacheError(f"{redact(url)!r} names no folder of this machine. Give its path, or file:///path.")
    return open_store(urllib.request.url2pathname(parts.path), create=create)


def make_folder(path: str) -> None:
    """Make a folder and those it lies in, each synced into its parent. Raises OSError."""
    parent, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(parent):
        make_folder(parent)
    folder = os.open(parent, FOLDER)
    try:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name")
        os.fsync(folder)
    finally:
        os.close(folder)


def _stat(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is(file: int, name: str, folder: int) -> bool:
    """Whether a name still means this open file."""
    there = _stat(name, folder)
    return there is not None and os.path.samestat(os.fstat(file), there)


def _attempt(name: str, attempts: int) -> tuple[int, str]:
    """A new file in `attempts/`, open and locked; and its name."""
    while True:
        temporary = f"{name[:80]}.{uuid.uuid4().hex}{SUFFIX}"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=attempts)
        try:
            _lock(file, fcntl.LOCK_EX)
            # A sweep may have come between the creation and the lock, and taken it for dead.
            if _is(file, temporary, attempts):
                return file, temporary
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, how: int) -> bool:
    """Lock an open file. False where the file system has no locks; raises BlockingIOError if another holds it."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        # Commits need no lock; only what a dead writer leaves behind will stay.
        log.warning("no flock on this file system (%s): leftovers of dead writers stay", error.strerror)
        return False
    return True


def _remove_dead(name: str, attempts: int) -> bool:
    """Remove one attempt's file if nobody holds it. Whether it was removed."""
    try:
        # Open for writing: NFS gives an exclusive lock to nothing else.
        file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=attempts)
    except (FileNotFoundError, PermissionError):
        return False  # its writer has just finished; or it is another user's, who can tell
    try:
        # While we hold the lock its writer, if it has not got that far, waits, and then finds the name gone.
        if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) or not _is(file, name, attempts):
            return False
        os.unlink(name, dir_fd=attempts)
        return True
    except BlockingIOError:
        return False  # a living writer holds it
    finally:
        os.close(file)
