"""Files and folders that appear when they are whole: written beside their place, and moved there at the end.

A process that is killed cannot tidy up. Its unfinished folders go when the next run makes one of the same name: beside
each lies the file of a lock, which its process holds while it lives. No folder is ever without one, so one that is
(where the file system has no locks) is left alone.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .errors import CheckpointError, ConfigError
from .locks import drop_lock, take_lock

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = [
    "check_apart",
    "check_no_folder",
    "check_writable",
    "folder_above",
    "is_taken",
    "place_of",
    "room_for",
    "scratch_folder",
    "whole_folder",
    "write_whole",
]

_ROOM = "Free some space, or name another place."
_LOCK = ".lock"
_LAST = "config.json"  # without which nothing loads a folder


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


def check_apart(places: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Refuse places of which one is or lies in another: what a run removes or replaces at its end would go with it.

    Args:
        places (mapping of `str` to `str`): by the option that names them; `None` where nothing is written.

    Raises:
        ConfigError: with both options.
    """
    named = [(option, Path(os.path.realpath(place))) for option, place in places.items() if place is not None]
    for (inner, inside), (outer, folder) in permutations(named, 2):
        if folder == inside or folder in inside.parents:
            raise ConfigError(
                f"`{inner}` ({inside}) lies in `{outer}` ({folder}): the end of a run would take it away or find it in "
                "the way. Name a place beside it."
            )


def check_no_folder(name: str, place: str | os.PathLike[str]) -> None:
    """Refuse a folder where a file will be written, before any work is done.

    Args:
        name (`str`): the option that names the file.
        place (`str`): need not exist.

    Raises:
        ConfigError: it is a folder.
    """
    if Path(place).is_dir():
        raise ConfigError(f"`{name}` should be a file. Found the folder {str(place)!r}; name a file in it.")


def folder_above(place: str | os.PathLike[str]) -> Path:
    """The nearest folder above a file or folder that exists.

    Args:
        place (`str`): need not exist, nor the folders above it.
    """
    parent = Path(place).absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def place_of(target: str | os.PathLike[str]) -> Path:
    """Where a folder really is: absolute, and without links on the way, the last one among them.

    Args:
        target (`str`): need not exist, nor what a link points to.
    """
    return Path(os.path.realpath(target))


def room_for(target: str | os.PathLike[str]) -> Path:
    """The folder to write in what becomes a target folder: the one above it, on the same disk, if that can be.

    A folder that is there already may be a mount point or the working directory, which cannot be replaced, or stand in
    a folder that is not writable: then it is the target itself.

    Args:
        target (`str`): does not exist, or is a folder.
    """
    place = place_of(target)
    if not place.is_dir():
        return place.parent
    if os.path.ismount(place) or os.listdir(place) or os.path.samefile(place, os.getcwd()):
        return place  # the working directory would be gone, and this process nowhere
    # Mounts of a part of the same disk look like folders, but nothing can be moved across their edge.
    try:
        inside = Path(tempfile.mkdtemp(prefix=f".{place.name}.probe-", dir=place))
    except OSError:
        return place.parent
    try:
        inside.rename(place.parent / inside.name)
    except OSError:
        inside.rmdir()
        return place
    (place.parent / inside.name).rmdir()
    return place.parent


def is_taken(target: str | os.PathLike[str]) -> bool:
    """Whether something is at a target that a new folder must not replace; what unfinished runs left there is none.

    Args:
        target (`str`): need not exist.
    """
    place = place_of(target)
    if not place.is_dir():
        return place.exists()
    # Disks that are mounted there bring a folder of the file system's own.
    return any(not name.startswith(f".{place.name}.") and name != "lost+found" for name in os.listdir(place))


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

    A link is followed. A folder that cannot be replaced (see [`room_for`]) gets the files one by one, at the end.

    Yields:
        `Path`: beside the target, or in it; gone afterwards, whatever happened.

    Raises:
        CheckpointError: for an `OSError` or a `SafetensorError` inside the `with`, and where the target cannot be made.
    """
    place = place_of(target)
    try:
        room = room_for(place)
        room.mkdir(parents=True, exist_ok=True)
        with scratch_folder(room, f".{place.name}.partial") as partial:
            partial.chmod(0o755)  # others may read it, as they may a folder that was just made
            yield partial
            if room == place:
                _move_in(partial, place)
                return
            if place.exists():
                place.rmdir()
            partial.replace(place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} could not be written: {error}. Nothing was left behind. {_ROOM}") from error


def _move_in(folder: Path, place: Path) -> None:
    """Move what is in a folder into one that is there; after an error or an interrupt none of it is."""
    if is_taken(place):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(place))
    moved: list[Path] = []
    try:
        for name in sorted(os.listdir(folder), key=lambda name: (name == _LAST, name)):
            moved.append(place / name)
            (folder / name).rename(place / name)
    except BaseException:
        for path in moved:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


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
