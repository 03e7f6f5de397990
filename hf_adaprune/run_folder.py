"""What a long run has done so far, in a folder: artefacts that are whole or not there, and locks against a second run.

An artefact is tensors in one safetensors file and a note in JSON, which is written last and holds the digest of both:
without its note an artefact does not exist, and one whose digest is another is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from .errors import AdaPruneError, CheckpointError, RunError
from .locks import drop_lock, has_no_locks, take_lock
from .whole_files import place_of, room_for, write_whole

if TYPE_CHECKING:
    import torch

__all__ = ["SPARE_BYTES", "RunFolder", "digest_of_file", "locked", "locked_output", "once", "once_noted", "open_run"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 1
_KIND = "run of hf_adaprune"  # what tells a folder of a run from others, which are never deleted
_FACTS, _LOCK = "run.json", "lock"
SPARE_BYTES = 64 * 2**20  # that stay free beside what is about to be written
_DIGEST = 64  # characters of a sha256, which is not worth printing
_NAMED = 12  # differences that an error lists
_held: dict[Path, tuple[int, int]] = {}  # lock files of this process: the thread that holds one, and how often


@contextlib.contextmanager
def locked(place: Path, what: str | os.PathLike[str], error: type[AdaPruneError] = RunError) -> Iterator[bool]:
    """Be the only run that writes somewhere, for the time of a `with`.

    The system lets go of the lock when the process ends, however it ends; where the file system has no locks, a
    warning says so and nothing is locked. A thread may take a lock that it has.

    Args:
        place (`Path`): of the lock file, in a folder that exists; gone afterwards.
        what (`str`): what is written to, for the message.
        error (*optional*, defaults to [`RunError`]): type of what is raised.

    Yields:
        `bool`: whether it was taken now, and not by this thread before.

    Raises:
        RunError: another run holds the lock.
    """
    place = place.absolute()
    own = threading.get_ident()
    thread, times = _held.get(place, (own, 0))
    if times and thread == own:
        _held[place] = own, times + 1
        try:
            yield False
        finally:
            _held[place] = own, times
        return
    lock = None
    try:
        lock = take_lock(place)
        if lock is None:
            raise error(f"another run{_holder(place)} is writing to {what}. Wait for it, or choose another output.")
    except OSError as failure:
        if not has_no_locks(failure):
            raise error(f"{place} cannot be written ({failure.strerror}). Choose another output.") from failure
        logger.warning("%s is on a file system without locks: a second run there would not be noticed.", what)
    _held[place] = own, 1
    try:
        with contextlib.suppress(OSError):
            if lock is None:
                place.unlink(missing_ok=True)
            else:  # for the message above alone
                said = {"process": os.getpid(), "host": socket.gethostname()}
                place.write_text(json.dumps(said), encoding="utf-8")
        yield True
    finally:
        del _held[place]
        if lock is not None:
            drop_lock(lock)


def _holder(place: Path) -> str:
    try:
        said = json.loads(place.read_text(encoding="utf-8"))
        return f" (process {int(said['process'])} on {said['host']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


@contextlib.contextmanager
def locked_output(target: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only run that writes an output folder.

    Args:
        target (`str`): the folder, which need not exist; folders above it are made.

    Raises:
        RunError: another run writes to it, or the folder above it cannot be written.
    """
    place = place_of(target)
    room = room_for(place)
    try:
        room.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{room} cannot be made ({error.strerror}). Choose another output.") from error
    with locked(room / f".{place.name}.lock", target):
        yield


class RunFolder:
    """The folder of one run; made by [`open_run`].

    Args:
        place (`Path`): the folder.
        writes (`bool`, *optional*, defaults to `True`): of several processes one writes, the others read.

    Attributes:
        resumed (`bool`): an earlier run left something.
    """

    def __init__(self, place: Path, writes: bool = True) -> None:
        self.place, self.writes = place, writes
        self.resumed = self.fact("kind") == _KIND

    def bind(self, facts: Mapping[str, Any]) -> None:
        """Write down what the run is about, or compare with what an earlier run wrote down.

        Args:
            facts (`dict[str, Any]`): JSON types by name.

        Raises:
            RunError: other facts, with their names.
        """
        if not self.writes:
            return
        wanted = json.loads(json.dumps({"kind": _KIND, "format": FORMAT, **facts}))
        path = self.place / _FACTS
        if not path.is_file():
            self._write(path, wanted)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is damaged. Remove {self.place}, or choose another output.") from error
        there, here = _flat(found), _flat(wanted)
        different = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if different:
            changes = [_change(name, there.get(name), here.get(name)) for name in different]
            more = [f"{len(changes) - _NAMED} more"] if len(changes) > _NAMED else []
            said = "; ".join([*changes[:_NAMED], *more])
            raise RunError(
                f"{self.place} is of a run that began with something else: {said}. Give the same to go on with it; to "
                "begin again, remove the folder (--fresh does), or choose another output."
            )

    def has(self, name: str) -> bool:
        """Whether there is such an artefact, whole or damaged."""
        return self._note(name).is_file()

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor], data: Any = None) -> None:
        """Write an artefact, which exists when this returns.

        Args:
            name (`str`): of the artefact; slashes make folders.
            tensors (`dict[str, torch.Tensor]`): on any device.
            data (*optional*): JSON types.

        Raises:
            CheckpointError: it cannot be written; everything before stays.
        """
        if not self.writes:
            return
        note, file = self._note(name), self._file(name)
        partial = file.with_name(f"{file.name}.partial")
        written = {"data": data, "sha256": ""}
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.unlink(missing_ok=True)
            if tensors:
                from safetensors.torch import save_file

                save_file({key: _own(tensor) for key, tensor in tensors.items()}, partial)
                written["sha256"] = digest_of_file(partial)
                partial.replace(file)
            self._write(note, {**written, "digest": _digest(written)})
        except (OSError, SafetensorError) as error:
            raise self._failed(note, error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """An artefact's tensors (on the CPU) and data; `None` where there is none, or a damaged one."""
        note, file = self._note(name), self._file(name)
        if not note.is_file():
            return None
        try:
            said = json.loads(note.read_text(encoding="utf-8"))
            written = {"data": said["data"], "sha256": said["sha256"]}
            whole = said["digest"] == _digest(written)
            tensors: dict[str, torch.Tensor] = {}
            if whole and written["sha256"]:
                from safetensors.torch import load_file

                whole = digest_of_file(file) == written["sha256"]
                # Copies in memory of their own: products of the same numbers at other alignments may differ in bits.
                tensors = {key: tensor.clone() for key, tensor in load_file(file).items()} if whole else {}
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):
            whole = False
        if whole:
            return tensors, written["data"]
        self.damaged(name)
        return None

    def damaged(self, name: str) -> None:
        """Say that an artefact is of no use, and forget it."""
        logger.warning("%s of an earlier run is damaged and is made again.", self._note(name).with_suffix(""))
        if self.writes:
            self._note(name).unlink(missing_ok=True)
            self._file(name).unlink(missing_ok=True)

    def check_space(self, needed: int, what: str) -> None:
        """Refuse a disk without room for what is about to be kept.

        Args:
            needed (`int`): bytes.
            what (`str`): what takes them.

        Raises:
            CheckpointError: with both numbers.
        """
        free = shutil.disk_usage(self.place).free
        if self.writes and free < needed + SPARE_BYTES:
            raise CheckpointError(
                f"{self.place.absolute()} has {free / 2**20:,.0f} MiB free, {what} need up to "
                f"{(needed + SPARE_BYTES) / 2**20:,.0f} MiB there. Free some space, name a folder on another disk "
                "(run_dir, --run-dir), or keep nothing for a restart (run_dir=None, --no-run-dir)."
            )

    def folder(self, name: str) -> Path:
        """An empty folder in this one, for files that are written piece by piece."""
        path = self.place / name
        if self.writes:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def fact(self, name: str) -> Any:
        """What an earlier run wrote down under a name; `None` where it did not."""
        try:
            return json.loads((self.place / _FACTS).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError):
            return None

    @property
    def is_bare(self) -> bool:
        """Whether nothing was kept yet."""
        return not any(path.suffix == ".json" for path in self.place.rglob("*") if path != self.place / _FACTS)

    def remove(self) -> None:
        """Delete the folder: the result of the run is where it should be."""
        if self.writes:
            shutil.rmtree(self.place, ignore_errors=True)

    def _note(self, name: str) -> Path:
        return self.place / f"{name}.json"

    def _file(self, name: str) -> Path:
        return self.place / f"{name}.safetensors"

    def _write(self, path: Path, data: Any) -> None:
        try:
            write_whole(path, json.dumps(data, indent=2) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
            raise self._failed(path, error) from error

    def _failed(self, path: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{path} could not be written: {error}. What was kept before is whole; free some space on that disk and do "
            "the same again."
        )


@contextlib.contextmanager
def open_run(place: str | os.PathLike[str] | None, writes: bool = True) -> Iterator[RunFolder | None]:
    """The folder of a run, made where it does not exist and locked for the time of the `with`.

    A folder that nothing was kept in goes again.

    Args:
        place (`str`, *optional*): of the folder; without one nothing is kept.
        writes (`bool`, *optional*, defaults to `True`): of several processes one writes, the others read.

    Raises:
        RunError: another run holds the folder, it is none of a run, or it cannot be written.
    """
    if place is None:
        yield None
        return
    run = RunFolder(Path(place), writes)
    if not writes:
        yield run
        return
    if run.place.exists() and not run.resumed and (not run.place.is_dir() or not _is_left_over(run.place)):
        raise RunError(f"{place} is there and is no folder of a run. Name another one, or remove it first.")
    try:
        run.place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{place} cannot be made ({error.strerror}). Choose another output.") from error
    with locked(run.place / _LOCK, place):
        if run.is_bare:
            (run.place / _FACTS).unlink(missing_ok=True)
            run.resumed = False
        try:
            yield run
        finally:
            if run.place.is_dir() and run.is_bare:
                run.remove()


def once(
    run: RunFolder | None,
    name: str,
    make: Callable[[], T],
    pack: Callable[[T], tuple[Mapping[str, torch.Tensor], Any]],
    unpack: Callable[[Mapping[str, torch.Tensor], Any], T],
) -> T:
    """What an earlier run kept under a name, or what is made now, and kept.

    Args:
        run ([`RunFolder`], *optional*): without one it is made.
        name (`str`): of the artefact.
        make (`Callable`): makes the value.
        pack (`Callable`): the value as tensors and JSON types.
        unpack (`Callable`): the value from them.
    """
    found = None if run is None else run.read(name)
    if found is not None:
        return unpack(*found)
    made = make()
    if run is not None:
        run.keep(name, *pack(made))
    return made


def once_noted(run: RunFolder | None, name: str, make: Callable[[], T]) -> T:
    """[`once`] for a value of JSON types.

    Args:
        run ([`RunFolder`], *optional*): without one it is made.
        name (`str`): of the artefact.
        make (`Callable`): makes the value.
    """
    return once(run, name, make, lambda made: ({}, made), lambda _, data: data)


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_left_over(place: Path) -> bool:
    """Whether a folder is empty, but for the lock of a run that was killed before it kept anything."""
    return all(path.name == _LOCK for path in place.iterdir())


def _digest(written: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that shares its memory with no other: safetensors writes no views."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            found.update(_flat(value, f"{path}{key}."))
        else:
            found[f"{path}{key}"] = value
    return found


def _change(name: str, before: Any, after: Any) -> str:
    name = name.removeprefix("config.")
    if any(isinstance(value, str) and len(value) == _DIGEST for value in (before, after)):
        return name
    texts = [json.dumps(value) for value in (before, after)]
    short = [text if len(text) <= 200 else f"{text[:197]}..." for text in texts]
    return f"{name} {short[0]} -> {short[1]}"
