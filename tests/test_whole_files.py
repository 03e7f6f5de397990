"""Files and folders appear when they are whole; what killed processes left goes, what living ones hold stays."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from hf_adaprune import whole_files
from hf_adaprune.errors import CheckpointError
from hf_adaprune.locks import drop_lock, take_lock
from hf_adaprune.whole_files import scratch_folder, whole_folder, write_whole

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
