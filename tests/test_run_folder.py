"""The folder of a run: artefacts are whole or not there, changed inputs are named, one run writes at a time."""

from __future__ import annotations

import errno
import logging
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_adaprune import run_folder
from hf_adaprune.errors import CheckpointError, JournalError, RunError
from hf_adaprune.run_folder import RunFolder, locked, locked_output, once, once_noted, open_run
from hf_adaprune.search_journal import journal_lock
from hf_adaprune.whole_files import scratch_folder

FACTS = {"config": {"pruning_ratio": 0.2, "calibration": {"samples": 8}}, "weights": "a" * 64}
HOLDER = """
import sys, time
from pathlib import Path
from hf_adaprune.run_folder import {use}
with {use}({path}):
    print("held", flush=True)
    time.sleep(60)
"""


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    return {
        "wide": wide,
        "turned": wide.T,  # a view, as solvers return them
        "narrow": torch.randn(3, generator=generator).bfloat16(),
        "whole": torch.arange(4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "none": torch.zeros(0, 3),
    }


def test_artefacts_come_back_bit_by_bit(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert run is not None and not run.resumed
        run.bind(FACTS)
        run.keep("a/b", tensors(), {"numbers": [0.1, float("inf")], "order": {"z": 1, "a": 2}})
        run.keep("note", {}, "only this")
    with open_run(tmp_path / "run") as run:
        assert run is not None and run.resumed
        found, data = run.read("a/b")  # type: ignore[misc]
        assert run.read("note") == ({}, "only this") and run.read("other") is None
    assert list(data["order"]) == ["z", "a"] and data["numbers"] == [0.1, float("inf")]
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].is_contiguous()
        as_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def other_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["a.safetensors", "a.json"])
@pytest.mark.parametrize("harm", [cut_short, other_byte, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_artefact_is_made_again(
    file: str, harm: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    run.keep("a", tensors(), [1, 2, 3])
    harm(tmp_path / file)
    with caplog.at_level(logging.WARNING, "hf_adaprune"):
        assert run.read("a") is None
    note_is_gone = harm is Path.unlink and file == "a.json"  # that is no artefact, and no damage
    assert ("is damaged and is made again" in caplog.text) != note_is_gone
    run.keep("a", tensors(), [1, 2, 3])
    assert run.read("a") is not None


def test_a_value_is_made_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert once_noted(run, "n", lambda: [1]) == [1]
    assert once_noted(run, "n", lambda: pytest.fail("made twice")) == [1]
    assert once(None, "n", lambda: 3, lambda made: pytest.fail("kept"), lambda own, data: None) == 3


def test_what_changed_is_named(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert run is not None
        run.bind(FACTS)
        run.keep("a", {}, 1)
        run.bind(FACTS)
        other = {"config": {"pruning_ratio": 0.3, "calibration": {"samples": 8}}, "weights": "b" * 64}
        with pytest.raises(RunError, match=r"pruning_ratio 0\.2 -> 0\.3; weights\. Give the same"):
            run.bind(other)
        with pytest.raises(RunError, match=r"texts\.c\.txt null -> \"x\""):
            run.bind({**FACTS, "texts": {"c.txt": "x"}})
        run.bind(FACTS)
        (tmp_path / "run" / "run.json").write_text("[")
        with pytest.raises(RunError, match="is damaged"):
            run.bind(FACTS)


def test_a_folder_that_nothing_was_kept_in_goes(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert run is not None
        run.bind(FACTS)
    assert not any(tmp_path.iterdir())
    # What a kill left before anything was kept binds no one.
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").bind({"config": {"pruning_ratio": 0.9}})
    with open_run(tmp_path / "run") as run:
        assert run is not None and not run.resumed
        run.bind(FACTS)
        run.keep("a", {}, 1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a.json", "run.json"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for there in (None, "[", "[]", '{"format": 1}'):  # a file of the same name says nothing
        if there is not None:
            (tmp_path / "run.json").write_text(there)
        with pytest.raises(RunError, match="no folder of a run"), open_run(tmp_path):
            pass
        assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["tensors", "note"])
def test_nothing_is_half_written(
    stop: BaseException, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    run = RunFolder(tmp_path / "run")
    run.keep("before", tensors())

    def fails(*args: object, **options: object) -> None:
        if where == "tensors":
            Path(str(args[1])).write_bytes(b"half")
        else:
            Path(str(args[0])).with_name("a.json.partial").write_text("half")
        raise stop

    target = (safetensors.torch, "save_file") if where == "tensors" else (run_folder, "write_whole")
    with monkeypatch.context() as patch:
        patch.setattr(*target, fails)
        with pytest.raises(CheckpointError if isinstance(stop, OSError) else KeyboardInterrupt) as caught:
            run.keep("a", tensors())
    if isinstance(stop, OSError):
        assert "What was kept before is whole" in str(caught.value)
    assert run.read("before") is not None and run.read("a") is None
    assert not (tmp_path / "run" / "a.safetensors.partial").exists()
    run.keep("a", tensors())
    assert run.read("a") is not None


def test_a_disk_without_room_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    run = RunFolder(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**8))
    run.check_space(10**7, "the statistics")
    with pytest.raises(CheckpointError, match=r"95 MiB free, the statistics need up to 159 MiB.*run_dir"):
        run.check_space(10**8, "the statistics")


# -- locks ------------------------------------------------------------------------------------------------------------


def holder(use: str, path: Path) -> subprocess.Popen[str]:
    """A process that holds a lock until it is killed."""
    code = HOLDER.format(use=use, path=f"Path({str(path)!r})")
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "held\n"
    return started


@pytest.mark.parametrize("use", ["open_run", "locked_output"])
def test_a_second_process_is_refused_until_the_first_is_killed(use: str, tmp_path: Path) -> None:
    take = {"open_run": open_run, "locked_output": locked_output}[use]
    with holder(use, tmp_path / "out") as first:
        try:
            message = rf"another run \(process {first.pid} on .+\) is writing to .*out\. Wait for it, or choose"
            for _ in range(2):  # the refused one takes nothing from the first
                with pytest.raises(RunError, match=message), take(tmp_path / "out"):
                    pass
        finally:
            first.send_signal(signal.SIGKILL)
    with take(tmp_path / "out"):
        pass
    assert not any(tmp_path.iterdir())


def test_a_thread_takes_its_own_lock_again_and_no_other_thread_does(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def other() -> None:
        try:
            with locked(tmp_path / "lock", "it", JournalError):
                pass
        except JournalError as error:
            refused.append(error)

    with locked(tmp_path / "lock", "it") as is_first:
        with locked(tmp_path / "lock", "it") as again:
            assert is_first and not again
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    other()
    assert len(refused) == 1 and not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_without_locks_a_run_goes_on_and_leaves_nothing_that_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lustre is often mounted so; a file in the place of a lock would outlive a process that is killed."""
    import fcntl

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with locked(tmp_path / "a.lock", "the output") as taken:
        assert taken and not list(tmp_path.iterdir())
        with locked(tmp_path / "a.lock", "the output") as again:
            assert not again
    assert "the output is on a file system without locks" in caplog.text and not list(tmp_path.iterdir())
    with scratch_folder(tmp_path, "b") as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_a_journal_is_locked(tmp_path: Path) -> None:
    with journal_lock(tmp_path / "new" / "j.jsonl"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".j.jsonl.lock"]
    assert not any((tmp_path / "new").iterdir())
