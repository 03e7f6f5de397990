"""Commands that go on: what `prune`, `search` and `recover` keep beside their output, and say when they break off."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AdaPruneError, ConfigError, RunError
from .whole_files import check_apart, folder_above, place_of

if TYPE_CHECKING:
    from .estimate import Estimate

__all__ = [
    "DiskRoom", "add_run_arguments", "begin_afresh", "check_run_place", "disk_rooms", "disk_table", "goes_on",
    "kept_beside", "run_place",
]  # fmt: skip

logger = logging.getLogger(__name__)

AFRESH = "--fresh"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that go on.

    Args:
        parser (`argparse.ArgumentParser`): of the command.
    """
    add = parser.add_argument
    add(
        "--run-dir",
        metavar="DIR",
        help="what the command goes on from after a kill (default: OUTPUT.run); removed at the end",
    )
    add("--no-run-dir", action="store_true", help="keep nothing to go on from")
    add(AFRESH, action="store_true", help="throw away what an earlier run of the command left, and begin again")


def run_place(arguments: argparse.Namespace) -> Path | None:
    """The folder that a command keeps its run in; `None` where it keeps nothing.

    Args:
        arguments (`argparse.Namespace`): of the command.

    Raises:
        ConfigError: a folder, and none.
    """
    if arguments.no_run_dir:
        if arguments.run_dir or arguments.fresh:
            raise ConfigError("`--no-run-dir` keeps nothing. Leave it out, or leave out --run-dir and --fresh.")
        return None
    if arguments.run_dir:
        return Path(arguments.run_dir)
    output = Path(arguments.output or "pruned")
    return output.with_name(f"{output.name}.run")


def check_run_place(arguments: argparse.Namespace, journal: Path | None = None) -> None:
    """Refuse an output or a journal in the folder of the run, which goes when the command succeeds, and the reverse.

    Args:
        arguments (`argparse.Namespace`): of the command.
        journal (`Path`, *optional*): of the command.

    Raises:
        ConfigError: with both options.
    """
    check_apart({"--output": arguments.output, "--journal": journal, "--run-dir": run_place(arguments)})


@dataclass(frozen=True)
class DiskRoom:
    """What a command needs of a disk, and what there is.

    Args:
        folder (`str`): on the disk.
        holds (`tuple[str, ...]`): what will be written there.
        needed_bytes (`int`): what it takes, all at the same time; less what an earlier run left.
        free_bytes (`int`): what is free.
    """

    folder: str
    holds: tuple[str, ...]
    needed_bytes: int
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "holds": list(self.holds)}


def disk_rooms(arguments: argparse.Namespace, output: Path, expected: Estimate) -> tuple[DiskRoom, ...]:
    """The disks of an output and of the folder of its run, with a warning for those that lack room.

    Args:
        arguments (`argparse.Namespace`): of the command.
        output (`Path`): what the command writes.
        expected ([`Estimate`]): what is written.

    Returns:
        `tuple[DiskRoom, ...]`: one or two; none where nothing is kept for a restart.
    """
    from .run_folder import SPARE_BYTES, RunFolder

    run = run_place(arguments)
    if run is None:
        return ()
    # What lies there counts: it is used, or (--fresh) goes before anything is written.
    there = _bytes_in(run) if RunFolder(run).resumed else 0
    needed = {output: expected.output_bytes, run: max(0, expected.run_bytes - (0 if arguments.fresh else there))}
    disks: dict[int, list[Path]] = {}
    folders: dict[int, Path] = {}
    for place in needed:
        folder = place.absolute() if place.is_dir() else folder_above(place_of(place))
        disk = folder.stat().st_dev
        folders.setdefault(disk, folder)
        disks.setdefault(disk, []).append(place)
    rooms = []
    for disk, places in disks.items():
        free = shutil.disk_usage(folders[disk]).free + (there if arguments.fresh and run in places else 0)
        holds = tuple(map(str, places))
        rooms.append(DiskRoom(str(folders[disk]), holds, sum(needed[place] for place in places), free))
    for room in rooms if os.environ.get("RANK", "0") == "0" else ():  # of several processes one says it
        if room.free_bytes < room.needed_bytes + SPARE_BYTES:
            logger.warning(
                "%s has %s MiB free, %s will need about %s MiB there. Free some space, or name other disks (--output, "
                "--run-dir; --no-run-dir keeps nothing for a restart).",
                room.folder,
                f"{room.free_bytes / 2**20:,.0f}",
                " and ".join(room.holds),
                f"{(room.needed_bytes + SPARE_BYTES) / 2**20:,.0f}",
            )
    return tuple(rooms)


def _bytes_in(folder: Path) -> int:
    total = 0
    with suppress(OSError):  # a run that is going on there writes and removes; its lock tells of it later
        for file in folder.rglob("*"):
            total += file.stat().st_size if file.is_file() else 0
    return total


def disk_table(rooms: Sequence[DiskRoom]) -> str:
    """What will be needed of every disk, and what is free.

    Args:
        rooms (sequence of [`DiskRoom`]): from [`disk_rooms`].
    """
    from .reporting import text_table

    rows = [
        (" and ".join(room.holds), f"{room.needed_bytes / 2**20:,.0f} MiB", f"{room.free_bytes / 2**20:,.0f} MiB")
        for room in rooms
    ]
    return text_table(("disk of", "needed, about", "free"), rows)


def goes_on(arguments: argparse.Namespace, journal: Path) -> bool:
    """Whether an earlier run of this command left a run that writes to a journal.

    Args:
        arguments (`argparse.Namespace`): of the command.
        journal (`Path`): its journal.
    """
    from .run_folder import RunFolder

    place = run_place(arguments)
    return place is not None and RunFolder(place).fact("journal") == str(journal.absolute())


def begin_afresh(arguments: argparse.Namespace, journal: Path | None = None) -> None:
    """With `--fresh`, delete what an earlier run left: its folder, and the journal that only it has written.

    Args:
        arguments (`argparse.Namespace`): of the command.
        journal (`Path`, *optional*): of the command.

    Raises:
        RunError: a run is going on there, or it is no folder of a run.
    """
    from .run_folder import open_run

    place = run_place(arguments)
    if not arguments.fresh or place is None or not place.exists():
        return
    is_own = journal is not None and goes_on(arguments, journal)
    with open_run(place) as run:
        assert run is not None
        if is_own and journal is not None:
            journal.unlink(missing_ok=True)
        run.remove()


@contextmanager
def kept_beside(
    arguments: argparse.Namespace, words: Sequence[str], output: Path, say: Callable[[str], Any], is_first: bool
) -> Iterator[Path | None]:
    """Hold an output and the folder of its run, which goes when the command succeeds, and say what stays when not.

    Args:
        arguments (`argparse.Namespace`): of the command.
        words (sequence of `str`): the command line.
        output (`Path`): what the command writes.
        say (`Callable`): writes a line for people.
        is_first (`bool`): of several processes the first one locks and removes.

    Yields:
        `Path`: of the run's folder, *optional*.

    Raises:
        RunError: another run is writing to one of them.
    """
    from .run_folder import locked_output, open_run

    place = run_place(arguments)
    if not is_first:
        yield place
        return
    with locked_output(output):
        try:
            with open_run(place) as run:
                yield place
                if run is not None:
                    run.remove()
        except RunError:
            raise  # it says what to do
        except (AdaPruneError, KeyboardInterrupt) as error:
            if place is not None and place.is_dir():
                again = shlex.join([word for word in words if word != AFRESH])
                say(f"what was done so far is kept in {place}; to go on: hf-adaprune {again}")
            elif isinstance(error, KeyboardInterrupt):
                say("nothing was written; to start again, run the same command.")
            raise
