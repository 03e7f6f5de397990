"""Locks on files, which the system takes back when their process ends, however it ends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["drop_lock", "take_lock"]


def take_lock(place: Path) -> BaseFileLock | None:
    """Take a lock, or find at once that another one, of this process or of another, holds it.

    Args:
        place (`Path`): of the lock file, in a folder that exists; it is made where it is not there.

    Returns:
        `filelock.BaseFileLock`: to be given to [`drop_lock`]; `None` where it is held.

    Raises:
        OSError: the file cannot be made (or is another user's), or the file system has no locks. In the latter case
            the file may be there now.
    """
    from filelock import FileLock, Timeout

    # Whoever has the object has the lock, in whatever thread it is dropped.
    lock = FileLock(place, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def drop_lock(lock: BaseFileLock) -> None:
    """Remove the file of a lock, and let go of the lock."""
    # While the lock is held: whoever opened the file meanwhile finds it without a name, and opens a new one. Windows
    # does not remove what is open; there filelock does it afterwards.
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()
