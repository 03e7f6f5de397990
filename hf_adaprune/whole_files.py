"""Files and folders that appear when they are whole: written beside their place, and moved there at the end.

A process that is killed cannot tidy up. Its unfinished folders go when the next run makes one of the same name: beside
each lies the file of a lock, which its process holds while it lives. No folder is ever without one, so one that is
(where the file system has no locks) is left alone.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .errors import CheckpointError
from .locks import drop_lock, take_lock

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["check_writable", "folder_above", "scratch_folder", "whole_folder", "write_whole"]

_ROOM = "Free some space, or name another place."
_LOCK = ".lock"


def check_writable(place: str | os.PathLike[str]) -> Path:
    """Refuse a file or folder that could not be made, before any work is done.

    Args:
        place (`str`): what will be written; need not exist, nor the folders above it.

    Returns:
        `Path`: the nearest folder above it that exists.

    Raises:
        CheckpointError: that folder is not writable, or is none.
    """
    parent = folder_above(place)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{parent} is not writable ({error.strerror}). Name an output folder elsewhere."
        ) from error
    return parent


def folder_above(place: str | os.PathLike[str]) -> Path:
    """The nearest folder above a file or folder that exists.

    Args:
        place (`str`): need not exist, nor the folders above it.
    """
    parent = Path(place).absolute().parent
    while not parent.exists():
        parent = parent.parent
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
    for place in Path(parent).iterdir():
        if place.name.startswith(prefix) and place.suffix == _LOCK:
            _remove_abandoned(place)
    folder, lock = _locked_folder(Path(parent), prefix)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, BaseFileLock | None]:
    """A new folder, and the lock that says that its process lives; `None` where the file system has no locks."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(8)}"
        place = folder.with_name(f"{folder.name}{_LOCK}")
        lock = None
        try:
            lock = take_lock(place)
            if lock is None:
                continue  # another process took the file for left over before it was locked
        except OSError:
            with suppress(OSError):
                place.unlink(missing_ok=True)
        try:
            folder.mkdir(mode=0o700)
        except BaseException:
            if lock is not None:
                drop_lock(lock)
            raise
        return folder, lock


def _remove_abandoned(place: Path) -> None:
    """Remove a folder whose process is dead, given the file of its lock. Where that cannot be known it stays."""
    try:
        lock = take_lock(place)
    except OSError:
        return
    if lock is not None:
        _remove(place.with_suffix(""), lock)


def _remove(folder: Path, lock: BaseFileLock | None) -> None:
    """Remove a folder with its lock. Links and files of its name stay."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    if lock is None:
        return
    if folder.is_dir() and not folder.is_symlink():
        lock.release()  # not all of it could be removed: the lock's file stays, so that the next run tries again
    else:
        drop_lock(lock)


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
