"""Locks on files, which the system takes back when their process ends, however it ends."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["drop_lock", "has_no_locks", "take_lock"]

_MISSING = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def take_lock(place: Path) -> BaseFileLock | None:
    """Take a lock, or find at once that another one, of this process or of another, holds it.

    Args:
        place (`Path`): of the lock file, in a folder that exists; it is made where it is not there.

    Returns:
        `filelock.BaseFileLock`: to be given to [`drop_lock`]; `None` where it is held.

    Raises:
        OSError: the file cannot be made (or is another user's), or the file system has no locks that die with their
            process. In the latter case the file may be there now.
    """
    from filelock import FileLock, Timeout

    # Whoever has the object has the lock, in whatever thread it is dropped. Without the system's locks filelock would
    # fall back to files, which outlive a process that is killed.
    lock = FileLock(place, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def has_no_locks(failure: OSError) -> bool:
    """Whether an error of [`take_lock`] says that the file system has no locks.

    Args:
        failure (`OSError`): what was raised.
    """
    return failure.errno in _MISSING


def drop_lock(lock: BaseFileLock) -> None:
    """Remove the file of a lock, and let go of the lock."""
    # While the lock is held: whoever opened the file meanwhile finds it without a name, and opens a new one. Windows
    # does not remove what is open; there filelock does it afterwards.
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()
