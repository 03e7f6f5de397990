"""Files and folders that appear when they are whole: written beside their place, and moved there at the end.

A process that is killed cannot tidy up. Its unfinished folders go when the next run makes one of the same name: while a
process lives it holds a lock on its own, which the system takes back when it dies.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and what a killed process left stays
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_writable", "scratch_folder", "whole_folder", "write_whole"]

_ROOM = "Free some space, or name another place."


def check_writable(place: str | os.PathLike[str]) -> Path:
    """Refuse a file or folder that could not be made, before any work is done.

    Args:
        place (`str`): what will be written; need not exist, nor the folders above it.

    Returns:
        `Path`: the nearest folder above it that exists.

    Raises:
        CheckpointError: that folder is not writable, or is none.
    """
    parent = Path(place).absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{parent} is not writable ({error.strerror}). Name an output folder elsewhere."
        ) from error
    return parent


@contextmanager
def scratch_folder(parent: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """A new folder for the time of a `with`; first, those of the same name that killed processes left are removed.

    Args:
        parent (`str`): an existing folder.
        name (`str`): of what it is for; the machine's name and random letters are added to it.

    Yields:
        `Path`: the folder; gone afterwards, whatever happened.
    """
    # Locks of other machines may not be seen on a shared disk, so folders of this one alone are looked at.
    prefix = f"{name}-{re.sub('[^A-Za-z0-9]', '', platform.node())[:16]}-"
    for other in Path(parent).iterdir():
        if other.name.startswith(prefix):
            _remove_abandoned(other)
    folder, lock = _locked_folder(Path(parent), prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder, and the lock that says that its process lives; `None` where the file system has no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        if fcntl is None:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for abandoned before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue  # as above
        except OSError:
            os.close(lock)
            return folder, None
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder whose process is dead. Where that cannot be known it stays."""
    if fcntl is None or folder.is_symlink() or not folder.is_dir():
        return
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its process lives, or there are no locks
    finally:
        os.close(lock)


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which becomes the target when the `with` ends without an exception.

    Args:
        target (`str`): does not exist, or is an empty folder; folders above it are made.

    Yields:
        `Path`: beside the target; gone afterwards, whatever happened.

    Raises:
        CheckpointError: for an `OSError` or a `SafetensorError` inside the `with`, and where the target cannot be made.
    """
    place = Path(target)
    try:
        place.absolute().parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(place.absolute().parent, f".{place.name}.partial") as partial:
            partial.chmod(0o755)  # others may read it, as they may a folder that was just made
            yield partial
            if place.exists():
                place.rmdir()
            partial.replace(place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{place} could not be written: {error}. Nothing was left behind. {_ROOM}") from error


def write_whole(file: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8; what was there stays until the new one is whole.

    Args:
        file (`str`): in a folder that exists.
        text (`str`): what it is to hold.

    Raises:
        CheckpointError: it cannot be written.
    """
    place = Path(file)
    partial = place.with_name(f"{place.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(place)
    except OSError as error:
        raise CheckpointError(f"{place} could not be written: {error}. {_ROOM}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
