"""Files and folders appear when they are whole; what killed processes left goes, what living ones hold stays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from hf_adaprune import whole_files
from hf_adaprune.errors import CheckpointError, ConfigError
from hf_adaprune.locks import drop_lock, take_lock
from hf_adaprune.whole_files import check_apart, is_taken, room_for, scratch_folder, whole_folder, write_whole

WRITES = """
import sys
from hf_adaprune.whole_files import whole_folder
with whole_folder(sys.argv[1]) as folder:
    (folder / "half.txt").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(target: Path) -> Iterator[subprocess.Popen]:
    """Another process in the middle of writing a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with writer(target) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = left_in(tmp_path)
    assert left == [left[0], f"{left[0]}.lock"] and left[0].startswith(".out.partial-")
    with whole_folder(tmp_path / "outer") as folder:
        (folder / "a.txt").write_text("another name")
    assert left_in(tmp_path) == [*left, "outer"]
    with whole_folder(target) as folder:
        (folder / "a.txt").write_text("whole")
        assert left_in(folder) == ["a.txt"]
        assert left_in(tmp_path) == [folder.name, f"{folder.name}.lock", "outer"]
    assert left_in(tmp_path) == ["out", "outer"] and left_in(target) == ["a.txt"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with writer(target) as process:
        with scratch_folder(tmp_path, ".out.partial"):
            assert len(left_in(tmp_path)) == 4
        assert len(left_in(tmp_path)) == 2
        process.communicate("go on")
        assert process.returncode == 0
    assert left_in(tmp_path) == ["out"] and left_in(target) == ["half.txt"]


def test_two_folders_of_one_name_and_one_process(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "a") as one, scratch_folder(tmp_path, "a") as other:
        assert one != other and one.is_dir() and other.is_dir()
    assert left_in(tmp_path) == []


def test_folders_of_other_machines_files_and_links_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_files.platform, "node", lambda: "here.local")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial-there-x1").mkdir()
    (tmp_path / ".out.partial-there-x1.lock").touch()
    (tmp_path / ".out.partial-herelocal-x2").write_text("a file")
    (tmp_path / ".out.partial-herelocal-x3").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / ".out.partial-herelocal-x4").mkdir()
    before = left_in(tmp_path)
    for name in ("x2", "x3", "x4", "x5"):  # the last one is of a process that was killed before it made the folder
        (tmp_path / f".out.partial-herelocal-{name}.lock").touch()
    with scratch_folder(tmp_path, ".out.partial"):
        pass
    assert sorted(set(before) ^ set(left_in(tmp_path))) == [".out.partial-herelocal-x4"]


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_files.platform, "node", lambda: "here")
    (tmp_path / "a-here-x").mkdir()  # of a process that found no locks either
    (tmp_path / "a-here-y").mkdir()
    (tmp_path / "a-here-y.lock").touch()

    def refuses(lock: FileLock) -> None:
        Path(lock.lock_file).touch()  # it is opened before it is locked
        raise OSError(95, "Operation not supported")

    before = left_in(tmp_path)
    monkeypatch.setattr(FileLock, "acquire", refuses)
    for _ in range(2):
        with scratch_folder(tmp_path, "a") as folder:
            assert folder.is_dir() and left_in(tmp_path) == sorted([*before, folder.name])
        assert left_in(tmp_path) == before


def test_a_lock_that_was_taken_for_left_over_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may look between making the file of a lock and locking it, and before the folder is there."""
    acquire, taken = FileLock.acquire, []

    def stolen(lock: FileLock) -> None:
        if not taken:
            taken.append(FileLock(lock.lock_file))
            acquire(taken[0])
        acquire(lock)

    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", stolen)
        with scratch_folder(tmp_path, "a") as folder:
            stale = Path(taken[0].lock_file)
            assert folder.is_dir() and stale.exists() and f"{folder.name}.lock" != stale.name
    drop_lock(taken[0])
    assert left_in(tmp_path) == []


def test_a_lock_without_a_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may remove the file of a lock after it was opened: who locks it then is not alone."""
    fcntl = pytest.importorskip("fcntl")
    flock, place, removed = fcntl.flock, tmp_path / "a.lock", []

    def late(number: int, how: int) -> None:
        if not removed:
            removed.append(place.unlink())
        flock(number, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert take_lock(place) is None
    lock = take_lock(place)
    assert lock is not None and take_lock(place) is None
    drop_lock(lock)
    assert removed and left_in(tmp_path) == []


def test_what_could_not_be_removed_goes_with_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(whole_files.shutil, "rmtree", lambda *args, **options: None)
        with scratch_folder(tmp_path, "a"):
            pass
    assert len(left_in(tmp_path)) == 2
    with scratch_folder(tmp_path, "a"):
        assert len(left_in(tmp_path)) == 2
    assert left_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def full(path: Path, *args: object, **options: object) -> None:
        if path.parent != tmp_path:
            return mkdir(path, *args, **options)
        assert left_in(tmp_path) == [f"{path.name}.lock"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"), scratch_folder(tmp_path, "a"):
        pass
    assert left_in(tmp_path) == []


def test_an_error_leaves_nothing_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="No space left"), whole_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert left_in(tmp_path) == []
    write_whole(tmp_path / "plan.json", "old")

    def full(path: Path, *args: object, **options: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_whole(tmp_path / "plan.json", "new")
    assert left_in(tmp_path) == ["plan.json"] and (tmp_path / "plan.json").read_text(encoding="utf-8") == "old"


def edge(monkeypatch: pytest.MonkeyPatch, mount: Path, listed: bool) -> None:
    """Make a folder behave as a mount point does; one of a part of the same disk is not listed as such."""
    rename, rmdir, ismount = os.rename, os.rmdir, os.path.ismount
    mount = mount.resolve()

    def moves(source: Path, target: Path, **options: object) -> None:
        if mount in Path(source).parents and mount in Path(target).parents:
            return rename(source, target, **options)
        if mount in (*Path(source).parents, *Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        if mount in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(source, target, **options)

    def removes(path: Path, **options: object) -> None:
        if Path(path) == mount:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rename", moves)
    monkeypatch.setattr(os, "replace", moves)
    monkeypatch.setattr(os, "rmdir", removes)
    monkeypatch.setattr(os.path, "ismount", lambda path: (listed and Path(path) == mount) or ismount(path))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_a_mount_point_gets_the_files_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool, linked: bool
) -> None:
    mount = target = tmp_path / "disk"
    mount.mkdir()
    if linked:
        target = tmp_path / "elsewhere" / "out"
        target.parent.mkdir()
        target.symlink_to(mount, target_is_directory=True)
    edge(monkeypatch, mount, listed)
    assert room_for(target) == mount.resolve()
    with whole_folder(target) as folder:
        assert folder.parent == mount.resolve() and not is_taken(target)
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("whole")
        (folder / "weights").write_text("whole")
    assert left_in(mount) == ["config.json", "sub", "weights"] and left_in(mount / "sub") == ["a.txt"]
    assert is_taken(target)
    if linked:
        assert target.is_symlink() and left_in(target.parent) == ["out"]


def test_an_interrupt_while_files_are_moved_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "disk"
    (mount / "lost+found").mkdir(parents=True)
    edge(monkeypatch, mount, True)
    rename, moved = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        moved.append(path.name)
        if path.name == "config.json":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(mount) as folder:
        for name in ("a.json", "config.json", "model.safetensors"):
            (folder / name).write_text("whole")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("whole")
    assert moved == ["a.json", "model.safetensors", "sub", "config.json"]  # without the last one nothing loads
    assert left_in(mount) == ["lost+found"]
    with pytest.raises(CheckpointError, match="not empty"), whole_folder(mount) as folder:
        (folder / "a.txt").write_text("whole")
        (mount / "thesis.txt").write_text("of somebody else, meanwhile")
    assert left_in(mount) == ["lost+found", "thesis.txt"]


def test_what_a_killed_process_left_in_a_mount_point_is_no_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "lost+found").mkdir(parents=True)  # so that it cannot be replaced
    with writer(target) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(left_in(target)) == 3 and not is_taken(target)
    with whole_folder(target) as folder:
        (folder / "a.txt").write_text("whole")
    assert left_in(target) == ["a.txt", "lost+found"] and left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "out").mkdir()
    link = tmp_path / "here" / "out"
    link.symlink_to(tmp_path / "disk" / "out", target_is_directory=True)
    with whole_folder(link) as folder:
        assert folder.parent == (tmp_path / "disk").resolve()
        (folder / "a.txt").write_text("whole")
    assert link.is_symlink() and left_in(link) == ["a.txt"]
    assert left_in(tmp_path / "here") == left_in(tmp_path / "disk") == ["out"]


def test_places_lie_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    check_apart({"a": tmp_path / "out", "b": tmp_path / "out.run", "c": tmp_path / "out.jsonl", "d": None})
    for inner, outer in (("out", "out"), ("out/x/y", "out"), ("link/x", "out"), ("other/../out", "out")):
        for pair in ({"a": inner, "b": outer}, {"b": outer, "a": inner}):
            with pytest.raises(ConfigError, match="Name a place beside it"):
                check_apart({option: tmp_path / place for option, place in pair.items()})
